"""SharedDirFeatureStore: features as files in a directory that every process of the run has mounted.

    <directory>/<run id>/<2 hex>/<sample id, percent-encoded>.<generation>.safetensors

The path of a sample is a function of its id and generation, so any process finds, aborts and lists any sample without
asking the one that wrote it. See ``safetensors_file`` for what is in a file and how it appears.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from specforge.contracts.features import FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.safetensors_file import (
    SUFFIX,
    Header,
    encode_header,
    is_leftover,
    map_file,
    read_header,
    sync_directory,
    write_temporary,
)
from specforge.data_plane.tensors import specs_of, views
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import (
    ConfigError,
    CorruptFeature,
    FeatureNotFound,
    FeatureStoreError,
    FeatureStoreFull,
    FeatureTooLarge,
)

MAX_ENCODED_ID = 180
"""Characters of a percent-encoded id in a file name (255 bytes at most); a longer one is named by its digest."""

_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FILE_NAME = re.compile(r"(?P<id>[^/]*)\.(?P<generation>-?\d{1,20})" + re.escape(SUFFIX))
_DIGEST = "="  # no character of a percent-encoded id
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}

_Pair = tuple[str, int]


class _Put(NamedTuple):
    """One sample of a batch, laid out. ``key`` is its path below the run's directory."""

    request: PutRequest
    key: str
    specs: tuple[FeatureSpec, ...]
    num_bytes: int

    @property
    def pair(self) -> _Pair:
        return self.request.sample_id, self.request.generation


class SharedDirFeatureStore:
    """``FeatureStore`` of processes that share a mount. Any of them puts, gets and aborts; safe to use from threads.

    ``get`` maps the file: what it returns stays valid when the file is aborted, on any mount that keeps an unlinked
    file for those who have it open (local disks do, and one NFS client; between NFS clients abort after the release).
    ``capacity_bytes`` (``None``: no budget but the disk's) and ``health`` count features that this object put and whose
    file is there: a freed sample leaves the count at once, its blocks leave the disk with the last mapping. A full disk
    is ``FeatureStoreFull``. Generations are written once: the check that refuses a second put of a live one is not
    atomic between processes, whose attempts have different generations.

    ``fsync``: off by default, because features that a power failure takes are captured again (a file that was cut short
    is found out by its size); with it, a file is on the disk before its name is, and the name before ``put`` returns.
    ``close`` leaves the files, which outlive their writer; ``remove_all`` takes them away.
    """

    name = "shared_dir"
    keeps_references = False

    def __init__(self, directory: Path, run_id: str, capacity_bytes: int | None = None, fsync: bool = False) -> None:
        if not _RUN_ID.fullmatch(run_id):
            raise ConfigError(f"a run id is 1 to 64 letters, digits, '-' or '_', got {run_id!r}: rename the run")
        self._directory, self._root = directory, directory / run_id
        self._capacity_bytes, self._fsync = capacity_bytes, fsync
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._handles: set[int] = set()
        self._own: dict[_Pair, int] = {}
        """Bytes of what this object put. A file may be gone since: others abort too."""
        self._pending: dict[_Pair, int] = {}
        """Bytes of what is being written now."""
        self._num_bytes = 0
        """Bytes of ``_own`` and ``_pending``."""
        self._aborted = Tombstones()
        self._closed = False

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        puts = [
            _Put(request, relative_path(request.sample_id, request.generation), *specs_of(request.tensors))
            for request in requests
        ]
        wanted = self._reserve(puts)
        try:
            with self._refusals("write"):
                self._store(wanted)
        finally:
            with self._lock:
                for pair in self._pending.keys() & {put.pair for put in wanted}:
                    self._num_bytes -= self._pending.pop(pair)
        return [StoredFeatures(self.name, put.key, put.num_bytes, put.specs) for put in puts]

    def key_of(self, pair: tuple[str, int]) -> str:
        """The key of a ref to ``pair``, stored or not."""
        return relative_path(*pair)

    def adopt(self) -> None:
        """Count what is stored already as put by this object, which takes over from those that put it."""
        self._check_usable()
        with self._refusals("list"):
            found = {pair: _num_bytes_of(self._root / relative_path(*pair)) for pair in self.stored()}
        with self._lock:
            for pair in found.keys() - self._own.keys() - self._pending.keys():
                self._own[pair] = found[pair]
                self._num_bytes += found[pair]

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        found = []
        for ref in refs:
            path = self._path_of(ref)
            with self._lookup(ref):
                buffer, header = map_file(path)
                _check(path, ref, header)
            found.append(views(buffer, ref.features))
        with self._lock:
            self._check_usable()
            handles = [FeatureHandle(self.name, ref.sample_id, ref.generation, next(self._tokens)) for ref in refs]
            self._handles.update(handle.token for handle in handles)
        return list(zip(found, handles, strict=True))

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        """See ``FeatureStore``. The mapping of a sample goes with its tensors, so nothing waits for a release."""
        with self._lock:
            self._handles.difference_update(handle.token for handle in handles)

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        return [self._is_live(ref) for ref in refs]

    def stored(self) -> list[tuple[str, int]]:
        """See ``FeatureStore``. Reads every directory of the run; includes what a process put after another had
        aborted it.
        """
        self._check_usable()
        with self._refusals("list"):
            pairs = (_pair_of(path) for path in self._files() if path.name.endswith(SUFFIX))
            return [pair for pair in pairs if pair is not None]

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """See ``FeatureStore``. An abort of a pair that is stored reaches every process; that of a pair that is not
        stored is remembered by this object alone (the ledger refuses the commit of such a pair).
        """
        with self._lock:
            self._check_usable()
            for pair in samples:
                self._aborted.add(pair)
        with self._refusals("remove"):
            for pair in samples:
                _unlink(self._root / relative_path(*pair))
        with self._lock:
            self._forget(samples)

    def gc(self) -> int:
        """Remove the temporary files of writers of this host that died in a put, and return their number.

        Those of another host, or of this one before it was started again, can be judged by nobody here:
        ``remove_all`` takes them.
        """
        self._check_usable()
        with self._refusals("remove"):
            return sum(_unlink(path) for path in self._files() if is_leftover(path.name))

    def health(self) -> StoreHealth:
        """Of features that this object put and handles that it lent. ``capacity_bytes`` 0 means no budget."""
        with self._lock:
            self._check_usable()
            self._recount()
            return StoreHealth(self._capacity_bytes or 0, sum(self._own.values()), len(self._own), len(self._handles))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._handles.clear()

    def remove_all(self) -> None:
        """Remove everything that the run stored, whoever wrote it, when it has ended or before it starts afresh.

        May be called after ``close``.
        """
        with self._refusals("remove"):
            while self._root.exists():
                # Files that others remove meanwhile do not end it.
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(self._root)

    def _check_usable(self) -> None:
        if self._closed:
            raise FeatureStoreError("this feature store is closed")

    def _reserve(self, puts: Sequence[_Put]) -> list[_Put]:
        """Room for ``puts``, and their pairs against another put; those that are to be written."""
        with self._lock:
            self._check_usable()
            pairs = [put.pair for put in puts]
            for position, (pair, put) in enumerate(zip(pairs, puts, strict=True)):
                if pair in pairs[:position] or pair in self._pending or self._is_there(put.key):
                    raise FeatureStoreError(
                        f"sample {pair[0]!r}, generation {pair[1]}: its features are already stored"
                    )
            wanted = [put for put in puts if put.pair not in self._aborted]
            self._check_room(puts, sum(put.num_bytes for put in wanted))
            self._pending.update((put.pair, put.num_bytes) for put in wanted)
            self._num_bytes += sum(put.num_bytes for put in wanted)
        return wanted

    def _check_room(self, puts: Sequence[_Put], num_bytes: int) -> None:
        capacity = self._capacity_bytes
        if capacity is None:
            return
        for put in puts:
            if put.num_bytes > capacity:
                raise FeatureTooLarge(
                    f"sample {put.request.sample_id!r} has {put.num_bytes} bytes, the store holds {capacity} at most"
                )
        if self._num_bytes + num_bytes > capacity:
            # Others may have aborted since: only now is it worth looking at the files.
            self._recount()
        if self._num_bytes + num_bytes > capacity:
            raise FeatureStoreFull(f"{num_bytes} bytes do not fit: {self._num_bytes} of {capacity} bytes are live")

    def _recount(self) -> None:
        self._forget([pair for pair in self._own if not self._is_there(relative_path(*pair))])

    def _forget(self, pairs: Iterable[_Pair]) -> None:
        for pair in pairs:
            self._num_bytes -= self._own.pop(pair, 0)

    def _is_there(self, key: str) -> bool:
        return os.path.exists(f"{self._root}/{key}")  # noqa: PTH110 (asked for every file of a recount)

    def _store(self, puts: Sequence[_Put]) -> None:
        """Write all, then show all; on any failure none of the files remains."""
        temporaries: list[Path] = []
        shown: list[Path] = []
        try:
            for put in puts:
                temporaries.append(self._write(put))  # noqa: PERF401 (on a failure, those that are written must go)
            with self._lock:
                wanted = [put.pair not in self._aborted for put in puts]
                for put, temporary in itertools.compress(zip(puts, temporaries, strict=True), wanted):
                    shown.append(self._root / put.key)
                    temporary.replace(shown[-1])
                for put in itertools.compress(puts, wanted):
                    self._own[put.pair] = self._pending.pop(put.pair)
            if self._fsync:
                for directory in {path.parent for path in shown}:
                    sync_directory(directory)
        except BaseException:
            with self._lock:
                self._forget([put.pair for put in puts])
            _unlink_all([*shown, *temporaries])
            raise
        if len(shown) < len(temporaries):
            _unlink_all(temporaries)

    def _write(self, put: _Put) -> Path:
        metadata = {"sample_id": put.request.sample_id, "generation": str(put.request.generation)}
        header = encode_header(put.specs, put.num_bytes, metadata)
        directory = (self._root / put.key).parent
        try:
            return write_temporary(directory, header, put.specs, put.request.tensors, fsync=self._fsync)[0]
        except FileNotFoundError:
            self._make(directory)
            return write_temporary(directory, header, put.specs, put.request.tensors, fsync=self._fsync)[0]

    def _make(self, directory: Path) -> None:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        for path in (self._directory, self._root, directory):
            path.mkdir(mode=0o700, exist_ok=True)
            if self._fsync:
                sync_directory(path.parent)

    def _path_of(self, ref: SampleRef) -> Path:
        """Raises ``FeatureNotFound`` unless ``ref`` may be in this store. Its key is compared and never followed."""
        self._check_usable()
        pair = ref.sample_id, ref.generation
        if ref.store != self.name or ref.key != relative_path(*pair) or pair in self._aborted:
            raise self._not_found(ref)
        return self._root / ref.key

    def _is_live(self, ref: SampleRef) -> bool:
        try:
            path = self._path_of(ref)
            with self._lookup(ref):
                _check(path, ref, read_header(path))
        except (FeatureNotFound, CorruptFeature):
            return False
        return True

    def _not_found(self, ref: SampleRef) -> FeatureNotFound:
        return FeatureNotFound(
            f"sample {ref.sample_id!r}, generation {ref.generation}: no live features at {ref.store}:{ref.key} "
            f"in {self._root}"
        )

    @contextlib.contextmanager
    def _lookup(self, ref: SampleRef) -> Iterator[None]:
        with self._refusals("read"):
            try:
                yield
            except OSError as error:
                if error.errno in _GONE:
                    raise self._not_found(ref) from error
                raise

    @contextlib.contextmanager
    def _refusals(self, verb: str) -> Iterator[None]:
        """What the file system says, as this project's errors."""
        try:
            yield
        except OSError as error:
            path, reason = error.filename or self._root, error.strerror or error
            if error.errno in _FULL:
                raise FeatureStoreFull(f"{self._directory} is full, nothing was stored ({path}: {reason})") from error
            message = f"cannot {verb} {path}: {reason}"
            if error.errno in _DENIED:
                message += f"; make {self._directory} writable for this user, or choose another directory"
            raise FeatureStoreError(message) from error

    def _files(self) -> Iterator[Path]:
        """Every file of the run, temporary ones too, as far as nobody removes them meanwhile."""
        for directory in _entries(self._root):
            yield from _entries(directory)


def relative_path(sample_id: str, generation: int) -> str:
    """Where the features of the pair are below the run's directory; also the key of their ref."""
    name = urllib.parse.quote(sample_id, safe="")
    digest = hashlib.sha256(sample_id.encode()).hexdigest()
    if len(name) > MAX_ENCODED_ID:
        name = _DIGEST + digest
    return f"{digest[:2]}/{name}.{generation}{SUFFIX}"


def _pair_of(path: Path) -> _Pair | None:
    """Whose features ``path`` holds; ``None``: it is gone, or no file of this store."""
    match = _FILE_NAME.fullmatch(path.name)
    if match is None:
        return None
    sample_id = urllib.parse.unquote(match["id"])
    if match["id"].startswith(_DIGEST):
        try:
            sample_id = read_header(path).metadata.get("sample_id", "")
        except (FileNotFoundError, CorruptFeature):
            return None
    return sample_id, int(match["generation"])


def _num_bytes_of(path: Path) -> int:
    """Of the features in ``path``; 0 if it is gone or broken."""
    try:
        return read_header(path).num_bytes
    except (FileNotFoundError, CorruptFeature):
        return 0


def _check(path: Path, ref: SampleRef, header: Header) -> None:
    if (header.specs, header.num_bytes) != (ref.features, ref.num_bytes):
        raise CorruptFeature(
            f"sample {ref.sample_id!r}: {path} holds {header.specs} in {header.num_bytes} bytes, the reference says "
            f"{ref.features} in {ref.num_bytes}"
        )


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unlink(path: Path) -> bool:
    """True if it was there."""
    try:
        path.unlink()
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise
    return True


def _unlink_all(paths: Iterable[Path]) -> None:
    """As many as can be: a failure is on its way already."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
