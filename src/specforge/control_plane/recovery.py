"""What a restarted run takes up again: the ledger is reconciled with the checkpoint, then with what is still there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from specforge.control_plane.base import Features, Retention, owner_among
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
class Remains:
    """Where features may still be: the store, and what was put aside for later epochs."""

    features: Features
    retention: Retention | None = None

    def of(self, in_flight: Sequence[LiveAttempt]) -> tuple[set[Attempt], set[Attempt]]:
        """The attempts whose features can be read, and those of them that were put aside."""
        committed = [(item.attempt, item.ref) for item in in_flight if item.ref is not None]
        refs = [ref for _, ref in committed]
        readable = self.features.live(refs)
        retained = self.retention.retained(refs) if self.retention is not None else [False] * len(refs)
        return (
            {attempt for (attempt, _), is_live in zip(committed, readable, strict=True) if is_live},
            {attempt for (attempt, _), is_kept in zip(committed, retained, strict=True) if is_kept},
        )


@dataclass(frozen=True, slots=True)
class Recovered:
    """Where the run stands: its first slot that is not done, slots trained beyond it (arrival order), quarantines, what
    stays in flight, what was put aside for later epochs, the (sample_id, generation) pairs that nothing wants, and the
    leases that were charged with the death of their worker.
    """

    first_slot: int
    trained: list[int]
    quarantines: list[Quarantine]
    kept: list[LiveAttempt]
    retained: list[LiveAttempt]
    unwanted: list[tuple[str, int]]
    crashed: list[LiveAttempt]


def reconcile(
    store: MetadataStore,
    remains: Remains,
    order: SampleOrder,
    checkpointed: Checkpointed,
    window_slots: int,
    live_workers: Collection[str],
    crashed_workers: Collection[str] = (),
) -> Recovered:
    """Bring the ledger to ``checkpointed``.

    Leases of ``crashed_workers`` (and of their parts) count as crashes of their samples, wherever their slots are.
    Leases of ``live_workers`` stay, and committed features that can be read and that the next slots want, or that were
    put aside and that any slot wants. The rest of what was in flight is void: its samples are captured again when
    their slots come.
    """
    position = checkpointed.position

    def rewind() -> tuple[int, list[int], list[Quarantine], list[LiveAttempt]]:
        store.rewind(position, order.index_at, checkpointed.quarantines())
        first = position.num_slots if position.prefix else store.first_untrained(order.index_at)
        trained = [] if position.prefix else store.trained_from(first)
        return first, trained, store.quarantines(), store.in_flight()

    first, trained, quarantines, in_flight = store.transact(rewind)
    readable, put_aside = remains.of(in_flight)
    # What was committed may be wanted by slots beyond the window: with release = at_checkpoint it stays that long.
    slots = _slots_to_come(order, first, {*trained}, quarantines)
    soon = {order.index_at(slot) for slot in islice(slots, window_slots)}
    later = {order.index_at(slot) for slot in islice(slots, len(readable - put_aside))}
    ever = soon | later | _wanted({attempt.sample for attempt in put_aside} - soon - later, order, slots)
    kept: list[LiveAttempt] = []
    retained: list[LiveAttempt] = []
    crashed: list[LiveAttempt] = []
    void: list[Attempt] = []
    gone: list[Attempt] = []
    unwanted: list[Attempt] = []
    pairs: list[tuple[str, int]] = []
    for item in in_flight:
        if item.ref is None:
            worker_id = item.worker_id or ""
            if owner_among(worker_id, crashed_workers) is not None:
                crashed.append(item)
            elif item.attempt.sample in soon and owner_among(worker_id, live_workers) is not None:
                kept.append(item)
            else:
                void.append(item.attempt)
        elif item.attempt not in readable:
            gone.append(item.attempt)
        elif item.attempt in put_aside and item.attempt.sample in ever:
            retained.append(item)
        elif item.attempt.sample in soon or item.attempt.sample in later:
            kept.append(item)
        else:
            unwanted.append(item.attempt)
            pairs.append((item.ref.sample_id, item.ref.generation))

    def settle() -> None:
        store.crash([item.attempt for item in crashed])
        store.requeue(void)
        store.lose(gone)
        store.release(unwanted)

    store.transact(settle)
    return Recovered(first, trained, quarantines, kept, retained, pairs, crashed)


def _wanted(samples: set[int], order: SampleOrder, slots: Iterator[int]) -> set[int]:
    """Those of ``samples`` that one of ``slots`` trains."""
    missing, wanted = set(samples), set[int]()
    while missing and (slot := next(slots, None)) is not None:
        index = order.index_at(slot)
        if index in missing:
            missing.discard(index)
            wanted.add(index)
    return wanted


def _slots_to_come(
    order: SampleOrder, first_slot: int, trained: set[int], quarantines: Sequence[Quarantine]
) -> Iterator[int]:
    skips = Skips(quarantines)
    for slot in range(first_slot, order.total):
        if slot not in trained and not skips.covers(order.index_at(slot), slot):
            yield slot
