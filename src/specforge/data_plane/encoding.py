"""How hidden states travel: as they are, cast by the put, or as float8 with a scale for every token and layer.

Residual streams have a few channels that are hundreds of times larger than the rest, from some layers and tokens on. A
scale for each token and layer keeps those from taking the resolution of any other row. Within a row a floating-point
code needs no more: its relative error does not depend on the size of a value.

Legend: S tokens, n captured layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from specforge.contracts.capture import FLOAT8, SCALE_SUFFIX
from specforge.data_plane.tensors import DTYPES, Columns, Source

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
"""448. Larger values would become NaN."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A scale below it would lose bits of its own."""
DECODED = "bfloat16"
"""What float8 features are decoded to. Every code is exact in it."""
CHUNK_ELEMENTS = 1 << 18
"""Values that are alive in fp32 at once (1 MB, which stays in a CPU's cache)."""


def encoded(name: str, layers: Sequence[Tensor], dtype: str) -> dict[str, Source]:
    """The sources from which ``layers``, each [S, H], are stored as the feature ``name`` [S, n*H] of ``dtype``.

    Nothing is joined or cast for bfloat16 and float32: the put does both. float8 gives ``name`` and its scales.
    """
    if dtype == FLOAT8:
        values, scales = encode(layers)
        return {name: values, name + SCALE_SUFFIX: scales}
    if len(layers) == 1 and layers[0].dtype == DTYPES[dtype]:
        return {name: layers[0]}
    return {name: Columns(tuple(layers), dtype)}


def encode(layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [S, n*H] and float32 scales [S, n] of ``layers``, each [S, H], on their device.

    The scale of a token in a layer is ``max |x| / 448``, or 1 where ``max |x| < 448 * 2**-126``: those become zeros. It
    is NaN or infinite where a value is.

    Error bound: ``x`` times its scale's inverse is rounded to e4m3, 3 bits of mantissa down to ``2**-6`` and steps of
    ``2**-9`` below, so it comes back within ``max(2**-4 * |x|, 2**-10 * scale)`` (and a fp32 rounding), before
    :func:`decode` rounds to bfloat16 (``2**-8`` of the result at most). That is 6.25 % of every value down to a
    28,672th of the largest in its row, and 2.2e-6 of that largest for those below.
    """
    num_tokens, width = layers[0].shape
    values = torch.empty(num_tokens, len(layers) * width, dtype=torch.float8_e4m3fn, device=layers[0].device)
    scales = torch.empty(num_tokens, len(layers), dtype=torch.float32, device=layers[0].device)
    for number, layer in enumerate(layers):
        for rows in _chunks(num_tokens, width):
            wide = layer[rows].detach().float()
            low, high = torch.aminmax(wide, dim=1)
            scale = torch.maximum(-low, high).div_(FLOAT8_MAX)
            scale.masked_fill_(scale < SMALLEST_SCALE, 1.0)
            scales[rows, number] = scale
            values[rows, number * width : (number + 1) * width] = wide / scale[:, None]
    return values, scales


def decode(values: Tensor, scales: Tensor, target: Tensor) -> None:
    """Write ``values`` float8 [S, n*H] times their ``scales`` [S, n] into ``target`` [S, n*H], in one pass.

    ``values`` may hold no NaN, which :func:`encode` writes only beside a scale that is none either.
    """
    for rows in _chunks(*values.shape):
        # Sign, 4 bits of exponent and 3 of mantissa at their places in a float16 give value * 2**-8, exactly; PyTorch's
        # own conversion goes value by value on a CPU.
        bits = values[rows].view(torch.int8).to(torch.int16)
        bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        wide = bits.view(torch.float16).float()
        wide.unflatten(1, (scales.shape[1], -1)).mul_(scales[rows, :, None] * 2**8)
        target[rows] = wide


def not_finite(sources: Mapping[str, Source]) -> str | None:
    """Name of the first feature with a NaN, an infinity, or a value that becomes one when the put casts it.

    float8 features are judged by their scales, which are not finite where a value was not.
    """
    for name, source in sources.items():
        parts, dtype = (
            (source.parts, DTYPES[source.dtype]) if isinstance(source, Columns) else ((source,), source.dtype)
        )
        if dtype.is_floating_point and dtype != torch.float8_e4m3fn:
            largest = torch.finfo(dtype).max
            if not all(_within(part, largest) for part in parts):
                return name.removesuffix(SCALE_SUFFIX)
    return None


def _within(tensor: Tensor, largest: float) -> bool:
    """Whether all of ``tensor`` is in [-largest, largest]; a NaN is not, since it spreads to both ends."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return -largest <= low.item() and high.item() <= largest


def _chunks(num_tokens: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, num_tokens, step))
