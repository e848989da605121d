"""A feature set: the features of many samples in a directory, captured once and trained from any number of times.

    DIR/
        manifest.json            what was captured: target, capture spec, prompts, counts; complete: true at the end
        prompts.jsonl            the prompts as recorded tokens, in the order of the run that captured them
        index.jsonl              a line a sample: where its features are, or why it has none
        features/<xx>/<sample>.safetensors

A sample is in the set once its line is in the index, and its file is complete on the disk before that. So a writer may
be killed at any moment: the next one goes on from the index.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

import torch

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.codec import Form
from specforge.contracts.features import FeatureSpec
from specforge.data_plane.safetensors_file import SUFFIX, checksum, map_file, read_header
from specforge.data_plane.tensors import views
from specforge.errors import ContractError, CorruptFeature, DataError, FeatureStoreError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PROMPTS_FILE = "prompts.jsonl"
INDEX_FILE = "index.jsonl"
FEATURES_DIR = "features"

_SPEC_OPTIONS = {
    "aux_layers": "set algorithm.aux_layers to {}",
    "dtype": "set data_plane.capture_dtype to {}",
    "last_hidden": "choose an algorithm that wants {}",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a feature set is. ``target_path`` is information: ``target_revision`` says which target it was.

    ``target_dtype`` is what the target computed in, ``prompts_sha256`` that of the bytes of ``prompts.jsonl``,
    ``total_bytes`` counts the samples' buffers (headers of files come on top).
    """

    target_revision: str
    target_path: str
    target_dtype: str
    spec: CaptureSpec
    fingerprint: str
    hidden_size: int
    prompts_sha256: str
    num_prompts: int
    num_captured: int = 0
    num_failed: int = 0
    total_bytes: int = 0
    complete: bool = False
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A line of the index. ``path`` is relative to the set, ``num_bytes`` and ``crc32`` are of the data of the file."""

    sample_id: str
    generation: int
    num_tokens: int
    loss_spans: tuple[tuple[int, int], ...]
    path: str
    num_bytes: int
    features: tuple[FeatureSpec, ...]
    crc32: int


@dataclass(frozen=True, slots=True)
class FailedSample:
    """A line of the index of a sample that could not be captured."""

    sample_id: str
    reason: str


Entry = StoredSample | FailedSample
Index = dict[str, Entry]
"""sample_id -> its entry, in the order of the file."""

_MANIFEST: Form[Manifest] = Form(Manifest)
_ENTRY: Form[Entry] = Form(Entry, "entry")  # type: ignore[arg-type]


def sample_path(sample_id: str) -> str:
    """Place of a sample's file in the set: 256 folders, so that none becomes too large for its file system."""
    digest = hashlib.sha256(sample_id.encode()).hexdigest()
    name = sample_id if _PLAIN_NAME.fullmatch(sample_id) else digest
    return f"{FEATURES_DIR}/{digest[:2]}/{name}{SUFFIX}"


class FeatureSet:
    """Reads a complete feature set. Raises :class:`DataError`, which names the file, for one that cannot be used."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.entries = read_index(directory, self.manifest)

    def read(self, sample_id: str) -> dict[str, torch.Tensor]:
        """Features of one sample over a private mapping of its file: no copy; they outlive this object and the file.

        :class:`DataError` where the sample has none, :class:`CorruptFeature` where the file is not as it was written,
        ``OSError`` where it cannot be read.
        """
        entry = self.entries.get(sample_id)
        if entry is None:
            raise DataError(f"{self.directory / INDEX_FILE} has no sample {sample_id!r}; capture again")
        if isinstance(entry, FailedSample):
            raise DataError(f"sample {sample_id!r} could not be captured: {entry.reason}")
        path = self.directory / entry.path
        buffer, header = map_file(path)
        if (header.specs, header.num_bytes) != (entry.features, entry.num_bytes):
            raise CorruptFeature(f"{path} holds {header.specs}, the index says {entry.features}; capture it again")
        return views(buffer, entry.features)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete set. :class:`DataError` where there is none that this build reads."""
    manifest = read_any_manifest(directory)
    if not manifest.complete:
        raise DataError(
            f"{directory / MANIFEST_FILE}: capture did not finish; run specforge capture again with --to {directory}"
        )
    return manifest


def read_index(directory: Path, manifest: Manifest) -> Index:
    """The index of a complete set; :class:`DataError` where it is damaged or not the manifest's."""
    path = directory / INDEX_FILE
    entries = {entry.sample_id: entry for entry in read_entries(path)}
    stored = [entry for entry in entries.values() if isinstance(entry, StoredSample)]
    found = len(stored), len(entries) - len(stored), sum(entry.num_bytes for entry in stored)
    expected = manifest.num_captured, manifest.num_failed, manifest.total_bytes
    if found != expected:
        raise DataError(
            f"{path}: {found[0]} samples, {found[1]} failed ones and {found[2]} bytes are listed, but {MANIFEST_FILE} "
            f"says {expected[0]}, {expected[1]} and {expected[2]}; run specforge capture again with --to {directory}"
        )
    return entries


def check_same_capture(directory: Path, manifest: Manifest, target: tuple[str, str], spec: CaptureSpec) -> None:
    """Refuse features of another target than ``target`` (path, revision), or of another capture than ``spec``."""
    path, revision = target
    file = directory / MANIFEST_FILE
    if manifest.target_revision != revision:
        raise DataError(
            f"{file}: captured from revision {manifest.target_revision[:12]}, the target at {path} has "
            f"{revision[:12]}: capture again, or point target.path at the target that was captured (it was at "
            f"{manifest.target_path})"
        )
    for name, option, got, wanted in differing(manifest.spec, spec):
        raise DataError(
            f"{file}: captured with {name} = {got}, but this run wants {wanted}: {option}, or capture again"
        )


def check_prompts(directory: Path, manifest: Manifest) -> None:
    """Refuse prompts that are not those of the capture."""
    path = directory / PROMPTS_FILE
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {_again(directory)}") from None
    if found != manifest.prompts_sha256:
        raise DataError(f"{path} changed since the capture (its sha256 is {found[:12]}); {_again(directory)}")


def check_files(
    directory: Path, entries: Iterable[Entry], *, checksums: bool, on_file: Callable[[int], None] = lambda _: None
) -> None:
    """Check the file of every sample, see :func:`check_file`; ``on_file`` hears how many entries are done."""
    for done, entry in enumerate(entries, start=1):
        if isinstance(entry, StoredSample):
            check_file(directory, entry, checksums=checksums)
        on_file(done)


def check_file(directory: Path, entry: StoredSample, *, checksums: bool) -> None:
    """:class:`DataError` unless the file of ``entry`` has the header and the size, and the data, of the capture."""
    path = directory / entry.path
    try:
        header = read_header(path)
        crc = checksum(path) if checksums else entry.crc32
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {_again(directory)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the disk or the mount") from None
    except FeatureStoreError as error:
        raise DataError(f"{error}; delete the file, and {_again(directory)}") from None
    if (header.specs, header.num_bytes) != (entry.features, entry.num_bytes):
        raise DataError(
            f"{path} has {header.num_bytes} bytes of {', '.join(spec.name for spec in header.specs)}, the index says "
            f"{entry.num_bytes} of {', '.join(spec.name for spec in entry.features)} in other shapes or formats; "
            f"{_again(directory)}"
        )
    if crc != entry.crc32:
        raise DataError(
            f"{path} was damaged after the capture: its data has the crc32 {crc:08x}, expected {entry.crc32:08x}; "
            f"delete the file, and {_again(directory)}"
        )


def _again(directory: Path) -> str:
    return f"run specforge capture again with --to {directory}, which captures what is missing"


def differing(theirs: CaptureSpec, ours: CaptureSpec) -> list[tuple[str, str, object, object]]:
    """(field, what to do, theirs, ours) of every field that differs."""
    found = []
    for field in fields(CaptureSpec):
        got, wanted = getattr(theirs, field.name), getattr(ours, field.name)
        if got != wanted:
            got, wanted = (list(value) if isinstance(value, tuple) else value for value in (got, wanted))
            found.append((field.name, _SPEC_OPTIONS.get(field.name, "use the same").format(got), got, wanted))
    return found


def read_any_manifest(directory: Path) -> Manifest:
    """The manifest, complete or not. :class:`DataError` where there is none that this build reads."""
    path = directory / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} is missing: {directory} is no feature set; give the directory that specforge capture --to wrote"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the disk or the mount") from None
    version = re.search(rb'"format_version":\s*(\d{1,9})', content)
    if version is not None and int(version[1]) != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {int(version[1])}, this build reads {FORMAT_VERSION}; capture again, or use "
            "the release that wrote it"
        )
    try:
        manifest = _MANIFEST.read(content)
    except ContractError as error:
        raise DataError(f"{path} is damaged ({error}); capture into a new directory") from None
    if manifest.fingerprint != manifest.spec.fingerprint:
        raise DataError(f"{path} is damaged (its fingerprint is not that of its spec); capture into a new directory")
    return manifest


def read_entries(path: Path, *, torn_end: bool = False) -> list[Entry]:
    """Entries of the index, later ones of a sample in place of earlier ones; ``torn_end``: the last line may be cut."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        if torn_end:
            return []
        raise DataError(f"{path} is missing; {_again(path.parent)}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the disk or the mount") from None
    entries: Index = {}
    for number, line in enumerate(lines, start=1):
        is_last = number >= len(lines) - 1  # the part after the last line break, or the line before it
        if not line and number == len(lines):
            continue
        try:
            entry = _read_entry(line)
        except ContractError as error:
            if torn_end and is_last:
                continue
            raise DataError(
                f"{path} line {number} is damaged ({error}); remove the line, and {_again(path.parent)}"
            ) from None
        entries[entry.sample_id] = entry
    return list(entries.values())


def _read_entry(line: bytes) -> Entry:
    entry = _ENTRY.read(line)
    if isinstance(entry, StoredSample):
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or path.suffix != SUFFIX or "\0" in entry.path:
            raise ContractError(f"{entry.path!r} is no place of a feature file in the set")
    return entry


def index_text(entries: Iterable[Entry]) -> bytes:
    """Lines of the index."""
    return b"".join(_ENTRY.write(entry) + b"\n" for entry in entries)


def manifest_text(manifest: Manifest) -> bytes:
    """Content of the manifest's file."""
    return _MANIFEST.write(manifest) + b"\n"
