"""FeatureSpec and FeatureHandle: names, dtypes, shapes and offsets of tensors inside one sample's buffer.

A sample is one contiguous buffer; every feature starts at a multiple of ``ALIGNMENT`` bytes. The layout is a pure
function of names, dtypes and shapes, so writer and reader never exchange it out of band.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 64

ITEM_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element for every dtype that may travel."""


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """One tensor in a sample's buffer. ``offset`` is in bytes from the start of the buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class FeatureHandle:
    """A reader's claim on the features of one (sample, generation); returned by ``get``, given to ``release``.

    While a handle lives, the tensors that came with it stay valid, even if the features are freed meanwhile.
    """

    store: str
    sample_id: str
    generation: int
    token: int


def aligned(num_bytes: int) -> int:
    """``num_bytes`` rounded up to a multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def layout(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[tuple[FeatureSpec, ...], int]:
    """Specs of (name, dtype, shape) placed one after the other, and the size of the whole buffer in bytes."""
    specs: list[FeatureSpec] = []
    offset = 0
    for name, dtype, shape in tensors:
        spec = FeatureSpec(name, dtype, tuple(shape), offset)
        specs.append(spec)
        offset = aligned(offset + spec.num_bytes)
    return tuple(specs), offset
