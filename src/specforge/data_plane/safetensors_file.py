"""One sample as one ``.safetensors`` file, which the public ``safetensors`` library loads too.

The data of a file is the sample's buffer as :func:`specforge.contracts.features.layout` lays it out. The format knows
no holes, so the bytes between features are uint8 tensors ``__pad<N>``. The header is padded with spaces: the data
starts at a multiple of 64 bytes in the file, so that a mapping is as aligned as any other store's buffer.

A file appears whole or not at all: it is written under a temporary name beside its own, and renamed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specforge.contracts.features import ALIGNMENT, FeatureSpec, aligned
from specforge.data_plane.processes import PROC, ProcessIdentity
from specforge.data_plane.tensors import DTYPES, Columns, Source, write
from specforge.errors import CorruptFeature, FeatureStoreError

SUFFIX = ".safetensors"

CHUNK_BYTES = 1 << 20
"""What is joined, cast or copied from a device goes to the file in pieces of about this size, which stay in a cache."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the public library."""

_FORMAT_DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {theirs: ours for ours, theirs in _FORMAT_DTYPES.items()}
_PAD = "__pad"
_METADATA = "__metadata__"
_TEMPORARY = ".tmp"
_counter = itertools.count(1)


class Header(NamedTuple):
    """What the header of a file says. The sample's buffer is the ``num_bytes`` bytes from ``data_offset`` on."""

    specs: tuple[FeatureSpec, ...]
    num_bytes: int
    data_offset: int
    metadata: dict[str, str]


def write_file(
    path: Path,
    specs: Sequence[FeatureSpec],
    num_bytes: int,
    sources: Mapping[str, Source],
    metadata: Mapping[str, str],
    *,
    fsync: bool,
) -> int:
    """Write ``sources``, laid out as ``specs`` (see ``tensors.specs_of``), to ``path``; the crc32 of the data.

    Replaces a file that is there. Mode 0600. ``fsync``: on the disk, name and all, when this returns. Raises what the
    file system raises (``OSError``, with ENOSPC where it is full) and leaves no temporary file then.
    """
    header = encode_header(specs, num_bytes, metadata)
    temporary, crc = write_temporary(path.parent, header, specs, sources, fsync=fsync, checksum=True)
    with _unlinked_on_error(temporary):
        temporary.replace(path)
    if fsync:
        sync_directory(path.parent)
    return crc


def write_temporary(
    directory: Path,
    header: bytes,
    specs: Sequence[FeatureSpec],
    sources: Mapping[str, Source],
    *,
    fsync: bool,
    checksum: bool = False,
) -> tuple[Path, int]:
    """The file under a temporary name in ``directory``, to be renamed, and the crc32 of its data (0 unless asked for).

    The data is written, not mapped, and the file grows with it: a full disk is an error and not a signal, and a file
    that a power failure cut is short.
    """
    path = directory / f".{_writer(os.getpid())}.{next(_counter)}{_TEMPORARY}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    crc = 0
    with _unlinked_on_error(path):
        with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor: the mode of the file is given above)
            file.write(header)
            for piece in _pieces(specs, sources):
                # Small pieces share a system call; a large one goes from the tensor's own memory to the file.
                file.write(piece)
                crc = zlib.crc32(piece, crc) if checksum else 0
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        return path, crc


def read_header(path: Path) -> Header:
    """Raises ``CorruptFeature``, which names the file and what is wrong, unless header and size of the file agree."""
    with path.open("rb") as file:
        num_file_bytes = os.fstat(file.fileno()).st_size
        data_offset = _data_offset(path, file.read(8), num_file_bytes)
        return _decode(path, file.read(data_offset - 8), num_file_bytes)


def map_file(path: Path) -> tuple[torch.Tensor, Header]:
    """The sample's buffer (uint8 [num_bytes], 64-byte aligned) without a copy, and the header.

    Use ``tensors.views`` for the features. The mapping is private: nothing that is written to the tensor reaches the
    file. It holds no descriptor, lives as long as the tensor and outlives the file's name. Errors as ``read_header``.
    """
    num_file_bytes = path.stat().st_size
    if num_file_bytes < 8:
        raise _corrupt(path, f"it has {num_file_bytes} bytes, and a header has 8 at least")
    try:
        whole = torch.from_file(os.fspath(path), shared=False, size=num_file_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        if path.stat().st_size < num_file_bytes:
            raise _corrupt(path, "it became shorter while it was opened") from error
        path.open("rb").close()
        raise FeatureStoreError(f"{path} cannot be mapped: {error}") from error
    content = whole.numpy().data
    data_offset = _data_offset(path, bytes(content[:8]), num_file_bytes)
    header = _decode(path, bytes(content[8:data_offset]), num_file_bytes)
    return whole[data_offset:], header


def checksum(path: Path) -> int:
    """crc32 of the data of ``path``, as ``write_file`` gave it. Errors as ``read_header``."""
    data_offset = read_header(path).data_offset
    crc = 0
    with path.open("rb") as file:
        file.seek(data_offset)
        while piece := file.read(CHUNK_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def encode_header(specs: Sequence[FeatureSpec], num_bytes: int, metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and padding: everything before the data."""
    fields: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = num_pads = 0
    for spec in specs:
        if spec.name.startswith("__"):
            raise FeatureStoreError(f"feature {spec.name!r}: names that begin with __ belong to the file format")
        if end < spec.offset:
            fields[f"{_PAD}{num_pads}"] = _entry("U8", (spec.offset - end,), end, spec.offset)
            num_pads += 1
        end = spec.offset + spec.num_bytes
        fields[spec.name] = _entry(_FORMAT_DTYPES[spec.dtype], spec.shape, spec.offset, end)
    if end < num_bytes:
        fields[f"{_PAD}{num_pads}"] = _entry("U8", (num_bytes - end,), end, num_bytes)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(aligned(8 + len(text)) - 8)
    return len(text).to_bytes(8, "little") + text


def is_leftover(name: str) -> bool:
    """Whether a file of this name is the temporary file of a writer of this host that is certainly dead."""
    if not (name.startswith(".") and name.endswith(_TEMPORARY)):
        return False
    host, _, rest = name[1:].partition(".")
    identity = ProcessIdentity.parse(rest.partition(".")[0])
    return host == _host() and identity is not None and identity.is_dead()


def sync_directory(directory: Path) -> None:
    """Names in ``directory`` that appeared, changed or went are on the disk when this returns."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=1)
def _writer(_pid: int) -> str:
    """Who writes, for temporary names; asked for once a process."""
    return f"{_host()}.{ProcessIdentity.current()}"


@functools.cache
def _host() -> str:
    """Names this host since it started: two hosts of one mount may have the same PID namespaces and pids."""
    file = PROC / "sys" / "kernel" / "random" / "boot_id"
    return hashlib.sha256((file.read_text() if file.exists() else socket.gethostname()).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _unlinked_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _pieces(specs: Sequence[FeatureSpec], sources: Mapping[str, Source]) -> Iterator[memoryview]:
    """The bytes of the sample's buffer, from its start to its end. A piece is valid until the next one is asked for."""
    padding = memoryview(bytes(ALIGNMENT))
    for spec in specs:
        if spec.num_bytes:
            yield from _pieces_of(spec, sources[spec.name])
            yield padding[: aligned(spec.num_bytes) - spec.num_bytes]


def _pieces_of(spec: FeatureSpec, source: Source) -> Iterator[memoryview]:
    if isinstance(source, torch.Tensor):
        source = source.detach()
        if source.device.type == "cpu" and source.is_contiguous() and not source.is_neg():
            yield _bytes(source)
            return
        if not spec.shape:
            source = source.reshape(1)
    num_rows, *row = spec.shape or (1,)
    num_together = min(num_rows, max(1, CHUNK_BYTES // (spec.num_bytes // num_rows)))
    scratch = torch.empty((num_together, *row), dtype=DTYPES[spec.dtype])
    for start in range(0, num_rows, num_together):
        rows = scratch[: num_rows - start]
        write(rows, _rows(source, start, start + num_together))
        yield _bytes(rows)


def _rows(source: Source, start: int, end: int) -> Source:
    if isinstance(source, torch.Tensor):
        return source[start:end]
    return Columns(tuple(part[start:end] for part in source.parts), source.dtype)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _corrupt(path: Path, reason: str) -> CorruptFeature:
    return CorruptFeature(f"{path} is no whole feature file: {reason}")


def _data_offset(path: Path, length: bytes, num_file_bytes: int) -> int:
    """Where the data starts, from the first 8 bytes of the file."""
    num_header_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or num_header_bytes > min(num_file_bytes - 8, MAX_HEADER_BYTES):
        raise _corrupt(path, f"a header of {num_header_bytes} bytes does not fit into its {num_file_bytes}")
    if num_header_bytes % ALIGNMENT != ALIGNMENT - 8:
        raise _corrupt(path, f"its data starts at byte {8 + num_header_bytes}, which is no multiple of {ALIGNMENT}")
    return 8 + num_header_bytes


def _decode(path: Path, text: bytes, num_file_bytes: int) -> Header:
    """The header whose JSON is ``text``, checked against the size of the file."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _corrupt(path, "its header is no JSON object")
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "its metadata are no strings")
    specs, end = [], 0
    for name, field in fields.items():
        spec = _spec(path, name, field)
        if spec.offset != end:
            raise _corrupt(path, f"tensor {name!r} starts at byte {spec.offset} of the data, expected {end}")
        end += spec.num_bytes
        if not name.startswith(_PAD):
            if spec.offset % ALIGNMENT:
                raise _corrupt(path, f"tensor {name!r} starts at byte {spec.offset}, no multiple of {ALIGNMENT}")
            specs.append(spec)
    data_offset = 8 + len(text)
    if data_offset + end != num_file_bytes:
        raise _corrupt(path, f"it has {num_file_bytes} bytes, its header describes {data_offset + end}")
    return Header(tuple(specs), end, data_offset, metadata)


def _spec(path: Path, name: str, field: Any) -> FeatureSpec:
    match field:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if dtype in _DTYPES:
            if all(type(size) is int and size >= 0 for size in shape):
                spec = FeatureSpec(name, _DTYPES[dtype], tuple(shape), start)
                if spec.num_bytes == end - start:
                    return spec
    raise _corrupt(path, f"tensor {name!r} is described as {str(field)[:200]}")
