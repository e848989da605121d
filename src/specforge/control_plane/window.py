"""What the controller keeps in memory: the window of open slots and the samples captured for it.

Pure bookkeeping (no clock, no I/O, no lock): the ledger is asked first, this follows. Its size is that of the window,
never that of the run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from specforge.contracts.refs import SampleRef
from specforge.control_plane.backpressure import Credits
from specforge.control_plane.metadata.base import Attempt
from specforge.control_plane.prompts import SampleOrder


@dataclass(slots=True)
class InFlight:
    """A sample that is leased (``ref`` is None) or whose features are live. ``num_bytes`` is an estimate until commit.

    ``deadline`` is in seconds of the controller's clock.
    """

    index: int
    sample_id: str
    generation: int
    worker_id: str
    deadline: float
    num_bytes: int
    ref: SampleRef | None = None

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.index, self.generation)


class CaptureWindow:
    """Slots ``[first_open, end)`` may be captured; those below ``next_dispatch`` have been given to the trainer."""

    def __init__(self, order: SampleOrder, limits: Credits, estimate_bytes: Callable[[int], int]) -> None:
        self._order = order
        self._limits = limits
        self._estimate_bytes = estimate_bytes
        self.in_flight: dict[int, InFlight] = {}
        self.quarantined: dict[int, int] = {}
        self.resident_bytes = 0
        self.first_open = self.next_dispatch = self.end = 0
        self._index_of: dict[str, int] = {}
        self._open_slots: dict[int, list[int]] = {}
        self._acked: set[int] = set()
        self._to_capture: list[tuple[int, int]] = []

    def start(self, first_slot: int, quarantined: dict[int, int]) -> None:
        """Begin at ``first_slot`` with nothing captured."""
        self.quarantined = dict(quarantined)
        self.first_open = self.next_dispatch = self.end = first_slot
        self.advance()

    def find(self, sample_id: str) -> int | None:
        return self._index_of.get(sample_id)

    def leased(self) -> list[InFlight]:
        return [sample for sample in self.in_flight.values() if sample.ref is None]

    # Leases

    def take(self, max_samples: int) -> list[tuple[int, int]]:
        """Up to ``max_samples`` (prompt index, estimated bytes) in slot order, as far as the credits reach."""
        taken: list[tuple[int, int]] = []
        bytes_taken = 0
        while self._to_capture and len(taken) < max_samples:
            slot, index = self._to_capture[0]
            estimate = self._estimate_bytes(index)
            if not self._limits.grants(slot, self.first_open, self.resident_bytes + bytes_taken, estimate):
                break
            heapq.heappop(self._to_capture)
            taken.append((index, estimate))
            bytes_taken += estimate
        return taken

    def give_back(self, index: int) -> None:
        """A taken, expired or failed sample waits for its capture again."""
        sample = self.in_flight.get(index)
        if sample is not None:
            self.retire(sample)
            self.freed(sample)
        heapq.heappush(self._to_capture, (self._open_slots[index][0], index))

    def lease(self, sample: InFlight) -> None:
        self.in_flight[sample.index] = sample
        self._index_of[sample.sample_id] = sample.index
        self.resident_bytes += sample.num_bytes

    def commit(self, index: int, ref: SampleRef) -> None:
        sample = self.in_flight[index]
        self.resident_bytes += ref.num_bytes - sample.num_bytes
        sample.num_bytes, sample.ref = ref.num_bytes, ref

    def retire(self, sample: InFlight) -> None:
        """Its features are about to be freed: nothing finds them any longer, their bytes are still resident."""
        del self.in_flight[sample.index]
        del self._index_of[sample.sample_id]

    def freed(self, sample: InFlight) -> None:
        self.resident_bytes -= sample.num_bytes

    # Slots

    def dispatchable(self) -> list[tuple[int, InFlight, SampleRef]]:
        """The next slots in line whose features are committed, in slot order, up to the first that is not."""
        ready: list[tuple[int, InFlight, SampleRef]] = []
        for slot in range(self.next_dispatch, self.end):
            index = self._order.index_at(slot)
            if self._skips(slot, index):
                continue
            sample = self.in_flight.get(index)
            if sample is None or sample.ref is None:
                break
            ready.append((slot, sample, sample.ref))
        return ready

    def dispatched(self, slots: list[int]) -> None:
        if slots:
            self.next_dispatch = slots[-1] + 1
        while self.next_dispatch < self.end and self._skips_slot(self.next_dispatch):
            self.next_dispatch += 1

    def ack(self, slots: list[int]) -> list[InFlight]:
        """Slots are trained; answers the samples whose features no open slot needs any longer."""
        unneeded: list[InFlight] = []
        for slot in slots:
            self._acked.add(slot)
            index = self._order.index_at(slot)
            still_open = self._open_slots[index]
            still_open.remove(slot)
            if not still_open:
                del self._open_slots[index]
                if index in self.in_flight:
                    unneeded.append(self.in_flight[index])
        return unneeded

    def advance(self) -> None:
        """Move the window past what is done, and open the slots that it newly covers."""
        while True:
            while self.first_open < self.end and (self.first_open in self._acked or self._skips_slot(self.first_open)):
                self._acked.discard(self.first_open)
                self.first_open += 1
            end = self._limits.window_end(self.first_open, self._order.total)
            if end <= self.end:
                break
            for slot in range(self.end, end):
                self._open(slot)
            self.end = end
        self.dispatched([])

    def quarantine(self, index: int) -> None:
        """Skip the open slots of a sample that waits for its capture."""
        self.quarantined[index] = self._open_slots.pop(index)[0]
        self._to_capture = [entry for entry in self._to_capture if entry[1] != index]
        heapq.heapify(self._to_capture)
        self.advance()

    def next_slot_of(self, index: int) -> int:
        """The first open slot of a sample."""
        return self._open_slots[index][0]

    def _open(self, slot: int) -> None:
        index = self._order.index_at(slot)
        if self._skips(slot, index):
            return
        self._open_slots.setdefault(index, []).append(slot)
        if index not in self.in_flight and len(self._open_slots[index]) == 1:
            heapq.heappush(self._to_capture, (slot, index))

    def _skips_slot(self, slot: int) -> bool:
        return bool(self.quarantined) and self._skips(slot, self._order.index_at(slot))

    def _skips(self, slot: int, index: int) -> bool:
        return slot >= self.quarantined.get(index, slot + 1)
