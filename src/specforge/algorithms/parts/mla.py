"""Multi-head latent attention of a draft (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Rotated dimensions are kept in the half-rotation order of :mod:`~specforge.algorithms.parts.rotary`. Engines read
DeepSeek checkpoints, which store them interleaved (dimension i beside i + h): an export passes its weights through
:func:`interleaved`, an import through :func:`half_rotated`; nothing else differs.

Legend: R rows, n heads, d = nope + rope size of a query or key head, e of a value head, h = rope / 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specforge.algorithms.parts.architectures import ArchitectureConfig, LatentSizes
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.projections import DraftAttention
from specforge.algorithms.parts.rotary import Rotary, rotate


class LatentAttention(DraftAttention):
    """Every head has its own keys and values; their rotated part is one for all heads."""

    def __init__(self, config: ArchitectureConfig, input_size: int) -> None:
        nn.Module.__init__(self)
        sizes = LatentSizes.of(config)
        self.sizes = sizes
        self.num_heads = self.num_groups = config.num_attention_heads
        self.head_dim, self.value_dim = sizes.nope + sizes.rope, sizes.value
        self.num_query_features = sizes.q_rank
        self.q_a_proj = nn.Linear(input_size, sizes.q_rank, bias=False)
        self.q_a_layernorm = RMSNorm(sizes.q_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(sizes.q_rank, self.num_heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(input_size, sizes.kv_rank + sizes.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(sizes.kv_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(sizes.kv_rank, self.num_heads * (sizes.nope + sizes.value), bias=False)
        self.o_proj = nn.Linear(self.num_heads * sizes.value, config.hidden_size, bias=False)
        self.rotary = Rotary(sizes.rope, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
        self.score_factor = _score_factor(config.rope_scaling)

    def input_weight(self) -> Tensor:
        return torch.cat((self.q_a_proj.weight, self.kv_a_proj_with_mqa.weight))

    def queries(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.q_b_proj(self.q_a_layernorm(projected)).unflatten(-1, (self.num_heads, self.head_dim))
        fixed, turning = heads.split((self.sizes.nope, self.sizes.rope), dim=-1)
        joined = torch.cat((fixed, rotate(turning, *angles)), dim=-1)
        return joined if self.score_factor == 1.0 else joined * self.score_factor

    def keys_values(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latent, turning = projected.split((self.sizes.kv_rank, self.sizes.rope), dim=-1)
        heads = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.num_heads, -1))
        fixed, values = heads.split((self.sizes.nope, self.sizes.value), dim=-1)
        shared = rotate(turning.unsqueeze(-2), *angles).expand(*fixed.shape[:-1], -1)
        return torch.cat((fixed, shared), dim=-1), values


def _score_factor(scaling: Mapping[str, Any] | None) -> float:
    """What DeepSeek multiplies the attention scale by under YaRN: ``(0.1 * mscale_all_dim * ln(factor) + 1)**2``."""
    values = scaling or {}
    multiplier, factor = float(values.get("mscale_all_dim") or 0.0), float(values.get("factor") or 1.0)
    if values.get("rope_type", values.get("type")) != "yarn" or multiplier == 0.0 or factor <= 1.0:
        return 1.0
    return (0.1 * multiplier * math.log(factor) + 1.0) ** 2


def interleaved(state: Mapping[str, Tensor], config: ArchitectureConfig) -> dict[str, Tensor]:
    """``state`` with the rotated rows in the order in which DeepSeek checkpoints store them."""
    half = LatentSizes.of(config).rope // 2
    return _reordered(state, config, torch.arange(2 * half).view(2, half).t().flatten())


def half_rotated(state: Mapping[str, Tensor], config: ArchitectureConfig) -> dict[str, Tensor]:
    """The inverse of :func:`interleaved`."""
    half = LatentSizes.of(config).rope // 2
    return _reordered(state, config, torch.arange(2 * half).view(half, 2).t().flatten())


def _reordered(state: Mapping[str, Tensor], config: ArchitectureConfig, order: Tensor) -> dict[str, Tensor]:
    sizes, result = LatentSizes.of(config), dict(state)
    rows = {
        "q_b_proj.weight": _head_rows(config.num_attention_heads, sizes.nope, order),
        "kv_a_proj_with_mqa.weight": _head_rows(1, sizes.kv_rank, order),
    }
    for name, tensor in state.items():
        for ending, index in rows.items():
            if name.endswith(ending):
                result[name] = tensor[index.to(tensor.device)]
    return result


def _head_rows(num_heads: int, num_fixed: int, order: Tensor) -> Tensor:
    """Row of every head in turn: ``num_fixed`` rows as they are, then those of ``order``."""
    head = torch.cat((torch.arange(num_fixed), num_fixed + order))
    return (torch.arange(num_heads).unsqueeze(-1) * head.numel() + head).flatten()
