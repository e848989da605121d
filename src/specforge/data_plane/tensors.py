"""From tensors to specs and back: the layout of ``contracts.features`` over real tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from specforge.contracts.features import ALIGNMENT, ITEM_BYTES, FeatureSpec, layout
from specforge.contracts.refs import SampleRef
from specforge.errors import CorruptFeature, FeatureStoreError

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""The torch dtype of every name in ``ITEM_BYTES``."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Columns:
    """Tensors [S, D_i] that a store keeps side by side as one feature [S, sum of D_i] of ``dtype``.

    Nothing is joined or cast before the put, whose one copy into the store's buffer does both.
    """

    parts: tuple[torch.Tensor, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)


Source = torch.Tensor | Columns
"""What a feature is put from."""


def specs_of(sources: Mapping[str, Source]) -> tuple[tuple[FeatureSpec, ...], int]:
    """Specs of ``sources`` in mapping order, and the size of their buffer in bytes.

    Raises ``FeatureStoreError`` for a dtype that may not travel.
    """
    return layout((name, _dtype_name(name, source), tuple(source.shape)) for name, source in sources.items())


def fill(buffer: torch.Tensor, specs: Sequence[FeatureSpec], sources: Mapping[str, Source]) -> None:
    """The one copy of a put: ``sources`` into ``buffer`` (uint8, as large as the layout), joined and cast."""
    for name, view in views(buffer, specs).items():
        write(view, sources[name])


def write(target: torch.Tensor, source: Source) -> None:
    """Copy ``source`` into ``target``, which has its shape and dtype."""
    if isinstance(source, torch.Tensor):
        target.copy_(source.detach())
        return
    start = 0
    for part in source.parts:
        target[:, start : start + part.shape[1]].copy_(part.detach())
        start += part.shape[1]


def materialised(source: Source) -> torch.Tensor:
    """``source`` as one tensor: itself where it is one."""
    if isinstance(source, torch.Tensor):
        return source.detach()
    tensor = torch.empty(source.shape, dtype=DTYPES[source.dtype], device=source.parts[0].device)
    write(tensor, source)
    return tensor


def _dtype_name(name: str, source: Source) -> str:
    if isinstance(source, Columns):
        return source.dtype
    if source.dtype not in _NAMES:
        raise FeatureStoreError(
            f"feature {name!r} has dtype {source.dtype}, which may not travel: cast it to one of {sorted(DTYPES)}"
        )
    return _NAMES[source.dtype]


def views(buffer: torch.Tensor, specs: Sequence[FeatureSpec]) -> dict[str, torch.Tensor]:
    """Typed tensors over ``buffer`` (uint8 [bytes of the sample], 64-byte aligned), without a copy."""
    typed = {name: buffer.view(DTYPES[name]) for name in {spec.dtype for spec in specs if spec.num_bytes}}
    tensors = {}
    for spec in specs:
        if spec.num_bytes:
            whole = typed[spec.dtype]
            start = whole.storage_offset() + spec.offset // whole.element_size()
            tensors[spec.name] = whole.as_strided(spec.shape, _contiguous_strides(spec.shape), start)
        else:
            tensors[spec.name] = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    return tensors


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def check_specs(ref: SampleRef) -> None:
    """Raise ``CorruptFeature`` unless every feature of ``ref`` lies, aligned, inside its ``num_bytes``."""
    for spec in ref.features:
        if (
            spec.dtype not in ITEM_BYTES
            or min(spec.shape, default=0) < 0
            or spec.offset < 0
            or spec.offset % ALIGNMENT
            or spec.offset + spec.num_bytes > ref.num_bytes
        ):
            raise CorruptFeature(
                f"sample {ref.sample_id!r}: feature {spec.name!r} ({spec.dtype} {list(spec.shape)} at byte "
                f"{spec.offset}) does not fit its buffer of {ref.num_bytes} bytes"
            )
