"""The trackers of a run: each behind a monitor that never ends the run, whatever its library does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specforge.errors import UserError
from specforge.monitor.base import Monitor
from specforge.monitor.config import TensorBoardTracker, WandbTracker
from specforge.monitor.naming import Hyperparameter
from specforge.monitor.tensorboard import TensorBoardMonitor
from specforge.monitor.wandb import WandbMonitor

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of the run: its directory, the steps done before (a resumed run), its flat options."""

    run_dir: Path
    first_step: int
    hyperparameters: Mapping[str, Hyperparameter]


def open_trackers(trackers: Sequence[TensorBoardTracker | WandbTracker], run: TrackedRun) -> list[Monitor]:
    """One monitor a tracker. A ``UserError`` (a missing package, no key) is raised, and then none is left open."""
    opened: list[Monitor] = []
    try:
        for tracker in trackers:
            opened.append(UnfailingMonitor(tracker.kind, _opening(tracker, run)))  # noqa: PERF401 - closed below
    except BaseException:
        for monitor in opened:
            monitor.close()
        raise
    return opened


def _opening(tracker: TensorBoardTracker | WandbTracker, run: TrackedRun) -> Callable[[], Monitor]:
    if isinstance(tracker, TensorBoardTracker):
        return lambda: TensorBoardMonitor(run.run_dir / "tensorboard", run.first_step, run.hyperparameters)
    return lambda: WandbMonitor(tracker, run.run_dir, run.first_step, run.hyperparameters)


class UnfailingMonitor:
    """Passes calls on until one fails; then it warns, once, and what comes later goes to the other monitors only.

    A ``UserError`` while ``start`` opens the monitor is raised: training has not begun, and the user can fix it.
    """

    def __init__(self, name: str, start: Callable[[], Monitor]) -> None:
        self._name = name
        self._monitor: Monitor | None = None
        try:
            self._monitor = start()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a library's and a disk's errors are of any kind
            self._warn("started", error)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._pass_on(lambda monitor: monitor.log(step, scalars))

    def event(self, name: str, **fields: str | float | bool | None) -> None:
        self._pass_on(lambda monitor: monitor.event(name, **fields))

    def close(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            self._try_to_close(monitor, warn=True)

    def _pass_on(self, call: Callable[[Monitor], None]) -> None:
        monitor = self._monitor
        if monitor is None:
            return
        try:
            call(monitor)
        except Exception as error:  # noqa: BLE001 - a library's and a disk's errors are of any kind
            self._monitor = None
            self._warn("written to", error)
            self._try_to_close(monitor, warn=False)

    def _try_to_close(self, monitor: Monitor, warn: bool) -> None:
        try:
            monitor.close()
        except Exception as error:  # noqa: BLE001 - a library's and a disk's errors are of any kind
            if warn:
                self._warn("closed", error)

    def _warn(self, what: str, error: Exception) -> None:
        _LOG.warning(
            "The tracker %s could not be %s (%s: %s); the run goes on without it, metrics.jsonl has everything. "
            "A resumed run tries it again.",
            self._name,
            what,
            type(error).__name__,
            error,
        )
