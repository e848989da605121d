"""NoOpMetadataStore: keeps what is in flight and nothing else. A run resumes from its checkpoint alone."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import Attempt, LedgerCounts, SampleState
from specforge.control_plane.metadata.checks import task_gap
from specforge.control_plane.metadata.memory import InMemoryMetadataStore, SampleRow


class NoOpMetadataStore(InMemoryMetadataStore):
    """Forgets a sample when its features are released and a slot when it is acked.

    Five bytes a sample stay, whatever the length of the run: its last generation, which must never be used twice,
    and whether it was trained. ``slot_state`` of a trained slot is OPEN again: there is nothing left to say of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generations = array("I")
        self._trained = bytearray()
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
            for attempt in attempts:
                del self._samples[attempt.sample]

    def ack(self, slots: Sequence[int], step: int) -> None:
        with self._lock:
            super().ack(slots, step)
            if not slots:
                return
            for slot in slots:
                self._trained[self._slots.pop(slot).index] = 1
            self._num_slots_trained += len(slots)
            self._last_step = max(self._last_step, step)
            self._not_durable[step] = self._not_durable.get(step, 0) + len(slots)

    def checkpointed(self, step: int) -> None:
        with self._lock:
            super().checkpointed(step)
            for covered in [at for at in self._not_durable if at <= step]:
                self._num_slots_durable += self._not_durable.pop(covered)

    def rewind(self, num_slots: int, step: int, sample_of: Callable[[int], int]) -> None:
        with self._lock:
            self._slots.clear()
            self._not_durable.clear()
            for index in [i for i, row in self._samples.items() if row.state is not SampleState.QUARANTINED]:
                del self._samples[index]
            self._trained = bytearray(len(self._trained))
            num_skipped = 0
            for slot in range(num_slots):
                index = sample_of(slot)
                if index in self._quarantined and slot >= self._quarantined[index]:
                    num_skipped += 1
                else:
                    self._trained[index] = 1
            self._num_slots_trained = self._num_slots_durable = num_slots - num_skipped
            self._last_step = self._durable_step = step

    def counts(self) -> LedgerCounts:
        with self._lock:
            return LedgerCounts(
                num_samples=self.num_tasks(),
                num_leased=self._count(SampleState.LEASED),
                num_committed=self._count(SampleState.COMMITTED),
                num_quarantined=len(self._quarantined),
                num_slots_dispatched=len(self._slots),
                num_slots_trained=self._num_slots_trained,
                num_slots_durable=self._num_slots_durable,
                num_unique_samples_trained=sum(self._trained),
                last_step=self._last_step,
                durable_step=self._durable_step,
            )

    def _sample(self, index: int) -> SampleRow:
        row = super()._sample(index)
        row.generation = self._generations[index]
        return row
