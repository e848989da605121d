"""Named points in the life of a sample at which a test may stop, kill or fail the process. Nothing happens unarmed."""

from __future__ import annotations

from collections.abc import Callable

FAULT_POINTS = (
    "worker.leased",
    "worker.recorded",
    "worker.captured",
    "worker.stored",
    "worker.committed",
    "controller.leased",
    "controller.recorded",
    "controller.committed",
    "controller.published",
    "controller.acked",
    "controller.freed",
    "controller.checkpointed",
    "ledger.before_commit",
    "checkpoint.written",
    "checkpoint.renamed",
)

_armed: dict[str, Callable[[], None]] = {}


def fault_point(name: str) -> None:
    """Call what :func:`arm` set for ``name``, if anything."""
    if _armed and name in _armed:
        _armed[name]()


def arm(name: str, action: Callable[[], None]) -> None:
    """For tests: run ``action`` whenever ``name`` is passed in this process."""
    assert name in FAULT_POINTS, name
    _armed[name] = action


def disarm() -> None:
    """For tests: nothing is armed any more."""
    _armed.clear()
