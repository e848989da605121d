"""The channel between two threads of one process: a condition variable, no copies."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from specforge.contracts.refs import SlotRef
from specforge.errors import ChannelClosed, ProducerFailed


class _Stream:
    """What both ends share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.refs: deque[SlotRef] = deque()
        self.num_in_flight = 0
        self.closed = False
        self.failure: str | None = None


class MemoryRefWriter:
    """See ``RefWriter``."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def publish(self, refs: Sequence[SlotRef]) -> None:
        with self._stream.changed:
            if self._stream.closed or self._stream.failure is not None:
                raise ChannelClosed("publish on a channel that was closed")
            self._stream.refs.extend(refs)
            self._stream.num_in_flight += len(refs)
            self._stream.changed.notify_all()

    def close(self) -> None:
        with self._stream.changed:
            self._stream.closed = self._stream.failure is None
            self._stream.changed.notify_all()

    def fail(self, reason: str) -> None:
        with self._stream.changed:
            if not self._stream.closed and self._stream.failure is None:
                self._stream.failure = reason
            self._stream.changed.notify_all()

    def in_flight(self) -> int:
        with self._stream.changed:
            return self._stream.num_in_flight


class MemoryRefReader:
    """See ``RefReader``."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def poll(self, max_refs: int, timeout_s: float | None = None) -> list[SlotRef]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        stream = self._stream
        with stream.changed:
            while True:
                if stream.failure is not None:
                    raise ProducerFailed(stream.failure)
                if stream.refs or stream.closed:
                    return [stream.refs.popleft() for _ in range(min(max_refs, len(stream.refs)))]
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return []
                stream.changed.wait(remaining)

    @property
    def ended(self) -> bool:
        with self._stream.changed:
            return self._stream.closed and not self._stream.refs

    def mark_consumed(self, num_refs: int) -> None:
        with self._stream.changed:
            self._stream.num_in_flight -= num_refs

    def stream(self) -> Iterator[SlotRef]:
        while refs := self.poll(1):
            yield from refs


def memory_channel() -> tuple[MemoryRefWriter, MemoryRefReader]:
    """Both ends of a new channel."""
    stream = _Stream()
    return MemoryRefWriter(stream), MemoryRefReader(stream)
