"""The channel as a file on a mount that both processes see: append-only JSON lines.

A line is a SlotRef, ``{"end":true}`` or ``{"fail":"reason"}``. Only whole lines count: what a dying or slow writer
left behind its last newline is not read, and the next writer cuts it off. The consumer's progress goes into
``<path>.consumed``, replaced atomically. Shared mounts deliver no notifications across hosts, so a waiting reader
polls: it looks at the file's size every ``poll_interval_s``, one ``stat`` each time. It is the only thing in the
control plane that does; processes on one host use the memory channel or the server.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specforge.contracts import codec
from specforge.contracts.refs import SlotRef
from specforge.errors import ChannelClosed, ControlPlaneError, ProducerFailed

_END = b'{"end":true}\n'


class FileRefWriter:
    """See ``RefWriter``. Continues a file that an earlier writer left; one writer at a time. The file is 0600."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
        self._num_published = 0
        self._closed = False
        self._recover()

    def publish(self, refs: Sequence[SlotRef]) -> None:
        lines = "".join(codec.dumps(ref) + "\n" for ref in refs).encode()
        with self._lock:
            if self._closed:
                raise ChannelClosed(f"publish on the channel {self._path}, which was closed")
            self._append(lines)
            self._num_published += len(refs)

    def close(self) -> None:
        self._finish(_END)

    def fail(self, reason: str) -> None:
        self._finish(json.dumps({"fail": reason}).encode() + b"\n")

    def in_flight(self) -> int:
        with self._lock:
            return self._num_published - _read_consumed(self._path)

    def _finish(self, sentinel: bytes) -> None:
        with self._lock:
            if not self._closed:
                self._append(sentinel)
                os.close(self._file)
                self._closed = True

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            # All or nothing: cutting never needs space. Readers cannot have passed the last newline of a batch torn
            # by a full disk unless whole lines of it arrived, and those are published again in the same order.
            os.ftruncate(self._file, before)
            raise ControlPlaneError(f"the channel {self._path} could not be written: {error.strerror}") from error

    def _recover(self) -> None:
        end = 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                record = json.loads(line)
                if "end" in record or "fail" in record:
                    self._closed = True
                else:
                    self._num_published += 1
        os.ftruncate(self._file, end)
        if self._closed:
            os.close(self._file)


class FileRefReader:
    """See ``RefReader``. Reads from the start of the file; a restarted consumer skips what it already used."""

    def __init__(self, path: str | Path, poll_interval_s: float = 0.05) -> None:
        self._path = Path(path)
        self._interval_s = poll_interval_s
        self._lock = threading.Lock()
        self._offset = 0
        self._refs: deque[SlotRef] = deque()
        self._closed = False
        self._failure: str | None = None
        self._num_consumed = _read_consumed(self._path)

    def poll(self, max_refs: int, timeout_s: float | None = None) -> list[SlotRef]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._read()
                if self._failure is not None:
                    raise ProducerFailed(self._failure)
                if self._refs or self._closed:
                    return [self._refs.popleft() for _ in range(min(max_refs, len(self._refs)))]
            remaining = self._interval_s if deadline is None else deadline - time.monotonic()
            if remaining <= 0:
                return []
            time.sleep(min(self._interval_s, remaining))

    @property
    def ended(self) -> bool:
        with self._lock:
            self._read()
            return self._closed and not self._refs

    def mark_consumed(self, num_refs: int) -> None:
        with self._lock:
            self._num_consumed += num_refs
            counter = _consumed_path(self._path)
            partial = counter.with_name(counter.name + ".partial")
            partial.write_text(str(self._num_consumed))
            partial.replace(counter)

    def stream(self) -> Iterator[SlotRef]:
        while refs := self.poll(1):
            yield from refs

    def _read(self) -> None:
        """Take in every whole line that is new. A file that does not exist yet is an empty stream."""
        try:
            if self._path.stat().st_size <= self._offset:
                return
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        # The offset stops behind the last newline, so a torn line that a later writer cut off was never counted.
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise ControlPlaneError(f"the channel {self._path} holds a line that is not JSON: {error}") from None
        if "end" in record:
            self._closed = True
        elif "fail" in record:
            self._failure = str(record["fail"])
        else:
            self._refs.append(codec.from_json(SlotRef, record))


def _consumed_path(path: Path) -> Path:
    return path.with_name(path.name + ".consumed")


def _read_consumed(path: Path) -> int:
    try:
        return int(_consumed_path(path).read_text())
    except FileNotFoundError:
        return 0
