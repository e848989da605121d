"""What a restarted run takes up again: the ledger is reconciled with the checkpoint, then with what is still there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from specforge.control_plane.base import Features
from specforge.control_plane.metadata.base import Attempt, LiveAttempt, MetadataStore, Position, Quarantine
from specforge.control_plane.metadata.checks import Skips
from specforge.control_plane.prompts import SampleOrder
from specforge.errors import DataError


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The checkpoint that a run goes on from. ``state`` is what ``DataFlowController.checkpoint_state`` gave for it."""

    position: Position
    state: Mapping[str, Any] | None

    def quarantines(self) -> list[Quarantine]:
        try:
            return [Quarantine(**item) for item in (self.state or {}).get("quarantines", ())]
        except TypeError as error:
            raise DataError(f"the checkpoint holds quarantines that cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Recovered:
    """Where the run stands: its first slot that is not done, slots trained beyond it (arrival order), quarantines, and
    what stays in flight.
    """

    first_slot: int
    trained: list[int]
    quarantines: list[Quarantine]
    kept: list[LiveAttempt]


def reconcile(
    store: MetadataStore,
    features: Features,
    order: SampleOrder,
    checkpointed: Checkpointed,
    window_slots: int,
    live_workers: Collection[str],
) -> Recovered:
    """Bring the ledger to ``checkpointed``.

    Leases of ``live_workers`` stay, and committed features that can be read and that the next slots want. The rest of
    what was in flight is void: its samples are captured again when their slots come.
    """
    position = checkpointed.position

    def rewind() -> tuple[int, list[int], list[Quarantine], list[LiveAttempt]]:
        store.rewind(position, order.index_at, checkpointed.quarantines())
        first = position.num_slots if position.prefix else store.first_untrained(order.index_at)
        trained = [] if position.prefix else store.trained_from(first)
        return first, trained, store.quarantines(), store.in_flight()

    first, trained, quarantines, in_flight = store.transact(rewind)
    readable = _readable(features, in_flight)
    # What was committed may be wanted by slots beyond the window: with release = at_checkpoint it stays that long.
    slots = _slots_to_come(order, first, {*trained}, quarantines)
    soon = {order.index_at(slot) for slot in islice(slots, window_slots)}
    later = {order.index_at(slot) for slot in islice(slots, len(readable))}
    kept: list[LiveAttempt] = []
    void: list[Attempt] = []
    gone: list[Attempt] = []
    unwanted: list[Attempt] = []
    for item in in_flight:
        if item.ref is None:
            if item.attempt.sample in soon and item.worker_id in live_workers:
                kept.append(item)
            else:
                void.append(item.attempt)
        elif not readable[item.attempt]:
            gone.append(item.attempt)
        elif item.attempt.sample in soon or item.attempt.sample in later:
            kept.append(item)
        else:
            unwanted.append(item.attempt)

    def settle() -> None:
        store.requeue(void)
        store.lose(gone)
        store.release(unwanted)

    store.transact(settle)
    return Recovered(first, trained, quarantines, kept)


def _readable(features: Features, in_flight: Sequence[LiveAttempt]) -> dict[Attempt, bool]:
    committed = [(item.attempt, item.ref) for item in in_flight if item.ref is not None]
    live = features.live([ref for _, ref in committed])
    return {attempt: is_live for (attempt, _), is_live in zip(committed, live, strict=True)}


def _slots_to_come(
    order: SampleOrder, first_slot: int, trained: set[int], quarantines: Sequence[Quarantine]
) -> Iterator[int]:
    skips = Skips(quarantines)
    for slot in range(first_slot, order.total):
        if slot not in trained and not skips.covers(order.index_at(slot), slot):
            yield slot
