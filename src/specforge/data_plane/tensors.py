"""From tensors to specs and back: the layout of ``contracts.features`` over real tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def specs_of(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[FeatureSpec, ...], int]:
    """Specs of ``tensors`` in mapping order, and the size of their buffer in bytes.

    Raises ``FeatureStoreError`` for a dtype that may not travel.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise FeatureStoreError(
                f"feature {name!r} has dtype {tensor.dtype}, which may not travel: cast it to one of {sorted(DTYPES)}"
            )
    return layout((name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items())


def views(buffer: torch.Tensor, specs: Sequence[FeatureSpec]) -> dict[str, torch.Tensor]:
    """Typed tensors over ``buffer`` (uint8 [bytes of the sample], 64-byte aligned), without a copy."""
    tensors = {}
    for spec in specs:
        dtype = DTYPES[spec.dtype]
        if spec.num_bytes:
            flat = buffer[spec.offset : spec.offset + spec.num_bytes].view(dtype)
            tensors[spec.name] = flat.view(spec.shape)
        else:
            tensors[spec.name] = torch.empty(spec.shape, dtype=dtype)
    return tensors


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
