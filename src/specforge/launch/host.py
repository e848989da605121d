"""Runs a plan's processes as children on this host.

Every child has two pipes. On its report pipe it writes JSON lines (:class:`Report`): ``endpoint``, ``finished``,
``stopped`` or ``failed``. On its standard input it reads the endpoint of the control plane; the end of that pipe means
that the parent is gone, and the child stops. Nothing polls: a thread a child blocks on its report pipe and the parent
blocks on one queue.

Children run in sessions of their own, so a Ctrl-C reaches the parent alone, which ends them in order: the trainer
first (it writes a checkpoint), then the capture processes. What a child says after it was told to stop is no failure;
a capture process that leaves before the trainer, without having been told, is one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from specforge.errors import RunFailed, UserError

TRAIN_STOP_S = 10.0
CAPTURE_STOP_S = 5.0

Event = Literal["endpoint", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child: ``role`` is the argument of ``specforge.launch.roles``. ``log_file`` takes its output, if any.

    ``keep_open`` are file descriptors of this process that the child inherits: locks that it must hold too.
    """

    name: str
    role: Literal["train", "capture"]
    config_file: Path
    log_file: Path | None
    resume: bool = False
    keep_open: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """One line from a child to the parent."""

    event: Event
    fields: dict[str, Any] = field(default_factory=dict)

    def to_line(self) -> bytes:
        return json.dumps({"event": self.event, "fields": self.fields}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Report:
        payload = json.loads(line)
        return cls(payload["event"], payload["fields"])


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    process: subprocess.Popen[bytes]
    reports: IO[bytes]
    last: Report | None = None
    told_to_stop: bool = False


@dataclass(frozen=True, slots=True)
class _Exit:
    code: int


class HostExecutor:
    """Runs children until all have ended; the first failure ends the others and is the one that is raised."""

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}
        self._events: queue.SimpleQueue[tuple[str, Report | _Exit]] = queue.SimpleQueue()

    def run(self, specs: Sequence[ChildSpec]) -> dict[str, dict[str, Any]]:
        """Start every child, pass the trainer's endpoint on to the capture processes, wait for all of them.

        Returns the fields of each child's ``finished`` or ``stopped`` report. Raises :class:`RunFailed` (or the
        child's own :class:`UserError`) when a child failed, ``KeyboardInterrupt`` when this process was told to stop.
        """
        failure: tuple[str, str] | None = None
        user_error = False
        with _sigterm_as_interrupt():
            try:
                for spec in specs:
                    self._start(spec)
                running = set(self._children)
                while running:
                    name, event = self._events.get()
                    child = self._children[name]
                    if isinstance(event, Report):
                        child.last = event
                        if event.event == "endpoint":
                            self._broadcast(event)
                        continue
                    running.discard(name)
                    if not child.told_to_stop and not _ended_well(child, event):
                        failure = (name, _describe(child, event))
                        user_error = bool(child.last and child.last.fields.get("user_error"))
                    self._stop(running)
            except KeyboardInterrupt:
                self._stop([name for name, child in self._children.items() if child.process.poll() is None])
                raise
            finally:
                self._kill_all()
        if failure is not None:
            message = failure[1]
            if user_error:
                raise UserError(message)
            raise RunFailed(f"the {failure[0]} process failed: {message}")
        return {name: child.last.fields if child.last else {} for name, child in self._children.items()}

    def _start(self, spec: ChildSpec) -> None:
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "specforge.launch.roles", spec.role, str(spec.config_file)]
        command += ["--name", spec.name, "--report-fd", str(write_end)]
        command += ["--resume"] if spec.resume else []
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with contextlib.ExitStack() as stack:
            output = None
            if spec.log_file is not None:
                spec.log_file.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(spec.log_file.open("ab"))
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[write_end, *spec.keep_open],
                env=environment,
                start_new_session=True,
            )
        os.close(write_end)
        child = _Child(spec, process, os.fdopen(read_end, "rb"))
        self._children[spec.name] = child
        threading.Thread(target=self._watch, args=(child,), name=f"watch-{spec.name}", daemon=True).start()

    def _watch(self, child: _Child) -> None:
        with child.reports as reports:
            for line in reports:
                if line.endswith(b"\n"):  # a child killed while writing leaves a torn line
                    self._events.put((child.spec.name, Report.from_line(line)))
        self._events.put((child.spec.name, _Exit(child.process.wait())))

    def _broadcast(self, endpoint: Report) -> None:
        for child in self._children.values():
            if child.spec.role != "train" and child.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it died meanwhile: its exit is reported by itself
                    child.process.stdin.write(endpoint.to_line())
                    child.process.stdin.flush()

    def _stop(self, names: Sequence[str] | set[str]) -> None:
        """SIGTERM in order (trainer first), each with its time to leave; then SIGKILL."""
        for role, patience_s in (("train", TRAIN_STOP_S), ("capture", CAPTURE_STOP_S)):
            leaving = [self._children[name] for name in names if self._children[name].spec.role == role]
            for child in leaving:
                child.told_to_stop = True
                child.process.terminate()
            deadline = time.monotonic() + patience_s
            for child in leaving:
                try:
                    child.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.process.kill()

    def _kill_all(self) -> None:
        for child in self._children.values():
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
            if child.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    child.process.stdin.close()


def _ended_well(child: _Child, event: _Exit) -> bool:
    """Of a child that nobody told to stop: only the trainer ends by itself."""
    told = child.last is not None and child.last.event in {"finished", "stopped"}
    return event.code == 0 and told and child.spec.role == "train"


def _describe(child: _Child, event: _Exit) -> str:
    """The child's own words where it could still speak, else what the operating system says."""
    log = f" (log: {child.spec.log_file})" if child.spec.log_file else ""
    if child.last is not None and child.last.event == "failed":
        trace = child.last.fields.get("traceback", "")
        return str(child.last.fields["message"]) + (f"\n{trace}" if trace else "") + log
    if event.code == 0 and child.last is not None and child.last.event == "stopped":
        return f"told to stop by another process{log}"
    if event.code < 0:
        return f"killed by {signal.Signals(-event.code).name}{log}"
    return f"exited with code {event.code} without saying why{log}"


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
