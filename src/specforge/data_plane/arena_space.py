"""The data region of an arena: buffers are placed, given back, and moved when the gaps between them are too small.

Features never change once written, so a buffer can move under its readers: copy the bytes, then switch the offset in
the entry. A reader that raised its hold before the switch may look at the old place; that place (a *ghost*) is given
back when nobody holds the entry any more. A move whose old and new place overlap goes through the reserve behind the
data region, so the bytes that an entry points to are whole at every instant, and a writer may die at any of them.
An entry with a ghost is not moved again, so its OLD_OFFSET says all that a collector must know of ghosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from specforge.data_plane.allocator import OffsetAllocator, Span, plan_moves
from specforge.data_plane.arena import OFFSET, OLD_OFFSET, Arena

_MAX_COMPACTIONS = 4


@dataclass(slots=True, eq=False)
class Block:
    """The buffer of one sample. ``published`` is False until its entry points to it: then a move copies nothing."""

    pair: tuple[str, int]
    entry: int
    serial: int
    offset: int
    num_bytes: int
    published: bool = False


class ArenaSpace:
    """Places of all blocks. Offsets and sizes in bytes; a block of 0 bytes takes no room. ``num_moves`` only grows."""

    def __init__(self, arena: Arena) -> None:
        self.blocks: dict[int, Block] = {}
        self.num_moves = 0
        self._arena = arena
        self._allocator = OffsetAllocator(arena.shape.capacity_bytes)
        self._reserve_in_use = False
        self._ghosts: list[tuple[int, int, int]] = []

    @property
    def used_bytes(self) -> int:
        return self._allocator.capacity - self._allocator.free_bytes

    def find(self, num_bytes: int) -> int | None:
        """A place in an existing gap."""
        return self._allocator.allocate(num_bytes) if num_bytes else 0

    def make_room(self, num_bytes: int) -> int | None:
        """Slide blocks together until there is a place. A reader that looks at a moving block makes it plan again."""
        if num_bytes > self._allocator.free_bytes:
            return None
        for _ in range(_MAX_COMPACTIONS):
            self.settle()
            self._empty_reserve()
            placed = self._placed()
            moves = plan_moves([span for span, _ in placed], self._allocator.capacity, num_bytes)
            if moves is None:
                return None
            for index, target in moves:
                block = placed[index][1]
                assert block is not None
                if not self._slide(block, target):
                    break
            else:
                return self._allocator.allocate(num_bytes)
        return None

    def give_back(self, offset: int, num_bytes: int) -> None:
        if offset >= self._allocator.capacity:
            self._reserve_in_use = False
        elif num_bytes:
            self._allocator.free(offset, num_bytes)

    def held(self, entries: list[int]) -> list[bool]:
        """Which entries a reader holds. Fence first: what the readers must see has to be visible by then."""
        if not entries:
            return []
        held: list[bool] = np.any(self._arena.holds[entries], axis=1, keepdims=True)[:, 0].tolist()
        return held

    def settle(self) -> None:
        """Give back the old places that nobody looks at any more."""
        if not self._ghosts:
            return
        self._arena.fence()
        held = self.held([entry for entry, _, _ in self._ghosts])
        ghosts, self._ghosts = self._ghosts, []
        for ghost, is_held in zip(ghosts, held, strict=True):
            if is_held:
                self._ghosts.append(ghost)
            else:
                self._forget_old_place(ghost[0])
                self.give_back(ghost[1], ghost[2])

    def _placed(self) -> list[tuple[Span, Block | None]]:
        """Every allocated range of the data region by offset; ghosts have no block."""
        capacity = self._allocator.capacity
        blocks = [block for block in self.blocks.values() if block.num_bytes and block.offset < capacity]
        held = self.held([block.entry for block in blocks])
        placed: list[tuple[Span, Block | None]] = [
            (Span(block.offset, block.num_bytes, is_held), block) for block, is_held in zip(blocks, held, strict=True)
        ]
        placed += [(Span(offset, size, pinned=True), None) for _, offset, size in self._ghosts if offset < capacity]
        return sorted(placed, key=lambda item: item[0].offset)

    def _slide(self, block: Block, target: int) -> bool:
        """Move ``block`` down to ``target``; False if a reader kept an old place, or the reserve is taken."""
        source, size = block.offset, block.num_bytes
        if not block.published:
            self._allocator.free(source, size)
            self._allocator.take(target, size)
            block.offset = target
            return True
        if target + size <= source:
            self._allocator.take(target, size)
            return self._move(block, target)
        if self._reserve_in_use:
            return False
        self._reserve_in_use = True
        if not self._move(block, self._allocator.capacity):
            return False
        self._allocator.take(target, size)
        return self._move(block, target)

    def _move(self, block: Block, target: int) -> bool:
        """Copy, switch, and give the old place back unless a reader may be looking at it."""
        source, size = block.offset, block.num_bytes
        self.num_moves += 1
        data = self._arena.data
        # As words: torch copies single bytes at three quarters of the speed.
        data[target : target + size].view(torch.int64).copy_(data[source : source + size].view(torch.int64))
        self._arena.fence()
        self._arena.entries[block.entry, OFFSET] = target
        block.offset = target
        self._arena.fence()
        if self.held([block.entry])[0]:
            self._ghosts.append((block.entry, source, size))
            return False
        self._forget_old_place(block.entry)
        self.give_back(source, size)
        return True

    def _forget_old_place(self, entry: int) -> None:
        self._arena.entries[entry, OLD_OFFSET] = self._arena.entries[entry, OFFSET]

    def _empty_reserve(self) -> None:
        """A reader that interfered may have left a block in the reserve: bring it home if a gap takes it."""
        for block in self.blocks.values():
            if block.offset >= self._allocator.capacity:
                has_ghost = any(entry == block.entry for entry, _, _ in self._ghosts)
                target = None if has_ghost else self.find(block.num_bytes)
                if target is not None:
                    self._move(block, target)
                return
