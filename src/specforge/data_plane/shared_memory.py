"""SharedMemoryFeatureStore: features between the processes of one host, one copy in and none out.

Each writer process owns one arena, a file on a memory file system. Readers find it by the name in a ref's key and map
it when they first need it. See ``arena`` for the protocol, ``allocator`` for the promise about room.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from specforge.contracts.features import FeatureHandle
from specforge.contracts.refs import SampleRef
from specforge.data_plane.arena import Arena, ArenaName, list_arenas
from specforge.data_plane.arena_reader import ArenaReader
from specforge.data_plane.arena_writer import ArenaWriter, LaidOutPut
from specforge.data_plane.base import PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.tensors import check_specs, specs_of, views
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import FeatureNotFound, FeatureStoreError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (the tmpfs that POSIX shared memory lives in; files in it are 0600)


class SharedMemoryFeatureStore:
    """``FeatureStore`` of one host. Safe to use from several threads; not across a fork: attach in the child.

    ``key`` of a ref is ``<arena>:<entry>:<serial>``. A put is not refused while at most 75 % of ``capacity_bytes`` are
    live and at most 15 buffers are held by readers at that moment (see ``allocator``), as long as there are fewer than
    ``max_samples`` samples. ``close`` of the writer unlinks its arena: readers that mapped it keep reading, others find
    nothing any more, so close only when the refs are used up.
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
        """A reader's store of the run: gets, releases and aborts, in as many arenas as the run has writers."""
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

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """See ``FeatureStore``. A reader's abort reaches every process if the pair is stored anywhere; the abort of a
        pair that is not stored is remembered by this process alone (the ledger refuses the commit of such a pair).
        """
        with self._lock:
            self._check_usable()
            for sample_id, generation in samples:
                self._aborted.add((sample_id, generation))
                if self._writer is not None and self._writer.free((sample_id, generation)):
                    continue
                # Arenas that this process has mapped, and only then the others.
                if not self._request_free(sample_id, generation) and self._attach_all():
                    self._request_free(sample_id, generation)

    def gc(self) -> int:
        """Reclaim what readers that died held, and let go of arenas that nobody needs any more.

        The arena of a dead writer goes once nothing in it is readable (``collect_orphans`` takes it at once).
        """
        with self._lock:
            self._check_usable()
            num_freed = self._writer.recycle_lanes() if self._writer is not None else 0
            for text, reader in list(self._readers.items()):
                arena = reader.arena
                if self._writer is not None and arena is self._writer.arena:
                    continue
                if arena.name.writer.is_dead() and not arena.readable().any():
                    _unlink(self._directory, arena.name)
                if arena.is_unlinked() and not reader.num_handles:
                    reader.depart()
                    arena.close()
                    del self._readers[text]
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
        with self._lock:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
            self._handles.clear()
            if self._writer is not None:
                _unlink(self._directory, self._writer.arena.name)
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
        arena_name, _, place = ref.key.partition(":")
        entry, _, serial = place.partition(":")
        reader = self._reader(arena_name) if ref.store == self.name else None
        is_place = entry.isdecimal() and serial.isdecimal()
        offset = None
        if reader is not None and is_place and (ref.sample_id, ref.generation) not in self._aborted:
            check_specs(ref)
            offset = reader.hold(ref, int(entry), int(serial))
        if reader is None or offset is None:
            raise FeatureNotFound(
                f"sample {ref.sample_id!r}, generation {ref.generation}: no live features at "
                f"{ref.store}:{ref.key} (freed, or the process that wrote them is gone)"
            )
        handle = FeatureHandle(self.name, ref.sample_id, ref.generation, next(self._tokens))
        self._handles[handle.token] = (reader, int(entry))
        return views(reader.arena.data[offset : offset + ref.num_bytes], ref.features), handle

    def _release(self, handles: Sequence[FeatureHandle]) -> None:
        for handle in handles:
            held = self._handles.pop(handle.token, None)
            if held is not None:
                held[0].release(held[1])

    def _reader(self, arena_name: str) -> ArenaReader | None:
        """The reader of an arena of this run, mapped on first use."""
        if arena_name not in self._readers:
            name = ArenaName.parse(arena_name)
            if name is None or name.run_id != self._run_id:
                return None
            arena = Arena.open(self._directory, name)
            if arena is None:
                return None
            self._readers[arena_name] = ArenaReader(arena)
        return self._readers[arena_name]

    def _request_free(self, sample_id: str, generation: int) -> bool:
        found = [reader.request_free(sample_id, generation) for reader in self._readers.values()]
        return any(found)

    def _attach_all(self) -> bool:
        """Map every arena of the run; True if there was one more."""
        num_before = len(self._readers)
        for name, file_name in list_arenas(self._directory, self._run_id):
            if file_name == str(name):
                self._reader(file_name)
        return len(self._readers) > num_before


def collect_orphans(run_id: str | None = None, directory: Path = SHARED_MEMORY) -> int:
    """Unlink the arenas (of one run, or of all) whose writer is dead, and their links; the number of arenas.

    Called when a run starts. Processes that mapped such an arena keep their tensors.
    """
    orphans = {name for name, _ in list_arenas(directory, run_id) if name.writer.is_dead()}
    return sum(_unlink(directory, name) for name in orphans)


def _unlink(directory: Path, name: ArenaName) -> bool:
    """Remove the arena and its lane links; True if the arena was there."""
    existed = False
    for other, file_name in list_arenas(directory, name.run_id):
        if other == name:
            (directory / file_name).unlink(missing_ok=True)
            existed |= file_name == str(name)
    return existed
