"""What every MetadataStore decides, and refuses, in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import Position, Quarantine
from specforge.errors import ConfigError, DataError, InvalidTransition


def check_same_task(same: bool, task: PromptTask) -> None:
    if not same:
        raise DataError(
            f"prompt {task.index} (sample id {task.sample_id!r}) differs from the one recorded in this run; "
            "resume with the prompts that the run was started with, or start a new run in an empty directory"
        )


def task_gap(expected: int, task: PromptTask) -> DataError:
    return DataError(f"expected prompt index {expected}, got {task.index} (sample id {task.sample_id!r})")


def check_order_key(bound: str | None, order_key: str) -> None:
    if bound not in {None, order_key}:
        raise ConfigError(
            f"this run was started with the sample order ({bound}), got ({order_key}); "
            "resume with the same seed, prompts and data.generate, or start a new run in an empty directory"
        )


def check_step(step: int) -> None:
    if step < 1:
        raise InvalidTransition(f"an ack carries the number of the optimizer step, 1 or more, got {step}")


def unknown_sample(index: int, num_tasks: int) -> InvalidTransition:
    return InvalidTransition(f"sample {index} is not registered; the run has {num_tasks} prompts")


def check_position(num_trained: int, to: Position) -> None:
    """Of a checkpoint in arrival order, against the slots that the ledger knows at its step."""
    if num_trained != to.num_slots:
        raise DataError(
            f"the checkpoint of step {to.step} covers {to.num_slots} slots in arrival order, but the ledger knows "
            f"{num_trained} that were trained by then; resume with the ledger that the run was started with"
        )


class Skips:
    """Which slots the quarantines cover."""

    def __init__(self, quarantines: Iterable[Quarantine]) -> None:
        self._of: dict[int, list[Quarantine]] = {}
        self.last_edge = -1
        """No quarantine begins or ends after this slot."""
        for item in quarantines:
            self._of.setdefault(item.index, []).append(item)
            self.last_edge = max(self.last_edge, item.from_slot, item.to_slot or 0)
        self.num_open = sum(item.to_slot is None for items in self._of.values() for item in items)

    def covers(self, index: int, slot: int) -> bool:
        return any(item.covers(slot) for item in self._of.get(index, ()))


def missing_quarantines(known: Sequence[Quarantine], given: Sequence[Quarantine]) -> list[Quarantine]:
    """What of ``given``, the quarantines of a checkpoint, has to be entered beside the ``known`` ones of the ledger.

    A sample has at most one open quarantine. Where the ledger has one already, an open one of the checkpoint is
    entered up to there, and not at all if it began later.
    """
    entered = {(item.index, item.from_slot) for item in known}
    open_from = {item.index: item.from_slot for item in known if item.to_slot is None}
    missing: list[Quarantine] = []
    for item in sorted(given, key=lambda item: item.from_slot):
        if (item.index, item.from_slot) in entered:
            continue
        entered.add((item.index, item.from_slot))
        if item.to_slot is None and item.index in open_from:
            if item.from_slot > open_from[item.index]:
                continue
            missing.append(replace(item, to_slot=open_from[item.index]))
            continue
        if item.to_slot is None:
            open_from[item.index] = item.from_slot
        missing.append(item)
    return missing
