"""The supervisor: runs a plan's processes as children on this host, and starts again those that died.

One loop over one queue; the waits before a restart are timeouts of that queue. What ends a child that nobody told to
stop, and what follows:

    trainer, in order (``finished``, ``stopped``)     the run has ended: the others are told to stop
    ``failed``, the user's fault, at the first start  the run fails with that sentence
    trainer, ``failed``                               the run fails with its message and traceback
    trainer, ``failed`` with lost features            started again: it goes on from its checkpoint
    capture process, ``failed`` or told to stop       started again, within the limit of deaths in a row
    killed, or gone without a word                    started again, within the limit

Children run in sessions of their own, so a Ctrl-C reaches the parent alone, which ends them in order: the trainer
first (it writes a checkpoint), then the capture processes. What a child says after it was told to stop is no failure.
"""

from __future__ import annotations

import logging
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from specforge.config.launch import RestartOptions
from specforge.errors import FeatureNotFound, RunFailed, UserError
from specforge.launch.child import MAX_REASON_CHARS, Child, ChildSpec, Exit, Line
from specforge.launch.endpoint import Endpoint
from specforge.launch.restarts import Restarts

_LOG = logging.getLogger(__name__)

ROLES = (sys.executable, "-m", "specforge.launch.roles")
"""The command of a child, before its arguments."""
STOP_S = 9.0
"""How long all children together may take to leave before they are killed; 10 s with the end of this process."""
CAPTURE_STOP_S = 2.0
"""The part of it that is left for the capture processes, which leave after the trainer."""
CURED_BY_RESTART = frozenset({FeatureNotFound.__name__})
"""Reported errors of a trainer that a restart repairs: features that are gone are captured again."""


@dataclass(frozen=True, slots=True)
class ChildStarted:
    """For observers: a child was started. ``id`` is ``<name>.<incarnation>``."""

    name: str
    id: str
    pid: int


@dataclass(frozen=True, slots=True)
class ChildDied:
    """For observers: a child died and is started again after ``delay_s``; ``num_deaths`` counts those in a row."""

    name: str
    id: str
    what: str
    delay_s: float
    num_deaths: int

    def __str__(self) -> str:
        return f"{self.name} {self.what}; starting it again in {self.delay_s:g} s (restart {self.num_deaths})"


def log_deaths(happened: ChildStarted | ChildDied) -> None:
    """One line a restart, as a warning."""
    if isinstance(happened, ChildDied):
        _LOG.warning("%s", happened)


@dataclass(slots=True)
class _Place:
    """What is known of a child over all its incarnations. ``due_at``: when to start it again, while it waits."""

    spec: ChildSpec
    restarts: Restarts
    child: Child | None = None
    num_starts: int = 0
    due_at: float | None = None

    @property
    def is_vacant(self) -> bool:
        return self.child is None and self.due_at is None


class HostExecutor:
    """Runs children until all have ended; the first failure that no restart repairs is the one that is raised.

    ``command`` starts a child, ``observe`` hears of every start and death from the thread of :meth:`run`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        restarts: RestartOptions,
        command: Sequence[str] = ROLES,
        observe: Callable[[ChildStarted | ChildDied], None] = log_deaths,
    ) -> None:
        self._endpoint, self._options = endpoint, restarts
        self._command, self._observe = command, observe
        self._places: dict[str, _Place] = {}
        # A signal handler may put at any moment: SimpleQueue allows it inside its own get.
        self._events: queue.SimpleQueue[tuple[Child, Line | Exit] | RunFailed | Literal["stop"]] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._results: dict[str, dict[str, Any]] = {}
        self._ending = self._is_finished = self._is_stop_requested = False
        self._is_serving = self._has_served = False

    def run(self, specs: Sequence[ChildSpec]) -> dict[str, dict[str, Any]]:
        """Start every child (one of them is the trainer), start again those that die, until the trainer is done.

        Returns the fields of the last report of each child. Raises :class:`RunFailed` (or the child's own
        :class:`UserError`) when a child failed for good, ``KeyboardInterrupt`` after :meth:`request_stop`.
        """
        self._places = {spec.name: _Place(spec, Restarts(self._options)) for spec in specs}
        try:
            for place in self._places.values():
                self._start(place)
            while not all(place.is_vacant for place in self._places.values()):
                self._take_event()
        finally:
            for place in self._places.values():
                if place.child is not None:
                    place.child.kill()
        if not self._is_finished:
            if self._failure is not None:
                raise self._failure
            if self._is_stop_requested:
                raise KeyboardInterrupt
        return self._results

    def request_stop(self) -> None:
        """End all children in order. Safe to call from any thread and from a signal handler."""
        self._events.put("stop")

    def fail(self, reason: str) -> None:
        """End the run, which failed for ``reason``. Safe to call from any thread."""
        self._events.put(RunFailed(reason))

    def _take_event(self) -> None:
        next_start = min((place.due_at for place in self._places.values() if place.due_at is not None), default=None)
        timeout_s = None if next_start is None else max(0.0, next_start - time.monotonic())
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            self._start_due()
            return
        if event == "stop":
            self._is_stop_requested = True
            self._stop_all()
            return
        if isinstance(event, RunFailed):
            self._failure = self._failure or event
            self._stop_all()
            return
        child, what = event
        if isinstance(what, Exit):
            self._exited(self._places[child.spec.name], child, what.code)
        else:
            child.last_report = what
            if what.event == "serving":
                self._serving()

    # Starts

    def _start_due(self) -> None:
        for place in self._places.values():
            if place.due_at is not None and place.due_at <= time.monotonic():
                self._start(place)

    def _start(self, place: _Place) -> None:
        spec, listener = place.spec, self._endpoint.listener.fileno()
        is_train = spec.role == "train"
        place.due_at = None
        place.num_starts += 1
        arguments = [spec.role, str(spec.config_file), "--name", spec.name]
        arguments += ["--listen-fd", str(listener)] if is_train else []
        arguments += [] if is_train else ["--worker-id", f"{spec.name}.{place.num_starts}"]
        arguments += ["--resume"] if spec.resume or (is_train and place.num_starts > 1) else []
        place.child = child = Child(
            spec,
            place.num_starts,
            [*self._command, *arguments],
            [listener] if is_train else [],
            lambda child, event: self._events.put((child, event)),
        )
        place.restarts.started()
        self._observe(ChildStarted(spec.name, child.id, child.pid))
        if is_train:
            # Before a train process of this run served, leases in the ledger are those of an earlier run, whose
            # workers had the same names.
            workers = [worker.id for worker in self._running("capture")] if self._has_served else []
            child.tell("start", token=self._endpoint.token, workers=workers)
        elif self._is_serving:
            child.tell("endpoint", url=self._endpoint.url, token=self._endpoint.token)

    def _serving(self) -> None:
        self._is_serving = self._has_served = True
        for child in self._running("capture"):
            child.tell("endpoint", url=self._endpoint.url, token=self._endpoint.token)

    # Ends

    def _exited(self, place: _Place, child: Child, code: int) -> None:
        place.child = None
        child.close()
        is_train = child.spec.role == "train"
        report = child.last_report
        self._results[place.spec.name] = report.fields if report is not None else {}
        if is_train:
            self._is_serving = False
            self._is_finished = report is not None and report.event == "finished"
        if self._ending:
            return
        if not is_train:
            reason = None if child.stopped_in_order(code) else child.describe_end(code)[1][:MAX_REASON_CHARS]
            for train in self._running("train"):
                train.tell("lost", worker=child.id, reason=reason)
        if self._is_finished or (is_train and child.stopped_in_order(code)):
            self._stop_all()
        elif _is_for_good(child):
            self._fail(child, code, num_deaths=1)
        else:
            self._died(place, child, code)

    def _died(self, place: _Place, child: Child, code: int) -> None:
        delay_s = place.restarts.died()
        if delay_s is None:
            self._fail(child, code, place.restarts.num_deaths)
            return
        place.due_at = time.monotonic() + delay_s
        what = " ".join(child.describe_end(code)).strip()
        self._observe(ChildDied(place.spec.name, child.id, what, delay_s, place.restarts.num_deaths))

    def _fail(self, child: Child, code: int, num_deaths: int) -> None:
        fields = child.last_report.fields if child.last_report else {}
        reason = child.describe_end(code)[1]
        if fields.get("user_error"):
            self._failure = UserError(reason)
        else:
            notes = [f"{num_deaths} deaths in a row"] if num_deaths > 1 else []
            notes += [f"log: {child.spec.log_file}"] if child.spec.log_file else []
            details = f" ({'; '.join(notes)})" if notes else ""
            trace = f"\n{fields['traceback']}" if "traceback" in fields else ""
            self._failure = RunFailed(f"the {child.spec.name} process failed: {reason}{details}{trace}")
        self._stop_all()

    def _stop_all(self) -> None:
        """In order (the trainer first), each with its time to leave."""
        self._ending = True
        for place in self._places.values():
            place.due_at = None
        leave_by = time.monotonic() + STOP_S
        self._stop("train", leave_by - CAPTURE_STOP_S)
        self._stop("capture", leave_by)

    def _stop(self, role: str, leave_by: float) -> None:
        leaving = list(self._running(role))
        for child in leaving:
            child.ask_to_stop()
        for child in leaving:
            child.wait_or_kill(leave_by - time.monotonic())

    def _running(self, role: str) -> Iterator[Child]:
        for place in self._places.values():
            if place.child is not None and place.spec.role == role:
                yield place.child


def _is_for_good(child: Child) -> bool:
    """Whether no restart can help."""
    report = child.last_report
    if report is None or report.event != "failed":
        return False
    if report.fields.get("user_error"):
        # What was accepted at the first start is no fault of the user's later: memory or a lock that the
        # predecessor holds still.
        return child.incarnation == 1
    return child.spec.role == "train" and report.fields.get("error") not in CURED_BY_RESTART
