"""The writer's end of an arena: puts samples, frees them, reclaims their bytes. One process, one writer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from specforge.contracts.features import FeatureSpec
from specforge.data_plane.arena import (
    ACTIVITY,
    FREE,
    FREED,
    LIVE,
    MAX_ID_BYTES,
    NUM_LANES,
    PUBLISHED,
    SERIAL,
    STATE,
    USED,
    Arena,
)
from specforge.data_plane.arena_reader import digest
from specforge.data_plane.arena_space import ArenaSpace, Block
from specforge.data_plane.base import PutRequest
from specforge.data_plane.tensors import fill
from specforge.errors import FeatureStoreError, FeatureStoreFull, FeatureTooLarge


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
        # A stack: the entries in use are few and the first ones, and so are the words that a sweep looks at.
        self._free_entries = list(reversed(range(arena.shape.max_samples)))
        self._num_used_entries = 0
        # [E]: the serial of what is readable in an entry, else -1.
        self._readable_serials = np.full(arena.shape.max_samples, -1)
        self._next_serial = 1
        self._seen_activity = np.zeros(NUM_LANES, dtype=np.int64)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return pair in self._readable

    def put(self, puts: Sequence[LaidOutPut]) -> list[Block]:
        """Store all or nothing; readable when it returns.

        One copy a tensor, into a buffer that no entry points to yet. One store makes all of them visible: a writer
        that dies here leaves nothing, or everything.
        """
        shape = self.arena.shape
        for put in puts:
            if len(put.request.sample_id.encode()) > MAX_ID_BYTES:
                raise FeatureStoreError(
                    f"a sample id may have {MAX_ID_BYTES} bytes in UTF-8, {put.request.sample_id!r} has "
                    f"{len(put.request.sample_id.encode())}: shorten it"
                )
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
                fill(buffer, put.specs, put.request.tensors)
        except BaseException:
            for block in blocks:
                self._forget(block)
            raise
        self._publish(blocks)
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
        changed = (activity != self._seen_activity).nonzero()[0].tolist()
        if not changed:
            return 0
        self._seen_activity = activity
        return self._honour(changed)

    def recycle_lanes(self) -> int:
        """Clear the lanes of readers that left or died, and reclaim what they held; the number of samples freed."""
        self.arena.clear_lanes()
        # A reader that died may have left a request that it had not counted yet.
        return self._honour(range(NUM_LANES))

    def _honour(self, lanes: Iterable[int]) -> int:
        """Free what the readers of ``lanes`` asked to be freed; the number of samples whose bytes are back."""
        # Readers write a request or a release before they count it.
        self.arena.fence()
        num_used = self._num_used_entries
        for lane in lanes:
            requested = self.arena.frees[:num_used, lane] == self._readable_serials[:num_used]
            for entry in requested.nonzero()[0].tolist():
                self._retire(self.space.blocks[entry])
        return self._reclaim()

    def _retire(self, block: Block) -> None:
        self.arena.entries[block.entry, STATE] = FREED
        self._readable_serials[block.entry] = -1
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
        block = Block(put.pair, self._free_entries.pop(), self._next_serial, offset, put.num_bytes)
        self._next_serial += 1
        self.space.blocks[block.entry] = block
        self._num_used_entries = max(self._num_used_entries, block.entry + 1)
        return block

    def _find_room(self, num_bytes: int) -> int | None:
        """A place in a gap; else after the readers that died are cleared away; else after blocks were moved."""
        offset = self.space.find(num_bytes)
        if offset is None:
            self.recycle_lanes()
            offset = self.space.find(num_bytes)
        return self.space.make_room(num_bytes) if offset is None else offset

    def _publish(self, blocks: Sequence[Block]) -> None:
        arena = self.arena
        arena.header[USED] = self._num_used_entries
        for block in blocks:
            # Known here before it is visible anywhere: an exception in this loop leaves nothing that abort cannot free.
            self._readable[block.pair] = block
            self._readable_serials[block.entry] = block.serial
            block.published = True
            sample_id, generation = block.pair
            arena.put_id(block.entry, sample_id)
            words = [block.serial, generation, block.offset, block.num_bytes, *digest(sample_id), block.offset]
            arena.entries[block.entry, SERIAL:] = words
            # The words and the bytes must be visible before the state that invites readers.
            arena.fence()
            arena.entries[block.entry, STATE] = LIVE
        if blocks:
            arena.fence()
            arena.header[PUBLISHED] = blocks[-1].serial

    def _forget(self, block: Block) -> None:
        self.space.give_back(block.offset, block.num_bytes)
        del self.space.blocks[block.entry]
        self._free_entries.append(block.entry)
