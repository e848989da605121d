"""The reader's end of an arena: one lane of hold counters and free requests."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from specforge.contracts.refs import SampleRef
from specforge.data_plane.arena import (
    ACTIVITY,
    DEPARTED,
    DIGEST_HIGH,
    DIGEST_LOW,
    GENERATION,
    LIVE,
    NUM_BYTES,
    NUM_LANES,
    OFFSET,
    PUBLISHED,
    SERIAL,
    STATE,
    USED,
    Arena,
)
from specforge.data_plane.processes import ProcessIdentity
from specforge.errors import CorruptFeature, FeatureStoreError


def digest(sample_id: str) -> tuple[int, int]:
    """128 bits that stand for a sample id in an entry, as two signed words."""
    low, high = struct.unpack("<qq", hashlib.blake2b(sample_id.encode(), digest_size=16).digest())
    return low, high


class ArenaReader:
    """Claims a lane of ``arena``. Not thread-safe: the store that owns it serialises calls."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._lane = _claim_lane(arena)
        self._head = arena.lane_heads[self._lane]
        self._holds = arena.holds[:, self._lane]
        self._frees = arena.frees[:, self._lane]
        self.num_handles = 0

    def hold(self, ref: SampleRef, entry: int, serial: int) -> int | None:
        """Keep the buffer of ``ref`` where it is: its offset in ``arena.data``, or ``None`` if it is gone."""
        if not self._is_entry(entry):
            return None
        self.num_handles += 1
        self._holds[entry] += 1
        # The hold must be visible before the entry is looked at (see the module docstring of arena).
        self.arena.fence()
        try:
            offset = self._verified_offset(ref, entry, serial)
        except BaseException:
            self.release(entry)
            raise
        if offset is None:
            self.release(entry)
        return offset

    def release(self, entry: int) -> None:
        self.num_handles -= 1
        self._holds[entry] -= 1
        self._announce()

    def request_free(self, pairs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Ask the writer to free the pairs; no ``hold`` in any process finds one from now on. Those not in here."""
        lows = self.arena.entries[: self.arena.header[USED], DIGEST_LOW].copy()
        absent = []
        for sample_id, generation in pairs:
            found = False
            for entry in np.flatnonzero(lows == digest(sample_id)[0]).tolist():
                serial = self._serial_of(entry, sample_id, generation)
                if serial is not None:
                    # An entry that is recycled meanwhile has another serial, and the writer ignores the request.
                    self._frees[entry] = serial
                    found = True
            if not found:
                absent.append((sample_id, generation))
        if len(absent) < len(pairs):
            self._announce()
        return absent

    def finds(self, ref: SampleRef, entry: int, serial: int) -> bool:
        """Whether ``hold`` would find ``ref`` now."""
        try:
            return self._is_entry(entry) and self._verified_offset(ref, entry, serial) is not None
        except CorruptFeature:
            return False

    def depart(self) -> None:
        """Drop every hold and give the lane back. Its free requests stay."""
        self._holds[:] = 0
        self.num_handles = 0
        self.arena.fence()
        self._announce()
        # Last: from then on the lane may belong to another reader.
        self._head[DEPARTED] = 1
        if self.arena.is_unlinked():
            self.arena.lane_link(self._lane).unlink(missing_ok=True)

    def _announce(self) -> None:
        self.arena.fence()
        self._head[ACTIVITY] += 1

    def _is_entry(self, entry: int) -> bool:
        return 0 <= entry < self.arena.shape.max_samples

    def _serial_of(self, entry: int, sample_id: str, generation: int) -> int | None:
        """The serial of the pair, if it is what is stored in ``entry``. No hold keeps it there."""
        arena = self.arena
        serial = int(arena.entries[entry, SERIAL])
        # SERIAL before STATE before the other words before SERIAL again: what is read between is of that one serial.
        arena.fence()
        if arena.entries[entry, STATE] != LIVE:
            return None
        arena.fence()
        words = arena.entries[entry].tolist()
        arena.fence()
        if arena.entries[entry, SERIAL] != serial or words[GENERATION] != generation:
            return None
        return serial if (words[DIGEST_LOW], words[DIGEST_HIGH]) == digest(sample_id) else None

    def _verified_offset(self, ref: SampleRef, entry: int, serial: int) -> int | None:
        arena = self.arena
        if serial > arena.header[PUBLISHED] or arena.entries[entry, STATE] != LIVE:
            return None
        # The other words were written before STATE, so they must be read after it.
        arena.fence()
        words = arena.entries[entry].tolist()
        if [words[SERIAL], words[GENERATION]] != [serial, ref.generation]:
            return None
        if (words[DIGEST_LOW], words[DIGEST_HIGH]) != digest(ref.sample_id):
            return None
        if (arena.frees[entry] == serial).any():
            return None
        if words[NUM_BYTES] != ref.num_bytes:
            raise CorruptFeature(
                f"sample {ref.sample_id!r}: expected {ref.num_bytes} bytes as the reference says, "
                f"the store holds {words[NUM_BYTES]}"
            )
        return int(words[OFFSET])


def _claim_lane(arena: Arena) -> int:
    identity = ProcessIdentity.current()
    if identity.namespace != arena.name.writer.namespace:
        raise FeatureStoreError(
            "the processes of a shared-memory store must share one PID namespace: "
            "run them in one container, or start the containers with --pid=host"
        )
    lane = _free_lane(arena, identity)
    if lane is None:
        # The writer clears lanes when it needs room. It may be dead, or content, while readers come and go.
        arena.clear_lanes()
        lane = _free_lane(arena, identity)
    if lane is None:
        raise FeatureStoreError(f"all {NUM_LANES} reader lanes of {arena.path} are taken: attach fewer readers")
    return lane


def _free_lane(arena: Arena, identity: ProcessIdentity) -> int | None:
    for lane in range(NUM_LANES):
        with contextlib.suppress(FileExistsError):
            arena.lane_link(lane).symlink_to(str(identity))
            return lane
    return None
