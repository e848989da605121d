"""PrefetchIterator: runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class PrefetchIterator(Generic[ItemT]):
    """The items of ``iterable`` in order, with at most ``depth`` of them made or being made ahead of the consumer.

    With ``max_bytes``, an item is begun only while those that wait for the consumer have fewer bytes in all (``size``).
    So they never have more than ``max_bytes`` and one item; one is made however large it is.

    An exception of the iterable is raised in the consumer, after the items before it, with its own traceback. ``close``
    ends and joins the thread: call it, or use a ``with`` block. ``unblock`` is called by ``close`` first, and must make
    an iterable that waits return or raise (close its source); what it raises then has no consumer and is dropped.
    """

    def __init__(
        self,
        iterable: Iterable[ItemT],
        depth: int,
        unblock: Callable[[], None] | None = None,
        *,
        size: Callable[[ItemT], int] = lambda _item: 0,
        max_bytes: int = 1,
    ) -> None:
        if depth < 1 or max_bytes < 1:
            raise ValueError(f"depth and max_bytes must be at least 1, got {depth} and {max_bytes}")
        self._iterator = iter(iterable)
        self._depth = depth
        self._size = size
        self._max_bytes = max_bytes
        self._unblock = unblock
        self._condition = threading.Condition()
        self._items: deque[tuple[ItemT, int]] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prefetch")
        self._thread.start()

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        with self._condition:
            self._condition.wait_for(lambda: self._items or self._ended or self._closing)
            if self._items and not self._closing:
                item, _ = self._items.popleft()
                self._condition.notify_all()
                return item
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def __enter__(self) -> PrefetchIterator[ItemT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was prefetched and join the thread. Idempotent."""
        with self._condition:
            already = self._closing
            self._closing = True
            self._items.clear()
            self._condition.notify_all()
        if not already and self._unblock is not None:
            self._unblock()
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._wait_for_room():
                item = next(self._iterator)
                entry = item, self._size(item)
                # An item that this thread still named would outlive its consumer while the next one is made.
                del item
                with self._condition:
                    if not self._closing:
                        self._items.append(entry)
                        self._condition.notify_all()
                del entry
        except StopIteration:
            pass
        except BaseException as caught:  # noqa: BLE001 (the thread's boundary: the consumer raises it)
            error = caught
        with self._condition:
            self._error = None if self._closing else error
            self._ended = True
            self._condition.notify_all()

    def _wait_for_room(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._has_room() or self._closing)
            return not self._closing

    def _has_room(self) -> bool:
        return len(self._items) < self._depth and sum(num_bytes for _, num_bytes in self._items) < self._max_bytes
