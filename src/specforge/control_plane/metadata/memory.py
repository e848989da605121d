"""InMemoryMetadataStore: the whole ledger in dictionaries, for one process and its life time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import (
    Attempt,
    Dispatch,
    LedgerCounts,
    SampleRecord,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.checks import (
    check_order_key,
    check_same_task,
    check_step,
    task_gap,
    unknown_sample,
)
from specforge.errors import DataError, InvalidTransition

_LEASABLE = (SampleState.PENDING, SampleState.RELEASED)


@dataclass(slots=True)
class SampleRow:
    """One sample as the in-memory stores keep it."""

    state: SampleState = SampleState.PENDING
    generation: int = 0
    num_failures: int = 0
    ref: SampleRef | None = None
    reason: str | None = None


@dataclass(slots=True)
class SlotRow:
    """A slot that was dispatched; ``step`` from its ack on."""

    index: int
    step: int | None = None


class InMemoryMetadataStore:
    """Keeps everything, durably nothing."""

    durable = False

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tasks: list[PromptTask] = []
        self._index_of: dict[str, int] = {}
        self._samples: dict[int, SampleRow] = {}
        self._slots: dict[int, SlotRow] = {}
        self._quarantined: dict[int, int] = {}
        self._order_key: str | None = None
        self._durable_step = 0

    def register(self, tasks: Sequence[PromptTask]) -> None:
        with self._lock:
            seen: dict[str, int] = {}
            expected = len(self._tasks)
            for task in tasks:
                if task.index < len(self._tasks):
                    check_same_task(self._tasks[task.index] == task, task)
                    continue
                if task.index != expected:
                    raise task_gap(expected, task)
                if task.sample_id in self._index_of or task.sample_id in seen:
                    raise DataError(f"sample id {task.sample_id!r} is used twice; sample ids must be unique in a run")
                seen[task.sample_id] = task.index
                expected += 1
            self._tasks.extend(task for task in tasks if task.index >= len(self._tasks))
            self._index_of.update(seen)

    def bind(self, order_key: str) -> None:
        with self._lock:
            check_order_key(self._order_key, order_key)
            self._order_key = order_key

    def num_tasks(self) -> int:
        return len(self._tasks)

    def tasks(self) -> Iterator[PromptTask]:
        return iter(tuple(self._tasks))

    def find(self, sample_id: str) -> int | None:
        return self._index_of.get(sample_id)

    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:  # noqa: ARG002
        with self._lock:
            if len(set(indices)) != len(indices):
                raise InvalidTransition(f"a sample is leased twice in one call: {list(indices)}")
            samples = [self._in_state(index, *_LEASABLE) for index in indices]
            for sample in samples:
                sample.state, sample.generation = SampleState.LEASED, sample.generation + 1
            return [sample.generation for sample in samples]

    def requeue(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            for sample in [self._attempt(attempt, SampleState.LEASED) for attempt in attempts]:
                sample.state = SampleState.PENDING

    def commit(self, refs: Sequence[tuple[int, SampleRef]]) -> list[bool]:
        with self._lock:
            return [self._commit(self._sample(index), ref) for index, ref in refs]

    def _commit(self, sample: SampleRow, ref: SampleRef) -> bool:
        if sample.generation != ref.generation:
            return False
        if sample.state is SampleState.LEASED:
            sample.state, sample.ref = SampleState.COMMITTED, ref
            return True
        return sample.state in {SampleState.COMMITTED, SampleState.RELEASED}

    def fail(self, attempt: Attempt, reason: str) -> int:
        with self._lock:
            sample = self._attempt(attempt, SampleState.LEASED)
            sample.state, sample.reason = SampleState.PENDING, reason
            sample.num_failures += 1
            return sample.num_failures

    def quarantine(self, index: int, from_slot: int, reason: str) -> None:
        with self._lock:
            sample = self._in_state(index, SampleState.PENDING)
            sample.state, sample.reason = SampleState.QUARANTINED, reason
            self._quarantined[index] = from_slot

    def quarantined(self) -> dict[int, int]:
        with self._lock:
            return dict(self._quarantined)

    def release(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            for sample in [self._attempt(attempt, SampleState.COMMITTED) for attempt in attempts]:
                sample.state, sample.ref = SampleState.RELEASED, None

    def dispatch(self, entries: Sequence[Dispatch]) -> None:
        with self._lock:
            seen: set[int] = set()
            for slot, index, generation in entries:
                if slot in seen or self.slot_state(slot) is not SlotState.OPEN:
                    raise InvalidTransition(f"slot {slot} is already dispatched")
                self._attempt(Attempt(index, generation), SampleState.COMMITTED)
                seen.add(slot)
            self._slots.update((entry.slot, SlotRow(entry.sample)) for entry in entries)

    def ack(self, slots: Sequence[int], step: int) -> None:
        with self._lock:
            check_step(step)
            if len(set(slots)) != len(slots):
                raise InvalidTransition(f"a slot is acked twice in one call: {list(slots)}")
            for slot in slots:
                state = self.slot_state(slot)
                if state is not SlotState.DISPATCHED:
                    raise InvalidTransition(f"slot {slot} is {state}; only a dispatched slot can be acked")
            for slot in slots:
                self._slots[slot].step = step

    def checkpointed(self, step: int) -> None:
        with self._lock:
            self._durable_step = max(self._durable_step, step)

    def rewind(self, num_slots: int, step: int, sample_of: Callable[[int], int]) -> None:
        with self._lock:
            for slot in [slot for slot in self._slots if slot >= num_slots]:
                del self._slots[slot]
            for slot in range(num_slots):
                known = self._slots.get(slot)
                index = sample_of(slot) if known is None else known.index
                if index in self._quarantined and slot >= self._quarantined[index]:
                    continue
                trained_at = None if known is None else known.step
                self._slots[slot] = SlotRow(index, step if trained_at is None else min(trained_at, step))
            for sample in self._samples.values():
                if sample.state in {SampleState.LEASED, SampleState.COMMITTED}:
                    sample.state, sample.ref = SampleState.PENDING, None
            self._durable_step = step

    def sample(self, index: int) -> SampleRecord:
        with self._lock:
            sample = self._sample(index)
            return SampleRecord(sample.state, sample.generation, sample.num_failures, sample.ref, sample.reason)

    def slot_state(self, slot: int) -> SlotState:
        with self._lock:
            if slot not in self._slots:
                return SlotState.OPEN
            step = self._slots[slot].step
            if step is None:
                return SlotState.DISPATCHED
            return SlotState.DURABLE if step <= self._durable_step else SlotState.TRAINED

    def slot_step(self, slot: int) -> int | None:
        with self._lock:
            return self._slots[slot].step if slot in self._slots else None

    def counts(self) -> LedgerCounts:
        with self._lock:
            trained = {slot: row for slot, row in self._slots.items() if row.step is not None}
            steps = [row.step for row in trained.values() if row.step is not None]
            return LedgerCounts(
                num_samples=self.num_tasks(),
                num_leased=self._count(SampleState.LEASED),
                num_committed=self._count(SampleState.COMMITTED),
                num_quarantined=self._count(SampleState.QUARANTINED),
                num_slots_dispatched=len(self._slots) - len(trained),
                num_slots_trained=len(trained),
                num_slots_durable=sum(step <= self._durable_step for step in steps),
                num_unique_samples_trained=len({row.index for row in trained.values()}),
                last_step=max(steps, default=0),
                durable_step=self._durable_step,
            )

    def close(self) -> None:
        """Nothing to let go of."""

    def _count(self, state: SampleState) -> int:
        return sum(sample.state is state for sample in self._samples.values())

    def _sample(self, index: int) -> SampleRow:
        if not 0 <= index < self.num_tasks():
            raise unknown_sample(index, self.num_tasks())
        return self._samples.setdefault(index, SampleRow())

    def _in_state(self, index: int, *states: SampleState) -> SampleRow:
        sample = self._sample(index)
        if sample.state not in states:
            raise InvalidTransition(f"sample {index} is {sample.state}, expected {' or '.join(states)}")
        return sample

    def _attempt(self, attempt: Attempt, state: SampleState) -> SampleRow:
        sample = self._in_state(attempt.sample, state)
        if sample.generation != attempt.generation:
            raise InvalidTransition(
                f"sample {attempt.sample} is at generation {sample.generation}, not {attempt.generation}"
            )
        return sample
