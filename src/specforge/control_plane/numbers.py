"""Counts of a run, kept up to date so that a summary never asks the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

from specforge.control_plane.metadata.base import LedgerCounts


@dataclass(slots=True)
class RunNumbers:
    """Slots and steps of the whole run; leases, commits, failures and crashes since this process began."""

    num_slots_trained: int = 0
    num_slots_durable: int = 0
    last_step: int = 0
    durable_step: int = 0
    num_leases_given: int = 0
    num_commits: int = 0
    num_late_commits: int = 0
    num_failures: int = 0
    num_crashes: int = 0
    # Trained since the last checkpoint: optimizer step -> slots.
    _not_durable: dict[int, int] = field(default_factory=dict)

    def resume(self, counts: LedgerCounts) -> None:
        """Begin where the reconciled ledger stands."""
        self.num_slots_trained, self.num_slots_durable = counts.num_slots_trained, counts.num_slots_durable
        self.last_step, self.durable_step = counts.last_step, counts.durable_step

    def acked(self, num_slots: int, step: int) -> None:
        if num_slots:
            self.num_slots_trained += num_slots
            self.last_step = max(self.last_step, step)
            self._not_durable[step] = self._not_durable.get(step, 0) + num_slots

    def checkpointed(self, step: int) -> None:
        self.durable_step = max(self.durable_step, step)
        for covered in [at for at in self._not_durable if at <= step]:
            self.num_slots_durable += self._not_durable.pop(covered)

    def to_dict(self) -> dict[str, int]:
        return {
            "num_slots_trained": self.num_slots_trained,
            "num_slots_durable": self.num_slots_durable,
            "last_step": self.last_step,
            "durable_step": self.durable_step,
            "num_leases_given": self.num_leases_given,
            "num_commits": self.num_commits,
            "num_late_commits": self.num_late_commits,
            "num_failures": self.num_failures,
            "num_crashes": self.num_crashes,
        }
