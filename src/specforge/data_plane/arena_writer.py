"""The writer's end of an arena: puts samples, frees them, reclaims their bytes. One process, one writer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specforge.contracts.features import FeatureSpec
from specforge.data_plane.arena import ACTIVITY, DEPARTED, FREE, FREED, LIVE, NUM_LANES, SERIAL, STATE, Arena
from specforge.data_plane.arena_reader import digest
from specforge.data_plane.arena_space import ArenaSpace, Block
from specforge.data_plane.base import PutRequest
from specforge.data_plane.tensors import views
from specforge.errors import FeatureStoreFull, FeatureTooLarge


@dataclass(frozen=True, slots=True)
class LaidOutPut:
    """A put with the layout of its buffer (``num_bytes``, a multiple of the alignment)."""

    request: PutRequest
    specs: tuple[FeatureSpec, ...]
    num_bytes: int

    @property
    def pair(self) -> tuple[str, int]:
        return self.request.sample_id, self.request.generation


class ArenaWriter:
    """Not thread-safe: the store that owns it serialises calls."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.space = ArenaSpace(arena)
        self._readable: dict[tuple[str, int], Block] = {}
        self._retired: list[Block] = []
        self._free_entries = deque(range(arena.shape.max_samples))
        self._next_serial = 1
        self._seen_activity = np.zeros(NUM_LANES, dtype=np.int64)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return pair in self._readable

    def put(self, puts: Sequence[LaidOutPut]) -> list[Block]:
        """Store all or nothing; readable when it returns.

        One copy a tensor, into a buffer that no entry points to yet: a writer that dies here leaves nothing visible.
        """
        shape = self.arena.shape
        for put in puts:
            if put.num_bytes > shape.largest_sample_bytes:
                raise FeatureTooLarge(
                    f"sample {put.request.sample_id!r} has {put.num_bytes:,} bytes, an arena of "
                    f"{shape.capacity_bytes:,} takes samples of up to {shape.largest_sample_bytes:,} (1/64 of it): "
                    "raise the store's capacity or shorten the sample"
                )
        self.sweep()
        blocks: list[Block] = []
        try:
            # Not a comprehension: what was allocated before a failure is given back below.
            for put in puts:
                blocks.append(self._allocate(put))  # noqa: PERF401
            for block, put in zip(blocks, puts, strict=True):
                buffer = self.arena.data[block.offset : block.offset + block.num_bytes]
                for name, view in views(buffer, put.specs).items():
                    view.copy_(put.request.tensors[name].detach())
        except BaseException:
            for block in blocks:
                self._forget(block)
            raise
        for block in blocks:
            self._publish(block)
        return blocks

    def free(self, pair: tuple[str, int]) -> bool:
        """Make the pair unreadable now; its bytes return when no reader holds them. False: not stored here."""
        block = self._readable.get(pair)
        if block is None:
            return False
        self._retire(block)
        self._reclaim()
        return True

    def sweep(self) -> int:
        """Honour readers' free requests and releases since the last call; the number of samples freed."""
        activity = self.arena.lane_heads[:, ACTIVITY].copy()
        changed = np.flatnonzero(activity != self._seen_activity)
        if not len(changed):
            return 0
        self._seen_activity = activity
        # Readers write a request or a release before they count it.
        self.arena.fence()
        for lane in changed:
            self._honour(int(lane))
        return self._reclaim()

    def recycle_lanes(self) -> int:
        """Clear the lanes of readers that left or died, and reclaim what they held; the number of samples freed."""
        num_freed = self.sweep()
        for lane, owner in self.arena.lane_owners().items():
            if self.arena.lane_heads[lane, DEPARTED] or owner.is_dead():
                self._honour(lane)
                self.arena.holds[lane] = 0
                self.arena.frees[lane] = 0
                self.arena.lane_heads[lane] = 0
                self._seen_activity[lane] = 0
                # The lane must be clear before another reader can claim it.
                self.arena.fence()
                self.arena.lane_link(lane).unlink(missing_ok=True)
        return num_freed + self._reclaim()

    def _honour(self, lane: int) -> None:
        entries = self.arena.entries
        requested = (self.arena.frees[lane] == entries[:, SERIAL]) & (entries[:, STATE] == LIVE)
        for entry in np.flatnonzero(requested):
            self._retire(self.space.blocks[int(entry)])

    def _retire(self, block: Block) -> None:
        self.arena.entries[block.entry, STATE] = FREED
        del self._readable[block.pair]
        self._retired.append(block)

    def _reclaim(self) -> int:
        """Take back the buffers of retired blocks that no reader holds; the number of them."""
        self.space.settle()
        if not self._retired:
            return 0
        # FREED must be visible before the holds are looked at (see the module docstring of arena).
        self.arena.fence()
        held = self.space.held([block.entry for block in self._retired])
        retired, self._retired = self._retired, []
        for block, is_held in zip(retired, held, strict=True):
            if is_held:
                self._retired.append(block)
            else:
                self.arena.entries[block.entry, STATE] = FREE
                self._forget(block)
        return len(retired) - len(self._retired)

    def _allocate(self, put: LaidOutPut) -> Block:
        offset = self._find_room(put.num_bytes) if self._free_entries or self.recycle_lanes() else None
        if offset is None:
            shape = self.arena.shape
            raise FeatureStoreFull(
                f"sample {put.request.sample_id!r}, {put.num_bytes:,} bytes, does not fit now: "
                f"{self.space.used_bytes:,} of {shape.capacity_bytes:,} bytes and {len(self.space.blocks)} of "
                f"{shape.max_samples} samples are in use"
            )
        block = Block(put.pair, self._free_entries.popleft(), self._next_serial, offset, put.num_bytes)
        self._next_serial += 1
        self.space.blocks[block.entry] = block
        return block

    def _find_room(self, num_bytes: int) -> int | None:
        """A place in a gap; else after the readers that died are cleared away; else after blocks were moved."""
        offset = self.space.find(num_bytes)
        if offset is None:
            self.recycle_lanes()
            offset = self.space.find(num_bytes)
        return self.space.make_room(num_bytes) if offset is None else offset

    def _publish(self, block: Block) -> None:
        row = self.arena.entries[block.entry]
        row[SERIAL : SERIAL + 6] = [block.serial, block.pair[1], block.offset, block.num_bytes, *digest(block.pair[0])]
        # The words and the bytes must be visible before the state that invites readers.
        self.arena.fence()
        row[STATE] = LIVE
        block.published = True
        self._readable[block.pair] = block

    def _forget(self, block: Block) -> None:
        self.space.give_back(block.offset, block.num_bytes)
        del self.space.blocks[block.entry]
        self._free_entries.append(block.entry)
