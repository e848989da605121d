"""A child's side of its two pipes to the supervisor. See :mod:`specforge.launch.child` for the other side."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Any

from specforge.launch.child import Event, Line

_LOG = logging.getLogger(__name__)


class ParentLink:
    """The two pipes to the parent. When its end of the input is closed, this process gets a SIGTERM."""

    def __init__(self, report_fd: int) -> None:
        self._report = os.fdopen(report_fd, "wb", buffering=0)
        self._lines: list[Line] = []
        self._on_lost: Callable[[str, str | None], None] | None = None
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._listen, name="parent-link", daemon=True).start()

    def report(self, event: Event, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody is left to be told
            self._report.write(Line(event, fields).to_bytes())

    def wait_for(self, event: Event) -> dict[str, Any] | None:
        """Blocks until the parent says ``event``; the fields of the last such line that was not taken yet. ``None``
        when the parent ended the run, or went away, instead.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(line.event == event for line in self._lines))
            found = [line for line in self._lines if line.event == event]
            self._lines = [line for line in self._lines if line.event != event]
            return found[-1].fields if found and not self._closed else None

    def when_lost(self, leave: Callable[[str, str | None], None]) -> None:
        """``leave(worker, reason)`` hears of every worker that is gone, of those that went before this call too."""
        with self._changed:
            self._on_lost = leave
            for line in self._lines:
                self._lose(line)

    def run_is_over(self) -> bool:
        """Whether the parent closed its end; known at once when a SIGTERM is the parent's."""
        poll = select.poll()
        poll.register(0, 0)  # hang-ups are always reported
        return bool(poll.poll(0))

    def _listen(self) -> None:
        # Unbuffered: a thread blocked in a buffered reader would hold its lock while the interpreter shuts down.
        with os.fdopen(os.dup(0), "rb", buffering=0) as pipe:
            while line := pipe.readline():
                self._receive(Line.from_bytes(line))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, line: Line) -> None:
        with self._changed:
            self._lines.append(line)
            if self._on_lost is not None:
                self._lose(line)
            self._changed.notify_all()

    def _lose(self, line: Line) -> None:
        if line.event != "lost" or self._on_lost is None:
            return
        try:
            self._on_lost(line.fields["worker"], line.fields["reason"])
        except Exception as error:  # noqa: BLE001 - this thread must live; the leases expire, as they do where nobody tells
            _LOG.warning("worker %s is gone, but the controller refused: %s", line.fields["worker"], error)
