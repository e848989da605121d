"""Writes a feature set (:mod:`specforge.data_plane.offline`), in as many attempts as it takes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from specforge.data_plane.offline import (
    FEATURES_DIR,
    INDEX_FILE,
    MANIFEST_FILE,
    PROMPTS_FILE,
    Entry,
    FailedSample,
    Index,
    Manifest,
    StoredSample,
    check_file,
    differing,
    index_text,
    manifest_text,
    read_any_manifest,
    read_entries,
    sample_path,
)
from specforge.data_plane.safetensors_file import sync_directory, write_file
from specforge.data_plane.tensors import Source, specs_of
from specforge.errors import DataError

GENERATION = 1
"""A feature set has one generation of every sample; those of a run begin at 1 too."""
INDEX_SYNC_S = 1.0
"""Lines of the index younger than this may be lost with the power; their samples are captured again."""


class FeatureSetWriter:
    """Writes one feature set, and goes on with one that was left incomplete. One writer at a time, one thread.

    ``sample_ids`` are all samples of the prompts, in order. Raises :class:`DataError` where ``directory`` holds
    anything else than a set of ``manifest`` and ``prompts``; every method raises what the file system raises.
    """

    def __init__(self, directory: Path, manifest: Manifest, prompts: bytes, sample_ids: Sequence[str]) -> None:
        self.directory = directory
        self._sample_ids = sample_ids
        self._manifest = replace(
            manifest, prompts_sha256=hashlib.sha256(prompts).hexdigest(), num_prompts=len(sample_ids)
        )
        self._prompts = prompts
        self._index = -1
        self._index_synced = 0.0
        self._check_directory()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.entries: Index = {e.sample_id: e for e in self._found() if isinstance(e, StoredSample)}
        # A complete set, failed samples and all, stays one until there is something to add.
        if not ((directory / MANIFEST_FILE).exists() and read_any_manifest(directory).complete):
            self._begin()

    def missing(self) -> list[str]:
        """Ids of the samples that have no features yet, in order; failed ones are among them."""
        return [name for name in self._sample_ids if not isinstance(self.entries.get(name), StoredSample)]

    def add(
        self,
        sample_id: str,
        num_tokens: int,
        loss_spans: tuple[tuple[int, int], ...],
        tensors: Mapping[str, Source],
    ) -> StoredSample:
        """Store one sample; its file is on the disk when this returns."""
        self._begin()
        path = sample_path(sample_id)
        file = self.directory / path
        if not file.parent.is_dir():
            file.parent.mkdir(mode=0o700)
            sync_directory(file.parent.parent)
        specs, num_bytes = specs_of(tensors)
        metadata = {"sample_id": sample_id, "generation": str(GENERATION)}
        crc = write_file(file, specs, num_bytes, tensors, metadata, fsync=True)
        entry = StoredSample(sample_id, GENERATION, num_tokens, loss_spans, path, num_bytes, specs, crc)
        self._append(entry)
        return entry

    def fail(self, sample_id: str, reason: str) -> None:
        """Record that the sample has no features, and why."""
        self._begin()
        (self.directory / sample_path(sample_id)).unlink(missing_ok=True)
        self._append(FailedSample(sample_id, reason))

    def finish(self) -> Manifest:
        """Declare the set complete; everything is on the disk when this returns. Equal sets have equal bytes."""
        ordered = [self.entries[name] for name in self._sample_ids]
        stored = [entry for entry in ordered if isinstance(entry, StoredSample)]
        self._manifest = replace(
            self._manifest,
            num_captured=len(stored),
            num_failed=len(ordered) - len(stored),
            total_bytes=sum(entry.num_bytes for entry in stored),
            complete=True,
        )
        self._write(INDEX_FILE, index_text(ordered))
        self._write(MANIFEST_FILE, manifest_text(self._manifest))
        return self._manifest

    def _begin(self) -> None:
        """Declare the set incomplete. The manifest comes first: it says what the directory is."""
        if self._index >= 0:
            return
        self._write(MANIFEST_FILE, manifest_text(self._manifest))
        (self.directory / FEATURES_DIR).mkdir(exist_ok=True, mode=0o700)
        self._write(PROMPTS_FILE, self._prompts)
        self._write(INDEX_FILE, index_text(self.entries.values()))
        self._index = os.open(self.directory / INDEX_FILE, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._index_synced = time.monotonic()

    def close(self) -> None:
        """Idempotent. What was added stays, complete or not."""
        if self._index >= 0:
            os.close(self._index)
            self._index = -1

    def _check_directory(self) -> None:
        """Refuse a directory of something else."""
        directory = self.directory
        if not (directory / MANIFEST_FILE).exists():
            strange = sorted(
                path.name for path in directory.glob("*") if path.name != "lock" and not path.name.startswith(".")
            )
            if strange:
                raise DataError(
                    f"{directory} holds {strange[0]!r} and no {MANIFEST_FILE}: it is no feature set; choose a "
                    "directory that is new or empty"
                )
            return
        theirs, ours = read_any_manifest(directory), self._manifest
        found = [
            f"{what} {old}, now {new} ({option})"
            for what, option, old, new in (
                ("target revision", "target.path", theirs.target_revision, ours.target_revision),
                ("a target that computes in", "target.dtype", theirs.target_dtype, ours.target_dtype),
                ("prompts with the sha256", "data", theirs.prompts_sha256, ours.prompts_sha256),
            )
            if old != new
        ]
        found += [
            f"{name} = {old}, now {new} ({option})" for name, option, old, new in differing(theirs.spec, ours.spec)
        ]
        if found:
            raise DataError(
                f"{directory} was begun with {'; '.join(found)}: go back to what it was begun with, or capture into "
                "another directory"
            )

    def _found(self) -> list[Entry]:
        """What an earlier writer left in the index, as far as the files are there; its temporary files are removed."""
        # Nobody else writes here: the caller holds the lock of the directory.
        for path in self.directory.glob(f"{FEATURES_DIR}/*/.*"):
            path.unlink(missing_ok=True)
        known = set(self._sample_ids)
        return [
            entry
            for entry in read_entries(self.directory / INDEX_FILE, torn_end=True)
            if entry.sample_id in known and (isinstance(entry, FailedSample) or self._is_whole(entry))
        ]

    def _is_whole(self, entry: StoredSample) -> bool:
        try:
            check_file(self.directory, entry, checksums=False)
        except DataError:
            return False
        return True

    def _append(self, entry: Entry) -> None:
        line = index_text([entry])
        written = os.write(self._index, line)
        if written != len(line):  # a disk that becomes full takes the first part, and refuses the rest
            os.write(self._index, line[written:])
        self.entries[entry.sample_id] = entry
        if time.monotonic() - self._index_synced >= INDEX_SYNC_S:
            os.fsync(self._index)
            self._index_synced = time.monotonic()

    def _write(self, name: str, content: bytes) -> None:
        """``content`` as the file ``name``, complete on the disk or not changed at all."""
        path = self.directory / name
        if path.exists() and path.read_bytes() == content:
            return
        partial = path.with_name(f".{name}.tmp")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(self.directory)
