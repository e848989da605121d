"""One child process on this host and its two pipes, which carry JSON lines (:class:`Line`).

On its report pipe a child says how it goes; on its standard input it is told what it must know. The end of its standard
input means that the run is over for it: it was told to stop, or its parent is gone. Nothing polls: a thread a child
blocks on its report pipe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

_LOG = logging.getLogger(__name__)

MAX_REASON_CHARS = 500
"""Of a death, in a message to another child: a line that fits the atomic write of a pipe is written whole or not."""

Event = Literal["serving", "finished", "stopped", "failed", "start", "endpoint", "lost"]
"""What a child reports: it ``serving`` requests from here on (the trainer), ``finished``, ``stopped`` in order, or
``failed``. What it is told: a train process ``start`` (token, ids of the living workers, its place among the train
ranks) once, and ``lost`` (worker, reason) for each worker that is gone; a capture process ``endpoint`` (url, token)
whenever a train process serves.
"""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child: ``role`` is the argument of ``specforge.launch.roles``. ``log_file`` takes its output, if any.

    ``resume``: it goes on from a checkpoint, as it does in any case after a death. ``keep_open`` are file descriptors
    of this process that the child inherits: locks that it must hold too.
    """

    name: str
    role: Literal["train", "capture"]
    config_file: Path
    log_file: Path | None
    resume: bool = False
    keep_open: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of either pipe."""

    event: Event
    fields: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return json.dumps({"event": self.event, "fields": self.fields}).encode() + b"\n"

    @classmethod
    def from_bytes(cls, line: bytes) -> Self:
        payload = json.loads(line)
        return cls(payload["event"], payload["fields"])


@dataclass(frozen=True, slots=True)
class Exit:
    """A child is gone; ``code`` as ``subprocess`` has it: negative for a signal."""

    code: int


class Child:
    """A started process. ``on_event`` gets each of its reports and, last, its :class:`Exit`, from another thread."""

    def __init__(
        self,
        spec: ChildSpec,
        incarnation: int,
        command: Sequence[str],
        inherited: Sequence[int],
        on_event: Callable[[Child, Line | Exit], None],
    ) -> None:
        """``inherited``: file descriptors that it gets beside those of ``spec.keep_open``."""
        self.spec = spec
        self.incarnation = incarnation
        self.last_report: Line | None = None
        self.told_to_stop = False
        self._on_event = on_event
        read_end, write_end = os.pipe()
        try:
            self._process = self._start(command, write_end, inherited)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._reports = os.fdopen(read_end, "rb")
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        threading.Thread(target=self._watch, name=f"watch-{self.id}", daemon=True).start()

    @property
    def id(self) -> str:
        """``<name>.<incarnation>``: of a capture process its worker id."""
        return f"{self.spec.name}.{self.incarnation}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, event: Event, **fields: Any) -> None:
        """Without waiting: a child that died is told nothing, its exit is reported by itself."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            if self._stdin.write(Line(event, fields).to_bytes()) is None:
                _LOG.warning("%s does not read its standard input; it was not told %r", self.id, event)

    def ask_to_stop(self) -> None:
        """The end of its input, then SIGTERM: in that order a child can tell its parent's wish from a stranger's."""
        self.told_to_stop = True
        self._stdin.close()
        self._process.terminate()

    def wait_or_kill(self, timeout_s: float) -> None:
        """Returns when it is gone; after ``timeout_s`` it is killed."""
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Close its input; for a child that has left."""
        self._stdin.close()

    def describe_end(self, code: int) -> tuple[str, str]:
        """(verb, reason): its own words where it could still speak, else what the operating system says."""
        if self.last_report is not None and self.last_report.event == "failed":
            return "failed:", str(self.last_report.fields["message"])
        if self.stopped_in_order(code):
            return "was", "told to stop by another process"
        if code < 0:
            return "was", f"killed by {signal.Signals(-code).name}"
        return "", f"exited with code {code} without saying why"

    def stopped_in_order(self, code: int) -> bool:
        """It left because something told it to, and gave back what it had."""
        return code == 0 and self.last_report is not None and self.last_report.event == "stopped"

    def _start(self, command: Sequence[str], write_end: int, inherited: Sequence[int]) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if self.spec.log_file is not None:
                self.spec.log_file.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(self.spec.log_file.open("ab"))
            return subprocess.Popen(
                [*command, "--report-fd", str(write_end)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                bufsize=0,
                pass_fds=[write_end, *inherited, *self.spec.keep_open],
                env=environment,
                start_new_session=True,
            )

    def _watch(self) -> None:
        with self._reports as reports:
            for line in reports:
                if line.endswith(b"\n"):  # a child killed while writing leaves a torn line
                    self._on_event(self, Line.from_bytes(line))
        self._on_event(self, Exit(self._process.wait()))
