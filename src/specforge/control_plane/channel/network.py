"""The channel between processes: a stream in the controller's process, read through the control-plane server.

``RefStream`` keeps what was published until every consumer consumed it. A reader asks by position, so a poll whose
answer was lost is asked again and gives the same refs; it names the stream it began with, so that the reader of a
controller that was started again is told instead of being given refs of another stream.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from specforge.contracts.refs import SlotRef
from specforge.control_plane import wire
from specforge.control_plane.client import ControlPlaneClient
from specforge.errors import ChannelClosed, ConfigError, ControlPlaneError, ProducerFailed


class RefStream:
    """See ``RefWriter``. Each of ``consumers`` (one a rank, say) sees the whole stream.

    What it holds is bounded by the controller, which publishes no more than its window beyond what is trained.
    """

    def __init__(self, consumers: Sequence[str]) -> None:
        if not consumers or len(set(consumers)) != len(consumers):
            raise ConfigError(f"expected the names of one or more consumers, each once, got {list(consumers)}")
        self.stream_id = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._refs: deque[SlotRef] = deque()
        self._first = 0
        """Position of the first ref that is kept."""
        self._consumed = dict.fromkeys(consumers, 0)
        self._closed = False
        self._failure: str | None = None

    def publish(self, refs: Sequence[SlotRef]) -> None:
        with self._changed:
            if self._closed or self._failure is not None:
                raise ChannelClosed("publish on a channel that was closed")
            self._refs.extend(refs)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = self._failure is None
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        with self._changed:
            if not self._closed and self._failure is None:
                self._failure = reason
            self._changed.notify_all()

    def in_flight(self) -> int:
        """Published and not yet consumed by every consumer."""
        with self._changed:
            return len(self._refs)

    def page(self, body: wire.PollBody, cancelled: Callable[[], bool] = lambda: False) -> wire.RefPage:
        """The refs from ``body.cursor`` on; blocks until there is one, the stream ends or time is up.

        A call whose ``cancelled`` turns true ends at the next ``wake``, with no refs. Raises ``ProducerFailed``.
        """
        deadline = time.monotonic() + body.timeout_s
        with self._changed:
            cursor = self._cursor(body)
            while True:
                if self._failure is not None:
                    raise ProducerFailed(self._failure)
                start = cursor - self._first
                refs = tuple(islice(self._refs, start, start + body.max_refs))
                remaining = deadline - time.monotonic()
                if refs or self._closed or remaining <= 0 or cancelled():
                    ended = self._closed and start + len(refs) == len(self._refs)
                    return wire.RefPage(self.stream_id, cursor, refs, ended)
                self._changed.wait(remaining)

    def consume(self, body: wire.ConsumedBody) -> None:
        """``body.num_refs`` refs from the start of the stream are done with, for that consumer."""
        with self._changed:
            self._check(body.consumer, body.stream_id)
            num_published = self._first + len(self._refs)
            if body.num_refs > num_published:
                raise ControlPlaneError(
                    f"consumer {body.consumer!r} consumed {body.num_refs} refs of {num_published} that were published"
                )
            self._consumed[body.consumer] = max(self._consumed[body.consumer], body.num_refs)
            while self._first < min(self._consumed.values()):
                self._refs.popleft()
                self._first += 1

    def wake(self) -> None:
        """Blocked calls look at their ``cancelled`` again."""
        with self._changed:
            self._changed.notify_all()

    def _cursor(self, body: wire.PollBody) -> int:
        self._check(body.consumer, body.stream_id)
        cursor = self._consumed[body.consumer] if body.cursor is None else body.cursor
        num_published = self._first + len(self._refs)
        if not self._consumed[body.consumer] <= cursor <= num_published:
            raise ControlPlaneError(
                f"consumer {body.consumer!r} asks for ref {cursor} of the stream, expected one from "
                f"{self._consumed[body.consumer]} (consumed) to {num_published} (published); each consumer has one "
                "reader"
            )
        return cursor

    def _check(self, consumer: str, stream_id: str | None) -> None:
        if stream_id not in {None, self.stream_id}:
            raise ControlPlaneError(
                f"the stream of refs {stream_id!r} is gone: the controller was started again and goes on from its "
                "checkpoint; restart the trainer from the same checkpoint"
            )
        if consumer not in self._consumed:
            raise ControlPlaneError(
                f"expected one of the consumers {', '.join(map(repr, self._consumed))}, got {consumer!r}"
            )


class NetworkRefReader:
    """See ``RefReader``: what consumer ``consumer`` has not consumed yet of the server's stream."""

    def __init__(self, client: ControlPlaneClient, consumer: str) -> None:
        self._client = client
        self._consumer = consumer
        self._lock = threading.Lock()
        self._stream_id: str | None = None
        self._cursor: int | None = None
        self._num_consumed = 0
        self._ended = False

    def poll(self, max_refs: int, timeout_s: float | None = None) -> list[SlotRef]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            wait_s = wire.MAX_WAIT_S
            if deadline is not None:
                wait_s = min(wait_s, max(0.0, deadline - time.monotonic()))
            refs = self._page(max_refs, wait_s)
            if refs or self._ended or (deadline is not None and time.monotonic() >= deadline):
                return refs

    @property
    def ended(self) -> bool:
        """See ``RefReader``; known from the poll that reached the end."""
        return self._ended

    def mark_consumed(self, num_refs: int) -> None:
        with self._lock:
            if self._stream_id is None:
                raise ControlPlaneError(f"{num_refs} refs are marked as consumed before any was polled")
            self._num_consumed += num_refs
            self._client.consume_refs(self._consumer, self._stream_id, self._num_consumed)

    def stream(self) -> Iterator[SlotRef]:
        while refs := self.poll(1):
            yield from refs

    def _page(self, max_refs: int, wait_s: float) -> list[SlotRef]:
        max_refs = min(max_refs, wire.MAX_BATCH)
        page = self._client.poll_refs(wire.PollBody(self._consumer, self._stream_id, self._cursor, max_refs, wait_s))
        with self._lock:
            if self._stream_id is None:
                self._stream_id, self._num_consumed = page.stream_id, page.cursor
            self._cursor = page.cursor + len(page.refs)
            self._ended = page.ended
        return list(page.refs)
