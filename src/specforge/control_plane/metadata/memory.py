"""InMemoryMetadataStore: the whole ledger in dictionaries, for one process and its life time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import (
    Attempt,
    Dispatch,
    LedgerCounts,
    LiveAttempt,
    Position,
    Quarantine,
    SampleRecord,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.checks import (
    Skips,
    check_order_key,
    check_position,
    check_same_task,
    check_step,
    missing_quarantines,
    task_gap,
    unknown_sample,
)
from specforge.errors import DataError, InvalidTransition

ResultT = TypeVar("ResultT")

_LEASABLE = (SampleState.PENDING, SampleState.RELEASED)
_LIVE = (SampleState.LEASED, SampleState.COMMITTED)


@dataclass(slots=True)
class SampleRow:
    """One sample as the in-memory stores keep it."""

    state: SampleState = SampleState.PENDING
    generation: int = 0
    num_failures: int = 0
    num_crashes: int = 0
    worker_id: str | None = None
    ref: SampleRef | None = None
    reason: str | None = None

    def rest(self, state: SampleState) -> None:
        """No attempt is live from here on."""
        self.state, self.worker_id, self.ref = state, None, None


@dataclass(slots=True)
class SlotRow:
    """A slot that was dispatched; ``step`` from its ack on."""

    index: int
    step: int | None = None


class InMemoryMetadataStore:
    """Keeps everything, durably nothing."""

    durable = False
    keeps_history = True

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tasks: list[PromptTask] = []
        self._index_of: dict[str, int] = {}
        self._samples: dict[int, SampleRow] = {}
        self._slots: dict[int, SlotRow] = {}
        self._quarantines: dict[tuple[int, int], Quarantine] = {}
        """By sample and first slot."""
        self._responses: dict[int, tuple[int, ...]] = {}
        self._order_key: str | None = None
        self._durable_step = 0

    def transact(self, work: Callable[[], ResultT]) -> ResultT:
        """See ``MetadataStore``. Each call is all or nothing, ``work`` as a whole is not."""
        with self._lock:
            return work()

    # The run

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
        return itertools.islice(self._tasks, len(self._tasks))

    def tasks_at(self, indices: Sequence[int]) -> list[PromptTask]:
        with self._lock:
            for index in indices:
                self._check_known(index)
            return [self._tasks[index] for index in indices]

    def find(self, sample_id: str) -> int | None:
        return self._index_of.get(sample_id)

    # Responses

    def record(self, index: int, response: Sequence[int]) -> tuple[int, ...]:
        with self._lock:
            self._check_known(index)
            return self._responses.setdefault(index, tuple(response))

    def responses_at(self, indices: Sequence[int]) -> dict[int, tuple[int, ...]]:
        with self._lock:
            return {index: self._responses[index] for index in indices if index in self._responses}

    def response_lengths(self) -> Iterator[tuple[int, int]]:
        with self._lock:
            return iter([(index, len(response)) for index, response in sorted(self._responses.items())])

    # Samples

    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:
        with self._lock:
            if len(set(indices)) != len(indices):
                raise InvalidTransition(f"a sample is leased twice in one call: {list(indices)}")
            samples = [self._in_state(index, *_LEASABLE) for index in indices]
            for sample in samples:
                sample.state, sample.worker_id = SampleState.LEASED, worker_id
                sample.generation += 1
            return [sample.generation for sample in samples]

    def requeue(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            for sample in self._attempts(attempts, SampleState.LEASED):
                sample.rest(SampleState.PENDING)

    def crash(self, attempts: Sequence[Attempt]) -> list[int]:
        with self._lock:
            samples = self._attempts(attempts, SampleState.LEASED)
            for sample in samples:
                sample.rest(SampleState.PENDING)
                sample.num_crashes += 1
            return [sample.num_crashes for sample in samples]

    def crashed(self, at_least: int) -> dict[int, int]:
        with self._lock:
            return {
                index: sample.num_crashes
                for index, sample in self._samples.items()
                if sample.num_crashes >= at_least and sample.state is not SampleState.QUARANTINED
            }

    def acquit(self, indices: Sequence[int]) -> None:
        with self._lock:
            for index in indices:
                self._sample(index).num_crashes = 0

    def commit(self, refs: Sequence[tuple[int, SampleRef]]) -> list[bool]:
        with self._lock:
            samples = [(self._sample(index), ref) for index, ref in refs]
            return [self._commit(sample, ref) for sample, ref in samples]

    def _commit(self, sample: SampleRow, ref: SampleRef) -> bool:
        if sample.generation != ref.generation:
            return False
        if sample.state is SampleState.LEASED:
            sample.state, sample.worker_id, sample.ref = SampleState.COMMITTED, None, ref
            return True
        return sample.state in {SampleState.COMMITTED, SampleState.RELEASED}

    def fail(self, attempt: Attempt, reason: str) -> int:
        with self._lock:
            (sample,) = self._attempts([attempt], SampleState.LEASED)
            sample.rest(SampleState.PENDING)
            sample.reason = reason
            sample.num_failures += 1
            return sample.num_failures

    def quarantine(self, index: int, from_slot: int, reason: str) -> None:
        with self._lock:
            sample = self._in_state(index, SampleState.PENDING)
            sample.state, sample.reason = SampleState.QUARANTINED, reason
            self._quarantines.pop(next(self._open_keys(index), (index, from_slot)), None)
            self._quarantines[index, from_slot] = Quarantine(index, from_slot, None, reason)

    def retry(self, index: int, to_slot: int) -> None:
        with self._lock:
            key = next(self._open_keys(index), None)
            if key is None:
                raise InvalidTransition(f"retry: sample {index} is not quarantined")
            sample = self._in_state(index, SampleState.QUARANTINED, SampleState.PENDING)
            sample.state, sample.num_failures, sample.num_crashes = SampleState.PENDING, 0, 0
            item = self._quarantines[key]
            self._quarantines[key] = replace(item, to_slot=max(item.from_slot, to_slot))

    def _open_keys(self, index: int) -> Iterator[tuple[int, int]]:
        return (key for key, item in self._quarantines.items() if item.index == index and item.to_slot is None)

    def _restore(self, to: Position) -> None:
        """What is set aside only beyond the checkpoint can be captured before that."""
        for item in self._quarantines.values():
            if item.to_slot is None and item.from_slot > (to.num_slots if to.prefix else 0):
                sample = self._sample(item.index)
                if sample.state is SampleState.QUARANTINED:
                    sample.state = SampleState.PENDING

    def quarantines(self) -> list[Quarantine]:
        with self._lock:
            return sorted(self._quarantines.values(), key=lambda item: (item.from_slot, item.index))

    def release(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            for sample in self._attempts(attempts, SampleState.COMMITTED):
                sample.rest(SampleState.RELEASED)

    def lose(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            for sample in self._attempts(attempts, SampleState.COMMITTED):
                sample.rest(SampleState.PENDING)

    def in_flight(self) -> list[LiveAttempt]:
        with self._lock:
            return [
                LiveAttempt(Attempt(index, sample.generation), sample.worker_id, sample.ref)
                for index, sample in sorted(self._samples.items())
                if sample.state in _LIVE
            ]

    # Slots

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

    def rewind(self, to: Position, sample_of: Callable[[int], int], quarantines: Sequence[Quarantine]) -> None:
        with self._lock:
            if not to.prefix:
                steps = [row.step for row in self._slots.values() if row.step is not None]
                check_position(sum(step <= to.step for step in steps), to)
            self._enter(quarantines)
            self._restore(to)
            if to.prefix:
                self._rewind_prefix(to, sample_of)
            else:
                self._slots = {
                    slot: row for slot, row in self._slots.items() if row.step is not None and row.step <= to.step
                }
            self._durable_step = to.step

    def _rewind_prefix(self, to: Position, sample_of: Callable[[int], int]) -> None:
        skips = Skips(self._quarantines.values())
        covered: dict[int, SlotRow] = {}
        for slot in range(to.num_slots):
            known = self._slots.get(slot)
            if known is not None and known.step is not None:
                covered[slot] = SlotRow(known.index, min(known.step, to.step))
            elif not skips.covers(index := sample_of(slot), slot):
                covered[slot] = SlotRow(index, to.step)
        self._slots = covered

    def _enter(self, quarantines: Sequence[Quarantine]) -> None:
        """Those of a checkpoint that are not known here."""
        for item in missing_quarantines(list(self._quarantines.values()), quarantines):
            sample = self._sample(item.index)
            self._quarantines[item.index, item.from_slot] = item
            if item.to_slot is None:
                sample.rest(SampleState.QUARANTINED)
                sample.reason = item.reason

    # Reading

    def sample(self, index: int) -> SampleRecord:
        with self._lock:
            sample = self._sample(index)
            return SampleRecord(
                sample.state, sample.generation, sample.num_failures, sample.num_crashes, sample.ref, sample.reason
            )

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

    def trained_from(self, slot: int) -> list[int]:
        with self._lock:
            return sorted(number for number, row in self._slots.items() if number >= slot and row.step is not None)

    def first_untrained(self, sample_of: Callable[[int], int]) -> int:
        with self._lock:
            trained = set(self.trained_from(0))
            skips = Skips(self._quarantines.values())
            # With every sample quarantined the answer is the first slot of which nothing is said.
            end_of_all = max(skips.last_edge, *trained, -1) + 1
            return next(
                slot
                for slot in itertools.count()
                if (slot >= end_of_all and skips.num_open >= self.num_tasks())
                or (slot not in trained and not skips.covers(sample_of(slot), slot))
            )

    def counts(self) -> LedgerCounts:
        with self._lock:
            trained = {slot: row for slot, row in self._slots.items() if row.step is not None}
            steps = [row.step for row in trained.values() if row.step is not None]
            return LedgerCounts(
                num_samples=self.num_tasks(),
                num_leased=self._count(SampleState.LEASED),
                num_committed=self._count(SampleState.COMMITTED),
                num_quarantined=sum(item.to_slot is None for item in self._quarantines.values()),
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

    def _check_known(self, index: int) -> None:
        if not 0 <= index < self.num_tasks():
            raise unknown_sample(index, self.num_tasks())

    def _sample(self, index: int) -> SampleRow:
        self._check_known(index)
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

    def _attempts(self, attempts: Sequence[Attempt], state: SampleState) -> list[SampleRow]:
        """The samples of ``attempts``, each once, or a refusal."""
        if len(set(attempts)) != len(attempts):
            raise InvalidTransition(f"an attempt is named twice in one call: {list(attempts)}")
        return [self._attempt(attempt, state) for attempt in attempts]
