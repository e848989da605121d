"""The supervisor: runs a plan's processes as children on this host, and starts again those that died.

One loop over one queue; the waits before a restart are timeouts of that queue. What ends a child that nobody told to
stop, and what follows:

    trainer, in order (``finished``, ``stopped``)     the run has ended: the others are told to stop
    ``failed``, the user's fault, at the first start  the run fails with that sentence
    trainer, ``failed``                               the run fails with its message and traceback
    trainer, ``failed`` with lost features            started again: it goes on from its checkpoint
    capture process, ``failed`` or told to stop       started again, within the limit of deaths in a row
    killed, or gone without a word                    started again, within the limit

The trainer may be a group of ranks, of which the first leads. They live and die together: where one would be started
again, all are killed and start again from the last checkpoint, within one limit. A rank that says no more than that it
lost another one is asked about after a moment, in which the other's own end may be heard. The row of their deaths ends
only with a newer checkpoint. What a rank that died without a word was capturing is charged with its death, as in a
capture process: the leader of the next start is told.

Children run in sessions of their own, so a Ctrl-C reaches the parent alone, which ends them in order: the trainer
first (it writes a checkpoint), then the capture processes. What a child says after it was told to stop is no failure.
"""

from __future__ import annotations

import logging
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specforge.config.launch import RestartOptions
from specforge.errors import FeatureNotFound, ProducerFailed, RunFailed, UserError
from specforge.launch.child import MAX_REASON_CHARS, Child, ChildSpec, Exit, Line
from specforge.launch.endpoint import Endpoint
from specforge.launch.group import worker_name
from specforge.launch.restarts import Restarts
from specforge.training.ranks import FILE

_LOG = logging.getLogger(__name__)

ROLES = (sys.executable, "-m", "specforge.launch.roles")
"""The command of a child, before its arguments."""
STOP_S = 9.0
"""How long all children together may take to leave before they are killed; 10 s with the end of this process."""
CAPTURE_STOP_S = 2.0
"""The part of it that is left for the capture processes, which leave after the trainer."""
VERDICT_S = 2.0
"""How long the cause is waited for when a train rank says that it lost another one."""
CURED_BY_RESTART = frozenset({FeatureNotFound.__name__})
"""Reported errors of a trainer that a restart repairs: features that are gone are captured again."""
TOLD_BY_THE_LEADER = frozenset({ProducerFailed.__name__})
"""Reported errors of a rank that its leader passed on, which is about to report them itself."""


@dataclass(frozen=True, slots=True)
class ChildStarted:
    """For observers: a child was started. ``id`` is ``<name>.<incarnation>``."""

    name: str
    id: str
    pid: int


@dataclass(frozen=True, slots=True)
class ChildDied:
    """For observers: a child died and is started again after ``delay_s``; ``num_deaths`` counts those in a row.

    ``num_peers``: how many others, not dead themselves, are started again with it.
    """

    name: str
    id: str
    what: str
    delay_s: float
    num_deaths: int
    num_peers: int = 0

    def __str__(self) -> str:
        again = f"all {self.num_peers + 1} train ranks" if self.num_peers else "it"
        return f"{self.name} {self.what}; starting {again} again in {self.delay_s:g} s (restart {self.num_deaths})"


def log_deaths(happened: ChildStarted | ChildDied) -> None:
    """One line a restart, as a warning."""
    if isinstance(happened, ChildDied):
        _LOG.warning("%s", happened)


@dataclass(slots=True, eq=False)
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

    ``command`` starts a child, ``observe`` hears of every start and death from the thread of :meth:`run`. ``last_step``
    is that of the newest checkpoint (0: none): a trainer that never gets beyond it dies in one row.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        restarts: RestartOptions,
        command: Sequence[str] = ROLES,
        observe: Callable[[ChildStarted | ChildDied], None] = log_deaths,
        last_step: Callable[[], int] | None = None,
    ) -> None:
        self._endpoint, self._options, self._last_step = endpoint, restarts, last_step
        self._command, self._observe = command, observe
        self._places: dict[str, _Place] = {}
        self._ranks: list[_Place] = []
        self._meetings = Path()
        # A signal handler may put at any moment: SimpleQueue allows it inside its own get.
        self._events: queue.SimpleQueue[tuple[Child, Line | Exit] | RunFailed | Literal["stop"]] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._results: dict[str, dict[str, Any]] = {}
        self._ending = self._is_finished = self._is_stop_requested = False
        self._is_serving = self._has_served = False
        # Whether a lease may have been given since the train ranks started, and worker -> end of the one that died
        # with leases that no leader has charged yet.
        self._may_hold_leases = False
        self._crashed: dict[str, str] = {}
        self._bereft: tuple[Child, int] | None = None
        self._verdict_at = 0.0

    def run(self, specs: Sequence[ChildSpec]) -> dict[str, dict[str, Any]]:
        """Start every child (the first trainer among them leads the others), start again those that die, until the
        trainer is done.

        Returns the fields of the last report of each child. Raises :class:`RunFailed` (or the child's own
        :class:`UserError`) when a child failed for good, ``KeyboardInterrupt`` after :meth:`request_stop`.
        """
        together = Restarts(self._options, reached=self._last_step)
        self._places = {
            spec.name: _Place(spec, together if spec.role == "train" else Restarts(self._options)) for spec in specs
        }
        self._ranks = [place for place in self._places.values() if place.spec.role == "train"]
        with tempfile.TemporaryDirectory(prefix="specforge-") as meetings:
            self._meetings = Path(meetings)
            try:
                self._start_ranks()
                for place in self._places.values():
                    if place.spec.role != "train":
                        self._start(place)
                while self._bereft is not None or not all(place.is_vacant for place in self._places.values()):
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
        due = [place.due_at for place in self._places.values() if place.due_at is not None]
        due += [self._verdict_at] if self._bereft is not None else []
        timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            self._act_when_due()
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

    def _act_when_due(self) -> None:
        now = time.monotonic()
        if self._bereft is not None and self._verdict_at <= now:
            self._ranks_died(*self._bereft)
        due = [place for place in self._places.values() if place.due_at is not None and place.due_at <= now]
        if any(place in self._ranks for place in due):
            self._start_ranks()
        for place in due:
            if place not in self._ranks:
                self._start(place)

    def _start_ranks(self) -> None:
        """All train ranks, which meet at a file that nobody met at before."""
        self._may_hold_leases = False
        for place in self._ranks:
            self._start(place)
        # Before a train process of this run served, leases in the ledger are those of an earlier run, whose workers had
        # the same names.
        workers = [worker.id for worker in self._running("capture")] if self._has_served else []
        meeting = f"{FILE}{self._meetings / str(self._ranks[0].num_starts)}"
        for rank, place in enumerate(self._ranks):
            assert place.child is not None
            group = {"rank": rank, "size": len(self._ranks), "init_method": meeting}
            place.child.tell("start", token=self._endpoint.token, workers=workers, group=group, crashed=self._crashed)

    def _start(self, place: _Place) -> None:
        spec, listener = place.spec, self._endpoint.listener.fileno()
        is_train = spec.role == "train"
        place.due_at = None
        place.num_starts += 1
        arguments = [spec.role, str(spec.config_file), "--name", spec.name]
        leads = place is self._ranks[0]
        arguments += ["--listen-fd", str(listener)] if leads else []
        arguments += [] if is_train else ["--worker-id", f"{spec.name}.{place.num_starts}"]
        arguments += ["--resume"] if spec.resume or (is_train and place.num_starts > 1) else []
        place.child = child = Child(
            spec,
            place.num_starts,
            [*self._command, *arguments],
            [listener] if leads else [],
            lambda child, event: self._events.put((child, event)),
        )
        place.restarts.started()
        self._observe(ChildStarted(spec.name, child.id, child.pid))
        if not is_train and self._is_serving:
            child.tell("endpoint", url=self._endpoint.url, token=self._endpoint.token)

    def _serving(self) -> None:
        self._is_serving = self._has_served = self._may_hold_leases = True
        self._crashed = {}
        for child in self._running("capture"):
            child.tell("endpoint", url=self._endpoint.url, token=self._endpoint.token)

    # Ends

    def _exited(self, place: _Place, child: Child, code: int) -> None:
        if place.child is not child:
            return  # killed, because it was to be started again with the other ranks
        place.child = None
        child.close()
        report = child.last_report
        self._results[place.spec.name] = report.fields if report is not None else {}
        if place is self._ranks[0]:
            self._is_serving = False
            self._is_finished = report is not None and report.event == "finished"
        if self._ending:
            return
        if place in self._ranks:
            self._rank_exited(place, child, code)
            return
        reason = None if child.stopped_in_order(code) else child.describe_end(code)[1][:MAX_REASON_CHARS]
        for train in self._running("train"):
            train.tell("lost", worker=child.id, reason=reason)
        if _is_for_good(child):
            self._fail(child, code, num_deaths=1)
        else:
            self._died(place, child, code)

    def _rank_exited(self, place: _Place, child: Child, code: int) -> None:
        report, leads = child.last_report, place is self._ranks[0]
        failed_with = report.fields.get("error") if report is not None and report.event == "failed" else None
        if child.stopped_in_order(code) or (report is not None and report.event == "finished"):
            if leads:
                self._stop_all()  # else the leader, which is about to end too, says how the run ended
        elif not leads and failed_with in TOLD_BY_THE_LEADER:
            pass
        elif len(self._ranks) > 1 and report is not None and report.fields.get("lost_peer"):
            if self._bereft is None:
                self._bereft, self._verdict_at = (child, code), time.monotonic() + VERDICT_S
        elif _is_for_good(child):
            self._fail(child, code, num_deaths=1)
        else:
            self._ranks_died(child, code)

    def _ranks_died(self, child: Child, code: int) -> None:
        """The rank ``child`` is gone, and with it all others."""
        self._bereft = None
        place = self._places[child.spec.name]
        if self._may_hold_leases:
            spoke = child.last_report is not None and child.last_report.event == "failed"
            reason = child.describe_end(code)[1][:MAX_REASON_CHARS]
            self._crashed = {} if spoke else {worker_name(self._ranks.index(place)): reason}
        for rank in self._ranks:
            if rank.child is not None:
                rank.child.kill()
                rank.child = None
        self._is_serving = False
        self._died(place, child, code, num_peers=len(self._ranks) - 1)

    def _died(self, place: _Place, child: Child, code: int, num_peers: int = 0) -> None:
        delay_s = place.restarts.died()
        if delay_s is None:
            self._fail(child, code, place.restarts.num_deaths)
            return
        for waiting in self._ranks if place in self._ranks else [place]:
            waiting.due_at = time.monotonic() + delay_s
        what = " ".join(child.describe_end(code)).strip()
        self._observe(ChildDied(place.spec.name, child.id, what, delay_s, place.restarts.num_deaths, num_peers))

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
        if child.spec.role == "train":
            # what the other ranks wait for will never come: the last checkpoint is what there is
            for rank in list(self._running("train")):
                rank.kill()
        self._stop_all()

    def _stop_all(self) -> None:
        """In order (the trainer first), each with its time to leave."""
        self._ending = True
        self._bereft = None
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
