"""The file behind a shared-memory store: its name, its layout, and who writes which word of it.

    header | lane heads [L, 8] | entries [E, 8] | holds [E, L] | frees [E, L] | ids [E, 256] | data, then the reserve

All words are aligned int64, read and written whole. Putting and reading take no lock; every word has one writer:

* header, entries, ids, data    the writer process; once it is dead, the process that collects its arena
* lane head, holds, frees       the reader that claimed the lane; once it left or died, whoever clears the lane

A lane is claimed by creating the symbolic link ``<arena>.lane-<number>`` whose text is the reader's identity: creation
is atomic, and carries the identity with it. Clearing a lane, and collecting, is what ``upkeep`` is for: a lock that is
never waited for, and that the kernel takes back from a process that dies. Free requests are never cleared: they name
a serial, which does not come back.

Two orders keep readers safe without a lock, each with a ``fence`` between its two halves: a reader raises its hold
and *then* looks at the entry, the writer changes the entry and *then* looks at the holds. So either the reader sees
the change, or the writer sees the hold.

A writer may die between any two stores. A put is visible by one store, of PUBLISHED; a move by one store, of OFFSET,
which leaves the place where readers may still look in OLD_OFFSET.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from specforge.contracts.features import ALIGNMENT, aligned
from specforge.data_plane.base import StoreHealth
from specforge.data_plane.processes import ProcessIdentity
from specforge.errors import ConfigError

NUM_LANES = 32
MAX_SAMPLE_FRACTION = 64
_MAGIC = 0x53464152454E4133
_PAGE_BYTES = 4096
_WORD_BYTES = 8
_ID_BYTES = 256
MAX_ID_BYTES = _ID_BYTES - 1

# Header words. READY is written last; entries whose SERIAL is above PUBLISHED belong to a put that is not complete.
# USED: that many entries, the first ones, have ever been in use.
MAGIC, CAPACITY, MAX_SAMPLES, READY, PUBLISHED, USED = range(6)
# Words of an entry (one cache line). STATE is written last; SERIAL only grows in an arena. OLD_OFFSET is OFFSET, or
# where the buffer was before its last move while a reader may still look there.
STATE, SERIAL, GENERATION, OFFSET, NUM_BYTES, DIGEST_LOW, DIGEST_HIGH, OLD_OFFSET = range(8)
# Words of a lane head (one cache line). ACTIVITY counts requests and releases; DEPARTED is 1 after a reader's close.
ACTIVITY, DEPARTED = range(2)
# States of an entry.
FREE, LIVE, FREED = range(3)

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ArenaName:
    """``specforge.<run>.<identity of the writer>.<nonce>``: whether an arena is an orphan is judged by its name."""

    run_id: str
    writer: ProcessIdentity
    nonce: str

    @classmethod
    def new(cls, run_id: str) -> ArenaName:
        if not _RUN_ID.fullmatch(run_id):
            raise ConfigError(f"a run id is 1 to 64 letters, digits, '-' or '_', got {run_id!r}: rename the run")
        return cls(run_id, ProcessIdentity.current(), secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> ArenaName | None:
        """The inverse of ``str``; ``None`` for any other text (which then is no file of ours)."""
        parts = text.split(".")
        if len(parts) != 4 or parts[0] != "specforge" or not _RUN_ID.fullmatch(parts[1]):
            return None
        writer = ProcessIdentity.parse(parts[2])
        if writer is None or not re.fullmatch(r"[0-9a-f]{8}", parts[3]):
            return None
        return cls(parts[1], writer, parts[3])

    def __str__(self) -> str:
        return f"specforge.{self.run_id}.{self.writer}.{self.nonce}"


def list_arenas(directory: Path, run_id: str | None) -> Iterator[tuple[ArenaName, str]]:
    """(arena, file name) of every arena file and lane link in ``directory``, of one run or of all."""
    for file_name in sorted(path.name for path in directory.iterdir()):
        name = ArenaName.parse(file_name.partition(".lane-")[0])
        if name is not None and run_id in (None, name.run_id):
            yield name, file_name


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """Sizes in bytes. The data region is ``capacity_bytes`` plus a reserve as large as the largest sample."""

    capacity_bytes: int
    max_samples: int

    @property
    def largest_sample_bytes(self) -> int:
        return self.capacity_bytes // MAX_SAMPLE_FRACTION // ALIGNMENT * ALIGNMENT

    @property
    def words(self) -> int:
        return 8 + 8 * NUM_LANES + 8 * self.max_samples + 2 * NUM_LANES * self.max_samples

    @property
    def data_offset(self) -> int:
        return -(-(self.words * _WORD_BYTES + self.max_samples * _ID_BYTES) // _PAGE_BYTES) * _PAGE_BYTES

    @property
    def data_bytes(self) -> int:
        return self.capacity_bytes + self.largest_sample_bytes

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.data_bytes


class Arena:
    """One mapped arena. ``data`` (uint8 [capacity + reserve]) keeps the mapping alive as long as a view of it lives."""

    def __init__(self, directory: Path, name: ArenaName, descriptor: int, shape: ArenaShape) -> None:
        self.directory, self.name, self.shape = directory, name, shape
        self._descriptor = descriptor
        self._fence = threading.Lock()
        self._mapping = mapping = mmap.mmap(descriptor, shape.file_bytes)
        words = np.frombuffer(mapping, dtype=np.int64, count=shape.words)
        self.header, rest = words[:8], words[8:]
        self.lane_heads, rest = rest[: 8 * NUM_LANES].reshape(NUM_LANES, 8), rest[8 * NUM_LANES :]
        self.entries, rest = rest[: 8 * shape.max_samples].reshape(-1, 8), rest[8 * shape.max_samples :]
        self.holds, self.frees = rest.reshape(2, shape.max_samples, NUM_LANES)
        id_bytes = np.frombuffer(mapping, np.uint8, shape.max_samples * _ID_BYTES, shape.words * _WORD_BYTES)
        self._ids = id_bytes.reshape(-1, _ID_BYTES)
        self.data = torch.frombuffer(mapping, dtype=torch.uint8, offset=shape.data_offset)

    @classmethod
    def create(cls, directory: Path, run_id: str, capacity_bytes: int, max_samples: int) -> Arena:
        """A new arena, mode 0600, all of its pages reserved. Too little room is a ``ConfigError``."""
        shape = ArenaShape(aligned(capacity_bytes), max_samples)
        if shape.largest_sample_bytes < ALIGNMENT or max_samples < 1:
            raise ConfigError(
                f"a shared-memory arena needs at least {ALIGNMENT * MAX_SAMPLE_FRACTION} bytes and room for 1 sample, "
                f"got {capacity_bytes} bytes and {max_samples} samples: raise them"
            )
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory: shared memory needs a mounted tmpfs there")
        name = ArenaName.new(run_id)
        path = directory / str(name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            _reserve(descriptor, directory, shape)
            arena = cls(directory, name, descriptor, shape)
        except BaseException:
            path.unlink()
            os.close(descriptor)
            raise
        arena.header[:READY] = [_MAGIC, shape.capacity_bytes, max_samples]
        arena.fence()
        arena.header[READY] = 1
        return arena

    @classmethod
    def open(cls, directory: Path, name: ArenaName) -> Arena | None:
        """The arena ``name``, or ``None`` if there is none (any more) that this user owns and that is complete."""
        try:
            descriptor = os.open(directory / str(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                return None
            raise
        facts = os.fstat(descriptor)
        header = np.frombuffer(os.pread(descriptor, 8 * _WORD_BYTES, 0).ljust(64, b"\0"), dtype=np.int64)
        shape = ArenaShape(int(header[CAPACITY]), int(header[MAX_SAMPLES]))
        complete = header[MAGIC] == _MAGIC and header[READY] == 1 and facts.st_size >= shape.file_bytes
        if facts.st_uid != os.geteuid() or not complete:
            os.close(descriptor)
            return None
        return cls(directory, name, descriptor, shape)

    @property
    def path(self) -> Path:
        return self.directory / str(self.name)

    def lane_link(self, lane: int) -> Path:
        return self.directory / f"{self.name}.lane-{lane}"

    def lane_owners(self) -> dict[int, ProcessIdentity]:
        """Claimed lanes and who claimed them."""
        owners = {}
        for name, file_name in list_arenas(self.directory, self.name.run_id):
            lane = file_name.partition(".lane-")[2]
            if name == self.name and lane:
                with contextlib.suppress(FileNotFoundError):
                    owner = ProcessIdentity.parse(str((self.directory / file_name).readlink()))
                    if owner is not None:
                        owners[int(lane)] = owner
        return owners

    def is_unlinked(self) -> bool:
        return os.fstat(self._descriptor).st_nlink == 0

    @contextlib.contextmanager
    def upkeep(self) -> Iterator[bool]:
        """True: this process alone may clear lanes and collect inside the block. False: another one is at it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def clear_lanes(self) -> None:
        """End the holds of readers that left or died, and offer their lanes to others. Not while another does it."""
        with self.upkeep() as ours:
            if ours:
                self.clear_lanes_in_upkeep()

    def clear_lanes_in_upkeep(self) -> None:
        for lane, owner in self.lane_owners().items():
            if self.lane_heads[lane, DEPARTED] or owner.is_dead():
                self.holds[:, lane] = 0
                self.lane_heads[lane, DEPARTED] = 0
                self.fence()
                # A writer that lives looks at its lanes when this word changes.
                self.lane_heads[lane, ACTIVITY] += 1
                # The lane must be clear before another reader can claim it.
                self.fence()
                self.lane_link(lane).unlink(missing_ok=True)

    def fence(self) -> None:
        """A full memory fence: what this thread wrote before is visible before anything that it reads after.

        Stores may pass later loads on every CPU. An atomic release followed by an atomic acquire may not be passed
        in that way, and taking an uncontended lock twice is one, at about 100 ns.
        """
        with self._fence:
            pass
        with self._fence:
            pass

    def put_id(self, entry: int, sample_id: str) -> None:
        """Up to ``MAX_ID_BYTES`` bytes of UTF-8."""
        text = sample_id.encode()
        self._ids[entry, : len(text) + 1] = np.frombuffer(bytes([len(text)]) + text, np.uint8)

    def live_entries(self) -> np.ndarray:
        """Bool [E]: put completely, and not freed by the writer."""
        published = self.header[PUBLISHED]
        # What the word promises was written before it, so it must be read after it.
        self.fence()
        live: np.ndarray = (self.entries[:, STATE] == LIVE) & (self.entries[:, SERIAL] <= published)
        return live

    def readable(self) -> np.ndarray:
        """Bool [E]: entries that a ``get`` may find now."""
        freed = (self.frees == self.entries[:, SERIAL, None]).any(axis=1)
        readable: np.ndarray = self.live_entries() & ~freed
        return readable

    def stored(self) -> list[tuple[str, int]]:
        """(sample_id, generation) of every readable entry."""
        serials = self.entries[:, SERIAL].copy()
        self.fence()
        pairs = []
        for entry in np.flatnonzero(self.readable()):
            generation, text = int(self.entries[entry, GENERATION]), self._ids[entry].tobytes()
            # A writer that uses an entry again takes LIVE away first, and the serial does not come back.
            self.fence()
            if self.entries[entry, STATE] == LIVE and self.entries[entry, SERIAL] == serials[entry]:
                pairs.append((text[1 : 1 + text[0]].decode(), generation))
        return pairs

    def give_back(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Return the data pages that no range of ``wanted`` (start and end offsets) touches to the system.

        They read as zeros from then on. Only where the writer is dead: it would put into them. A file system that
        cannot do it keeps them.
        """
        page, base = mmap.PAGESIZE, self.shape.data_offset
        size = base + self.shape.data_bytes
        start = base
        for first, last in [*sorted((base + first, base + last) for first, last in wanted), (size, size)]:
            begin, end = -(-start // page) * page, first // page * page
            if begin < end:
                try:
                    self._mapping.madvise(mmap.MADV_REMOVE, begin, end - begin)
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        raise
            start = max(start, last)

    def health(self) -> StoreHealth:
        """Computed from the shared words alone, so every process sees the same numbers."""
        readable = self.readable()
        held = self.holds.any(axis=1) & (self.entries[:, STATE] != FREE)
        live_bytes = int(self.entries[readable | held, NUM_BYTES].sum())
        num_handles = int(self.holds[held].sum())
        return StoreHealth(self.shape.capacity_bytes, live_bytes, int(readable.sum()), num_handles)

    def close(self) -> None:
        """Close the descriptor. The mapping itself goes with the last tensor over it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _reserve(descriptor: int, directory: Path, shape: ArenaShape) -> None:
    """Reserve every page now: writing into an unreserved page of a full tmpfs kills the process (SIGBUS)."""
    facts = os.statvfs(directory)
    available = facts.f_bavail * facts.f_frsize
    fits = shape.file_bytes <= available
    if fits:
        try:
            os.posix_fallocate(descriptor, 0, shape.file_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            fits = False
    if not fits:
        raise ConfigError(
            f"the shared-memory store needs {shape.file_bytes:,} bytes in {directory}, which has {available:,} free: "
            f"lower the store's capacity, remove what fills {directory}, or mount it larger "
            "(docker run --shm-size, or mount -o remount,size=)"
        )
