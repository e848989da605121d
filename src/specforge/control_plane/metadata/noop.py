"""NoOpMetadataStore: keeps what is in flight and nothing else. A run resumes from its checkpoint alone."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import (
    Attempt,
    LedgerCounts,
    Position,
    Quarantine,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.checks import Skips, check_position, task_gap
from specforge.control_plane.metadata.memory import InMemoryMetadataStore, SampleRow
from specforge.errors import ControlPlaneError


class NoOpMetadataStore(InMemoryMetadataStore):
    """Forgets a sample when its features are released and a slot when it is acked.

    Five bytes a sample stay, whatever the length of the run: its last generation, which must never be used twice,
    and whether it was trained; of the slots the ranges that were trained. Samples that failed or crashed are kept,
    and every response.
    ``slot_state`` of a durable slot is TRAINED: which step trained it is forgotten.
    """

    keeps_history = False

    def __init__(self) -> None:
        super().__init__()
        self._generations = array("I")
        self._trained = bytearray()
        self._ranges = SlotRanges()
        self._num_slots_trained = 0
        self._num_slots_durable = 0
        self._last_step = 0
        # Trained since the last checkpoint, one entry a step: optimizer step -> slots.
        self._not_durable: dict[int, int] = {}

    def register(self, tasks: Sequence[PromptTask]) -> None:
        with self._lock:
            expected = self.num_tasks()
            for task in tasks:
                if task.index > expected:
                    raise task_gap(expected, task)
                expected = max(expected, task.index + 1)
            num_new = expected - self.num_tasks()
            self._generations.extend([0] * num_new)
            self._trained.extend(bytes(num_new))

    def num_tasks(self) -> int:
        return len(self._generations)

    def tasks(self) -> Iterator[PromptTask]:
        return iter(())

    def tasks_at(self, indices: Sequence[int]) -> list[PromptTask]:  # noqa: ARG002
        raise ControlPlaneError("a store that keeps no history has no prompts; read them from where they came from")

    def find(self, sample_id: str) -> int | None:  # noqa: ARG002
        return None

    def lease(self, indices: Sequence[int], worker_id: str) -> list[int]:
        with self._lock:
            generations = super().lease(indices, worker_id)
            for index, generation in zip(indices, generations, strict=True):
                self._generations[index] = generation
            return generations

    def release(self, attempts: Sequence[Attempt]) -> None:
        with self._lock:
            super().release(attempts)
            for index in [attempt.sample for attempt in attempts]:
                if self._samples[index].reason is None and not self._samples[index].num_crashes:
                    del self._samples[index]

    def ack(self, slots: Sequence[int], step: int) -> None:
        with self._lock:
            super().ack(slots, step)
            if not slots:
                return
            for slot in slots:
                self._trained[self._slots.pop(slot).index] = 1
                self._ranges.add(slot)
            self._num_slots_trained += len(slots)
            self._last_step = max(self._last_step, step)
            self._not_durable[step] = self._not_durable.get(step, 0) + len(slots)

    def checkpointed(self, step: int) -> None:
        with self._lock:
            super().checkpointed(step)
            for covered in [at for at in self._not_durable if at <= step]:
                self._num_slots_durable += self._not_durable.pop(covered)

    def rewind(self, to: Position, sample_of: Callable[[int], int], quarantines: Sequence[Quarantine]) -> None:
        with self._lock:
            if not to.prefix:
                check_position(0, to)
            self._enter(quarantines)
            self._restore(to)
            self._slots.clear()
            self._not_durable.clear()
            self._trained = bytearray(len(self._trained))
            self._ranges = SlotRanges()
            self._num_slots_trained = 0
            skips = Skips(self._quarantines.values())
            for slot in range(to.num_slots):
                index = sample_of(slot)
                if not skips.covers(index, slot):
                    self._trained[index] = 1
                    self._ranges.add(slot)
                    self._num_slots_trained += 1
            self._num_slots_durable = self._num_slots_trained
            self._last_step = self._durable_step = to.step

    def slot_state(self, slot: int) -> SlotState:
        with self._lock:
            return SlotState.TRAINED if slot in self._ranges else super().slot_state(slot)

    def trained_from(self, slot: int) -> list[int]:
        with self._lock:
            return self._ranges.numbers_from(slot)

    def counts(self) -> LedgerCounts:
        with self._lock:
            return LedgerCounts(
                num_samples=self.num_tasks(),
                num_leased=self._count(SampleState.LEASED),
                num_committed=self._count(SampleState.COMMITTED),
                num_quarantined=sum(item.to_slot is None for item in self._quarantines.values()),
                num_slots_dispatched=len(self._slots),
                num_slots_trained=self._num_slots_trained,
                num_slots_durable=self._num_slots_durable,
                num_unique_samples_trained=sum(self._trained),
                last_step=self._last_step,
                durable_step=self._durable_step,
            )

    def _sample(self, index: int) -> SampleRow:
        if index not in self._samples:
            self._check_known(index)
            # What is forgotten was never leased, or is released.
            generation = self._generations[index]
            state = SampleState.RELEASED if generation else SampleState.PENDING
            self._samples[index] = SampleRow(state, generation)
        return self._samples[index]


class SlotRanges:
    """A set of slot numbers as disjoint ranges ``[start, end)``: few, where slots are trained nearly in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, slot: int) -> None:
        """A slot that is not in there."""
        at = bisect_right(self._starts, slot)
        grows_left = at > 0 and self._ends[at - 1] == slot
        grows_right = at < len(self._starts) and self._starts[at] == slot + 1
        if grows_left and grows_right:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif grows_left:
            self._ends[at - 1] = slot + 1
        elif grows_right:
            self._starts[at] = slot
        else:
            self._starts.insert(at, slot)
            self._ends.insert(at, slot + 1)

    def __contains__(self, slot: int) -> bool:
        at = bisect_right(self._starts, slot)
        return at > 0 and slot < self._ends[at - 1]

    def numbers_from(self, slot: int) -> list[int]:
        """Those that are ``slot`` or higher, ascending."""
        return [
            number
            for start, end in zip(self._starts, self._ends, strict=True)
            for number in range(max(start, slot), end)
        ]
