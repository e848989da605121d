"""What the controller keeps in memory: the window of open slots and the samples captured for it.

Pure bookkeeping (no clock, no I/O, no lock): the ledger is asked first, this follows. Its size is that of the window,
never that of the run. Methods that only look are pure, so that a transaction may use them before it is certain.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from specforge.contracts.refs import SampleRef
from specforge.control_plane.backpressure import BackPressure, Credits
from specforge.control_plane.base import owner_among
from specforge.control_plane.metadata.base import Attempt, LiveAttempt, Quarantine
from specforge.control_plane.prompts import SampleOrder

SUSPECT_AFTER = 2
"""A sample that was held by this many workers that died is leased alone."""


@dataclass(slots=True)
class InFlight:
    """A sample that is leased (``ref`` is None) or whose features are live. ``num_bytes`` is an estimate until commit.

    ``deadline`` is in seconds of the controller's clock. ``is_adopted``: leased by an earlier controller of the run.
    ``last_slot``: the last slot that they were trained in.
    """

    index: int
    sample_id: str
    generation: int
    worker_id: str
    deadline: float
    num_bytes: int
    ref: SampleRef | None = None
    is_adopted: bool = False
    last_slot: int | None = None

    @classmethod
    def adopted(cls, item: LiveAttempt, sample_id: str, deadline: float, estimated_bytes: int) -> InFlight:
        """What the ledger says was in flight."""
        num_bytes = estimated_bytes if item.ref is None else item.ref.num_bytes
        worker_id = item.worker_id or ""
        index, generation = item.attempt
        return cls(index, sample_id, generation, worker_id, deadline, num_bytes, item.ref, item.ref is None)

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.index, self.generation)


class CaptureWindow:
    """The open slots of ``[first_open, end)`` may be captured: ``window_slots`` of them, what is acked or skipped not
    counted. In strict order those below ``next_dispatch`` have been given to the trainer; in arrival order any.
    """

    def __init__(
        self, order: SampleOrder, limits: Credits, estimate_bytes: Callable[[int], int], *, in_order: bool = True
    ) -> None:
        self._order = order
        self._limits = limits
        self._pressure = BackPressure(limits)
        self._estimate_bytes = estimate_bytes
        self._in_order = in_order
        self.in_flight: dict[int, InFlight] = {}
        self.leases: dict[int, InFlight] = {}
        self.crashes: dict[int, int] = {}
        self.waiting: dict[int, int] = {}
        self.stowed: dict[int, InFlight] = {}
        self.resident_bytes = 0
        self.first_open = self.next_dispatch = self.end = 0
        self._quarantines: dict[int, list[Quarantine]] = {}
        self._index_of: dict[str, int] = {}
        self._open_slots: dict[int, list[int]] = {}
        self._num_open = 0
        self._dispatched: set[int] = set()
        self._acked: set[int] = set()
        self._to_capture: list[tuple[int, int]] = []

    def start(
        self,
        first_slot: int,
        trained: Iterable[int],
        quarantines: Iterable[Quarantine],
        adopted: Iterable[InFlight],
        stowed: Iterable[InFlight] = (),
    ) -> None:
        """Begin at ``first_slot``; ``trained`` are slots beyond it, ``adopted`` what is leased or captured already,
        ``stowed`` what was put aside for later epochs.
        """
        for quarantine in quarantines:
            self._quarantines.setdefault(quarantine.index, []).append(quarantine)
        for sample in adopted:
            self._enter(sample)
        for sample in stowed:
            sample.num_bytes = 0
            self.stowed[sample.index] = sample
            self._index_of[sample.sample_id] = sample.index
        self._acked = set(trained)
        self._dispatched = set(self._acked)
        self.first_open = self.next_dispatch = self.end = first_slot
        self.advance()

    def find(self, sample_id: str) -> int | None:
        return self._index_of.get(sample_id)

    @property
    def num_quarantined(self) -> int:
        """Samples that are quarantined now."""
        return sum(ranges[-1].to_slot is None for ranges in self._quarantines.values())

    @property
    def all_dispatched(self) -> bool:
        return self.next_dispatch == self._order.total

    @property
    def num_captured_ahead(self) -> int:
        """Slots that were given to the trainer and are not acked."""
        return len(self._dispatched) - len(self._acked)

    def leased_by(self, worker_id: str) -> list[InFlight]:
        """The leases of a worker and of its parts."""
        return [sample for sample in self.leases.values() if owner_among(sample.worker_id, (worker_id,)) is not None]

    # Leases

    def take(self, max_samples: int, *, idle: bool) -> list[tuple[int, int]]:
        """Up to ``max_samples`` (prompt index, estimated bytes) in slot order, as far as the credits reach.

        A suspect is given alone, and only to a worker that is ``idle``.
        """
        taken: list[tuple[int, int]] = []
        passed: list[tuple[int, int]] = []
        bytes_taken = 0
        num_in_flight = sum(index in self._open_slots for index in self.in_flight)
        step_end = self._step_end()
        self._pressure.grants(False, num_in_flight, self.resident_bytes, 0)
        while self._to_capture and len(taken) < max_samples:
            slot, index = self._to_capture[0]
            estimate = self._estimate_bytes(index)
            resident = self.resident_bytes + bytes_taken
            if not self._pressure.grants(slot < step_end, num_in_flight + len(taken), resident, estimate):
                break
            entry = heapq.heappop(self._to_capture)
            if self.is_suspect(index):
                if not idle or taken:
                    passed.append(entry)
                    continue
                taken.append((index, estimate))
                break
            taken.append((index, estimate))
            bytes_taken += estimate
        for entry in passed:
            heapq.heappush(self._to_capture, entry)
        return taken

    def is_suspect(self, index: int) -> bool:
        return self.crashes.get(index, 0) >= SUSPECT_AFTER

    def give_back(self, index: int) -> None:
        """A taken, expired or failed sample waits for its capture again."""
        sample = self.in_flight.get(index)
        if sample is not None:
            self.retire(sample)
            self.freed(sample)
        if index in self._open_slots:
            heapq.heappush(self._to_capture, (self._open_slots[index][0], index))

    def lease(self, sample: InFlight) -> None:
        self._enter(sample)

    def commit(self, index: int, ref: SampleRef) -> None:
        sample = self.leases.pop(index)
        self.resident_bytes += ref.num_bytes - sample.num_bytes
        sample.num_bytes, sample.ref = ref.num_bytes, ref

    def retire(self, sample: InFlight) -> None:
        """Its features are about to be freed: nothing finds them any longer, their bytes are still resident."""
        if self.stowed.pop(sample.index, None) is None:
            del self.in_flight[sample.index]
        del self._index_of[sample.sample_id]
        self.leases.pop(sample.index, None)
        self.waiting.pop(sample.index, None)

    def freed(self, sample: InFlight) -> None:
        self.resident_bytes -= sample.num_bytes

    # Slots

    def dispatchable(self, committed: Mapping[int, SampleRef]) -> list[tuple[int, InFlight, SampleRef]]:
        """What the trainer may be given next, in slot order, once ``committed`` (index -> ref) are entered.

        In strict order up to the first slot whose features are not there, in arrival order all that are.
        """
        ready: list[tuple[int, InFlight, SampleRef]] = []
        for slot in range(self.next_dispatch, self.end):
            if slot in self._dispatched:
                continue
            index = self._order.index_at(slot)
            if self._skips(slot, index):
                continue
            sample = self.in_flight.get(index)
            ref = None if sample is None else sample.ref or committed.get(index)
            if sample is None or ref is None:
                if self._in_order:
                    break
                continue
            ready.append((slot, sample, ref))
        return ready

    def dispatched(self, slots: Iterable[int]) -> None:
        self._dispatched.update(slots)
        while self.next_dispatch < self.end and (
            self.next_dispatch in self._dispatched or self._skips_slot(self.next_dispatch)
        ):
            self.next_dispatch += 1

    def is_trained(self, slot: int) -> bool:
        """Acked, or passed for good."""
        return slot < self.first_open or slot in self._acked

    def unneeded(self, slots: Collection[int]) -> list[InFlight]:
        """The samples whose features no open slot needs any longer once ``slots`` are acked."""
        done = set(slots)
        indices = {self._order.index_at(slot): None for slot in slots}
        return [
            self.in_flight[index]
            for index in indices
            if index in self.in_flight and done.issuperset(self._open_slots.get(index, ()))
        ]

    def ack(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._acked.add(slot)
            index = self._order.index_at(slot)
            if index in self.in_flight:
                self.in_flight[index].last_slot = slot
            still_open = self._open_slots[index]
            still_open.remove(slot)
            self._num_open -= 1
            if not still_open:
                del self._open_slots[index]

    def hold(self, samples: Iterable[InFlight], step: int) -> None:
        """Keep features that no open slot needs until a checkpoint of ``step`` or later."""
        self.waiting.update((sample.index, step) for sample in samples)

    def covered(self, step: int) -> list[InFlight]:
        """What was held for a checkpoint of at most ``step``."""
        return [self.in_flight[index] for index, since in self.waiting.items() if since <= step]

    def stow(self, sample: InFlight) -> None:
        """Its features were put aside: they use up no credit until a slot of theirs opens, and no bytes from now on."""
        self.resident_bytes -= sample.num_bytes
        sample.num_bytes = 0
        if sample.index not in self._open_slots:
            del self.in_flight[sample.index]
            self.waiting.pop(sample.index, None)
            self.stowed[sample.index] = sample

    def advance(self) -> None:
        """Move the window past what is done, and open the slots that it newly covers."""
        while True:
            while self.first_open < self.end and (self.first_open in self._acked or self._skips_slot(self.first_open)):
                self._acked.discard(self.first_open)
                self._dispatched.discard(self.first_open)
                self.first_open += 1
            # Skipped slots have no entry in ``_dispatched``: what is behind the window is behind the next dispatch too.
            self.next_dispatch = max(self.next_dispatch, self.first_open)
            if self._num_open >= self._limits.window_slots or self.end == self._order.total:
                break
            self._open(self.end)
            self.end += 1
        self.dispatched(())

    def quarantine(self, quarantine: Quarantine) -> None:
        """Skip the slots of a sample that waits for its capture."""
        index = quarantine.index
        self._quarantines.setdefault(index, []).append(quarantine)
        self.crashes.pop(index, None)
        self._num_open -= len(self._open_slots.pop(index, ()))
        self._to_capture = [entry for entry in self._to_capture if entry[1] != index]
        heapq.heapify(self._to_capture)
        self.advance()

    def first_slot_of(self, index: int) -> int:
        """The first open slot of a sample; the end of the run where none is open."""
        return self._open_slots.get(index, [self._order.total])[0]

    def has_open_slot(self, index: int) -> bool:
        return index in self._open_slots

    def _enter(self, sample: InFlight) -> None:
        self.in_flight[sample.index] = sample
        self._index_of[sample.sample_id] = sample.index
        self.resident_bytes += sample.num_bytes
        if sample.ref is None:
            self.leases[sample.index] = sample

    def _open(self, slot: int) -> None:
        index = self._order.index_at(slot)
        if slot in self._acked or self._skips(slot, index):
            return
        self._open_slots.setdefault(index, []).append(slot)
        self._num_open += 1
        self.waiting.pop(index, None)
        if index in self.stowed:
            self.in_flight[index] = self.stowed.pop(index)
        if index not in self.in_flight and len(self._open_slots[index]) == 1:
            heapq.heappush(self._to_capture, (slot, index))

    def _step_end(self) -> int:
        """The open slots before this one are those of the next optimizer step."""
        open_slots = (slot for slots in self._open_slots.values() for slot in slots)
        return max(heapq.nsmallest(self._limits.step_slots, open_slots), default=-1) + 1

    def _skips_slot(self, slot: int) -> bool:
        return bool(self._quarantines) and self._skips(slot, self._order.index_at(slot))

    def _skips(self, slot: int, index: int) -> bool:
        return any(quarantine.covers(slot) for quarantine in self._quarantines.get(index, ()))
