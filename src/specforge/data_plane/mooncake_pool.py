"""TransferPool: the memory of one process that Mooncake reads from and writes to, registered once and used for ever."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from specforge.contracts.features import aligned
from specforge.data_plane.allocator import OffsetAllocator
from specforge.errors import FeatureStoreError


class PoolSlot(NamedTuple):
    """A range of the pool, in bytes."""

    offset: int
    num_bytes: int


class TransferPool:
    """Slots are busy during a call and kept by a reader's handle after it. Safe to use from several threads.

    Tensors over the pool keep its memory for as long as they live, whatever happens to the pool.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.memory = memoryview(memory)
        self.address = self.tensor.data_ptr()
        self._allocator = OffsetAllocator(num_bytes)
        self._changed = threading.Condition()
        self._num_busy = 0

    def take(self, sizes: Sequence[int], *, partly: bool = False) -> list[PoolSlot]:
        """Busy slots of ``sizes``; with ``partly`` of as many of the first of them as there is room for, at least one.

        Waits for calls of other threads to give back theirs. Raises ``FeatureStoreError`` where only releases of
        handles could make room.
        """
        with self._changed:
            while not (slots := self._allocate(sizes, partly)) and sizes:
                if not self._num_busy:
                    raise FeatureStoreError(
                        f"no room for {sizes[0] if partly else sum(sizes)} bytes in the transfer buffer of "
                        f"{self.num_bytes} bytes, of which {self.num_bytes - self._allocator.free_bytes} are held by "
                        "handles: release handles sooner, or raise data_plane.mooncake.buffer_bytes"
                    )
                self._changed.wait()
            self._num_busy += len(slots)
        return slots

    def keep(self, slots: Sequence[PoolSlot]) -> None:
        """The call is over, the slots stay taken."""
        with self._changed:
            self._num_busy -= len(slots)
            self._changed.notify_all()

    def give_back(self, slots: Sequence[PoolSlot], *, kept: bool = False) -> None:
        """Busy slots, or with ``kept`` those of handles, are free again."""
        with self._changed:
            for slot in slots:
                self._allocator.free(*slot)
            if not kept:
                self._num_busy -= len(slots)
            self._changed.notify_all()

    def _allocate(self, sizes: Sequence[int], partly: bool) -> list[PoolSlot]:
        slots: list[PoolSlot] = []
        for size in sizes:
            offset = self._allocator.allocate(aligned(size))
            if offset is None:
                if not partly:
                    for slot in slots:
                        self._allocator.free(*slot)
                    slots = []
                break
            slots.append(PoolSlot(offset, aligned(size)))
        return slots
