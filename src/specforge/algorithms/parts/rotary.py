"""Rotary position embedding in the half-rotation ("neox") form, with the scalings that targets use.

Legend: d head size, h = d // 2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specforge.errors import TargetError


class Rotary:
    """Angles of one head size. Holds Python floats only, so that no dtype or device cast can round them.

    ``scaling`` is the target's own record (``rope_type`` or ``type``, plus the numbers of that type) or ``None``.
    Raises :class:`TargetError` for a type that is not one of :data:`ROPE_TYPES`.
    """

    def __init__(self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_positions: int) -> None:
        values = dict(scaling or {})
        kind = str(values.get("rope_type", values.get("type", "default")))
        if kind not in ROPE_TYPES:
            raise TargetError(
                f"the target scales its rotary embedding by {kind!r}, which a draft cannot follow; "
                f"supported types are {', '.join(sorted(ROPE_TYPES))}; choose another target"
            )
        plain = [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        try:
            self.inverse_frequencies, self.attention_factor = ROPE_TYPES[kind](plain, theta, values, max_positions)
        except KeyError as error:
            raise TargetError(
                f"the target's rotary scaling of type {kind!r} lacks {error.args[0]!r}; "
                "add it to the target's config.json"
            ) from None
        self._on_device: dict[torch.device, Tensor] = {}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``positions`` [..], each [.., h], fp32."""
        frequencies = self._on_device.get(positions.device)
        if frequencies is None:
            frequencies = torch.tensor(self.inverse_frequencies, dtype=torch.float32, device=positions.device)
            self._on_device[positions.device] = frequencies
        angles = positions.float().unsqueeze(-1) * frequencies
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [.., heads, d] turned by the angles of its row, ``cos`` and ``sin`` [.., h]."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    if torch.compiler.is_compiling():
        # a compiler makes one pass of this, and cannot follow writes to halves of a tensor
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    if not torch.is_grad_enabled():
        return _turn(x, cos, sin)
    output: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return output


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(upstream[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x[..., :half], cos, out=output[..., :half]).addcmul_(x[..., half:], sin, value=-1.0)
    torch.mul(x[..., half:], cos, out=output[..., half:]).addcmul_(x[..., :half], sin)
    return output


def _default(plain: list[float], _theta: float, _values: dict[str, Any], _max: int) -> tuple[list[float], float]:
    return plain, 1.0


def _linear(plain: list[float], _theta: float, values: dict[str, Any], _max: int) -> tuple[list[float], float]:
    """Positions divided by ``factor`` (Chen et al., arXiv 2306.15595)."""
    return [f / float(values["factor"]) for f in plain], 1.0


def _llama3(plain: list[float], _theta: float, values: dict[str, Any], _max: int) -> tuple[list[float], float]:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a linear blend between."""
    factor = float(values["factor"])
    low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
    original = float(values["original_max_position_embeddings"])
    scaled = []
    for frequency in plain:
        turns = original * frequency / (2.0 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        scaled.append((1.0 - kept) * frequency / factor + kept * frequency)
    return scaled, 1.0


def _yarn(plain: list[float], theta: float, values: dict[str, Any], max_positions: int) -> tuple[list[float], float]:
    """YaRN (Peng et al., arXiv 2309.00071, section 3.2 and equation 22)."""
    factor = float(values["factor"])
    original = float(values.get("original_max_position_embeddings") or max_positions)
    half = len(plain)

    def dimension(turns: float) -> float:
        return half * math.log(original / (turns * 2.0 * math.pi)) / math.log(theta)

    low = dimension(float(values.get("beta_fast") or 32.0))
    high = dimension(float(values.get("beta_slow") or 1.0))
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    scaled = []
    for i, frequency in enumerate(plain):
        interpolated = min(1.0, max(0.0, (i - low) / max(high - low, 0.001)))
        scaled.append(interpolated * frequency / factor + (1.0 - interpolated) * frequency)
    return scaled, _yarn_attention_factor(values, factor)


def _yarn_attention_factor(values: dict[str, Any], factor: float) -> float:
    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0

    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(float(values["mscale"])) / scale(float(values["mscale_all_dim"]))
    return scale(1.0)


_Scaling = Callable[[list[float], float, dict[str, Any], int], tuple[list[float], float]]

ROPE_TYPES: dict[str, _Scaling] = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
