"""SharedMemoryFeatureStore: features between the processes of one host, one copy in and none out.

Each writer process owns one arena, a file on a memory file system. Readers find it by the name in a ref's key and map
it when they first need it. Samples outlive their writer: its arena stays until they are used up. See ``arena`` for the
protocol, ``allocator`` for the promise about room, ``arena_collector`` for the arenas of dead writers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from specforge.contracts.features import FeatureHandle
from specforge.contracts.refs import SampleRef
from specforge.data_plane.arena import Arena, ArenaName, list_arenas
from specforge.data_plane.arena_collector import collect, dead_arenas, unlink
from specforge.data_plane.arena_reader import ArenaReader
from specforge.data_plane.arena_writer import ArenaWriter, LaidOutPut
from specforge.data_plane.base import PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.tensors import check_specs, specs_of, views
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import CorruptFeature, FeatureNotFound, FeatureStoreError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (the tmpfs that POSIX shared memory lives in; files in it are 0600)


class _Place(NamedTuple):
    """The key of a ref, ``<arena>:<entry>:<serial>``."""

    arena: str
    entry: int
    serial: int

    @classmethod
    def parse(cls, key: str) -> _Place | None:
        arena, _, rest = key.partition(":")
        entry, _, serial = rest.partition(":")
        return cls(arena, int(entry), int(serial)) if entry.isdecimal() and serial.isdecimal() else None


class SharedMemoryFeatureStore:
    """``FeatureStore`` of one host. Safe to use from several threads; not across a fork: attach in the child.

    A put is not refused while at most 75 % of ``capacity_bytes`` are
    live and at most 15 buffers are held by readers at that moment (see ``allocator``), as long as there are fewer than
    ``max_samples`` samples. A sample id may have 255 bytes. ``close`` of the writer unlinks its arena: readers that
    mapped it keep reading, others find nothing any more, so close only when the refs are used up, and else ``leave``.
    """

    name = "shared_memory"

    def __init__(self, run_id: str, directory: Path, arena: Arena | None) -> None:
        self._run_id, self._directory = run_id, directory
        self._writer = ArenaWriter(arena) if arena is not None else None
        self._readers: dict[str, ArenaReader] = {}
        if arena is not None:
            self._readers[str(arena.name)] = ArenaReader(arena)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._handles: dict[int, tuple[ArenaReader, int]] = {}
        self._aborted = Tombstones()
        self._closed = False

    @classmethod
    def create(
        cls, run_id: str, capacity_bytes: int, max_samples: int = 4096, directory: Path = SHARED_MEMORY
    ) -> SharedMemoryFeatureStore:
        """The writer's store, with a new arena. Raises ``ConfigError`` where the pages cannot be reserved."""
        return cls(run_id, directory, Arena.create(directory, run_id, capacity_bytes, max_samples))

    @classmethod
    def attach(cls, run_id: str, directory: Path = SHARED_MEMORY) -> SharedMemoryFeatureStore:
        """A reader's store of the run: gets, releases and aborts, in the arenas of all its writers, dead or alive."""
        ArenaName.new(run_id)
        return cls(run_id, directory, None)

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        with self._lock:
            self._check_usable()
            if self._writer is None:
                raise FeatureStoreError("this process attached to the store as a reader: only a writer puts")
            puts = [LaidOutPut(request, *specs_of(request.tensors)) for request in requests]
            pairs = [put.pair for put in puts]
            for position, pair in enumerate(pairs):
                if pair in self._writer or pair in pairs[:position]:
                    raise FeatureStoreError(
                        f"sample {pair[0]!r}, generation {pair[1]}: its features are already stored"
                    )
            wanted = [put for put in puts if put.pair not in self._aborted]
            blocks = {block.pair: block for block in self._writer.put(wanted)}
            answer = []
            for put in puts:
                block = blocks.get(put.pair)
                place = f"{block.entry}:{block.serial}" if block else "-1:0"
                key = f"{self._writer.arena.name}:{place}"
                answer.append(StoredFeatures(self.name, key, put.num_bytes, put.specs))
        return answer

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        with self._lock:
            self._check_usable()
            answer: list[tuple[dict[str, torch.Tensor], FeatureHandle]] = []
            try:
                # Not a comprehension: the handles taken before a failure are given back below.
                for ref in refs:
                    answer.append(self._get_one(ref))  # noqa: PERF401
            except BaseException:
                self._release([handle for _, handle in answer])
                raise
        return answer

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        with self._lock:
            self._release(handles)

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        with self._lock:
            self._check_usable()
            return [self._is_live(ref) for ref in refs]

    def stored(self) -> list[tuple[str, int]]:
        """See ``FeatureStore``. Includes what a writer put after a reader, this process too, had aborted it."""
        with self._lock:
            self._check_usable()
            self._attach_all()
            return [pair for reader in self._readers.values() for pair in reader.arena.stored()]

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """See ``FeatureStore``. A reader's abort reaches every process if the pair is stored anywhere; the abort of a
        pair that is not stored is remembered by this process alone (the ledger refuses the commit of such a pair).
        """
        with self._lock:
            self._check_usable()
            pairs = [(sample_id, generation) for sample_id, generation in samples]
            for pair in pairs:
                self._aborted.add(pair)
            elsewhere = [pair for pair in pairs if self._writer is None or not self._writer.free(pair)]
            # Arenas that this process has mapped, and only then the others.
            if elsewhere and (unknown := self._request_free(elsewhere)) and self._attach_all():
                self._request_free(unknown)

    def gc(self) -> int:
        """Reclaim what readers that died held, and what dead writers of the run left: their arenas shrink to what is
        readable or held, and go when nothing in them is readable. Any process of the run may do it, at any time.
        """
        with self._lock:
            self._check_usable()
            num_freed = self._writer.recycle_lanes() if self._writer is not None else 0
            for reader in self._readers.values():
                reader.arena.clear_lanes()
            for name in dead_arenas(self._directory, self._run_id):
                # None: the writer died before its arena was complete, or another process took it away just now.
                dead = self._reader(str(name))
                if dead is not None:
                    num_freed += collect(dead.arena)
                if dead is None or not dead.arena.readable().any():
                    unlink(self._directory, name)
            self._drop_unlinked()
            return num_freed

    def health(self) -> StoreHealth:
        """Numbers of this process's arena; of a reader, the sum over the arenas that it has mapped."""
        with self._lock:
            self._check_usable()
            if self._writer is not None:
                self._writer.sweep()
                return self._writer.arena.health()
            parts = [reader.arena.health() for reader in self._readers.values()]
        return StoreHealth(
            sum(part.capacity_bytes for part in parts),
            sum(part.live_bytes for part in parts),
            sum(part.num_samples for part in parts),
            sum(part.num_handles for part in parts),
        )

    def close(self) -> None:
        """Give back every handle and mapping; the writer unlinks its arena. Tensors stay mapped while they live."""
        self._close(keep_readable=False)

    def leave(self) -> None:
        """``close`` that leaves readable samples to the readers, as a writer that dies does: once this process has
        ended, the ``gc`` of another takes the arena when they are used up.
        """
        self._close(keep_readable=True)

    def _close(self, keep_readable: bool) -> None:
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            self._handles.clear()
            if self._writer is not None and not (keep_readable and self._writer.arena.readable().any()):
                unlink(self._directory, self._writer.arena.name)
            for reader in self._readers.values():
                reader.depart()
                reader.arena.close()
            self._readers.clear()
            self._writer = None

    def _check_usable(self) -> None:
        if self._closed:
            raise FeatureStoreError("this feature store is closed")
        if os.getpid() != self._pid:
            raise FeatureStoreError("this feature store was opened before a fork: attach again in the child process")

    def _get_one(self, ref: SampleRef) -> tuple[dict[str, torch.Tensor], FeatureHandle]:
        place = self._place(ref)
        reader = self._reader(place.arena) if place is not None else None
        offset = None
        if place is not None and reader is not None:
            check_specs(ref)
            offset = reader.hold(ref, place.entry, place.serial)
        if place is None or reader is None or offset is None:
            raise FeatureNotFound(
                f"sample {ref.sample_id!r}, generation {ref.generation}: no live features at "
                f"{ref.store}:{ref.key} (freed, or the process that wrote them is gone)"
            )
        handle = FeatureHandle(self.name, ref.sample_id, ref.generation, next(self._tokens))
        self._handles[handle.token] = (reader, place.entry)
        return views(reader.arena.data[offset : offset + ref.num_bytes], ref.features), handle

    def _is_live(self, ref: SampleRef) -> bool:
        place = self._place(ref)
        name = ArenaName.parse(place.arena) if place is not None else None
        if place is None or name is None or not name.writer.is_here():
            return False
        try:
            check_specs(ref)
        except CorruptFeature:
            return False
        reader = self._reader(place.arena)
        return reader is not None and reader.finds(ref, place.entry, place.serial)

    def _place(self, ref: SampleRef) -> _Place | None:
        """Where ``ref`` says that it is; ``None``: not in this store, or aborted by this process."""
        if ref.store != self.name or (ref.sample_id, ref.generation) in self._aborted:
            return None
        return _Place.parse(ref.key)

    def _release(self, handles: Sequence[FeatureHandle]) -> None:
        for handle in handles:
            held = self._handles.pop(handle.token, None)
            if held is not None:
                held[0].release(held[1])

    def _reader(self, arena_name: str) -> ArenaReader | None:
        """The reader of an arena of this run, mapped on first use; ``None`` if there is no such arena."""
        if arena_name in self._readers:
            return self._readers[arena_name]
        name = ArenaName.parse(arena_name)
        arena = Arena.open(self._directory, name) if name is not None and name.run_id == self._run_id else None
        if arena is None:
            return None
        try:
            reader = ArenaReader(arena)
        except BaseException:
            arena.close()
            raise
        if arena.is_unlinked():
            # Unlinked between opening and claiming a lane: the link of the lane must not stay behind.
            reader.depart()
            arena.close()
            return None
        self._readers[arena_name] = reader
        return reader

    def _request_free(self, pairs: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Have the pairs freed wherever they are; those that are in no arena that this process has mapped."""
        found: set[tuple[str, int]] = set()
        for reader in self._readers.values():
            found.update(set(pairs).difference(reader.request_free(pairs)))
        return [pair for pair in pairs if pair not in found]

    def _attach_all(self) -> bool:
        """Map every arena of the run that can be read from this PID namespace; True if there was one more."""
        self._drop_unlinked()
        num_before = len(self._readers)
        for name, file_name in list_arenas(self._directory, self._run_id):
            if file_name == str(name) and name.writer.is_here():
                self._reader(file_name)
        return len(self._readers) > num_before

    def _drop_unlinked(self) -> None:
        """Let go of arenas that were unlinked, unless something in them is readable or held."""
        for name, reader in list(self._readers.items()):
            is_own = self._writer is not None and reader.arena is self._writer.arena
            if is_own or reader.num_handles or not reader.arena.is_unlinked():
                continue
            if not reader.arena.readable().any():
                reader.depart()
                reader.arena.close()
                del self._readers[name]


def collect_orphans(run_id: str | None = None, directory: Path = SHARED_MEMORY) -> int:
    """Unlink the arenas (of one run, or of all) whose writer is dead, whatever is in them; the number of arenas.

    For a run that starts from nothing or has ended. Processes that mapped such an arena keep their tensors.
    """
    return sum(unlink(directory, name) for name in dead_arenas(directory, run_id))
