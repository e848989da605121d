"""Projections of a draft's attention, whatever its architecture and its input.

Each starts with one linear map of the layer's input, so a layer whose input is a concatenation (EAGLE-3) can project
the pieces apart and add them.

Legend: R rows, I input size, H hidden size of the draft, F projected features, n query heads, m key/value heads,
d size of a query or key head, e size of a value head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor, nn

from specforge.algorithms.parts.architectures import ArchitectureConfig, draft_architecture
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.rotary import Rotary, rotate
from specforge.errors import DraftError


class DraftAttention(nn.Module, ABC):
    """Weights under their served names. The attention itself is softmax(q k / sqrt(d)) in every architecture."""

    num_heads: int
    num_groups: int
    head_dim: int
    value_dim: int
    num_query_features: int
    rotary: Rotary
    o_proj: nn.Linear

    @abstractmethod
    def __init__(self, config: ArchitectureConfig, input_size: int) -> None: ...

    @abstractmethod
    def input_weight(self) -> Tensor:
        """[F, I]: the maps that read the layer's input, joined; the first ``num_query_features`` are the queries'."""

    @abstractmethod
    def queries(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[.., query features] -> [.., n, d], turned by the rotary ``angles`` of the rows."""

    @abstractmethod
    def keys_values(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[.., other features] -> [.., m, d] and [.., m, e], the keys turned by the rotary ``angles`` of the rows."""


class GroupedQueryAttention(DraftAttention):
    """The attention of Llama."""

    qk_norm: ClassVar[bool] = False

    def __init__(self, config: ArchitectureConfig, input_size: int) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.value_dim = config.head_dim
        self.num_query_features = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, self.num_query_features, bias=False)
        self.k_proj = nn.Linear(input_size, self.num_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.num_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_query_features, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if self.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if self.qk_norm else nn.Identity()
        self.rotary = Rotary(self.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    def input_weight(self) -> Tensor:
        return torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))

    def queries(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.q_norm(projected.unflatten(-1, (self.num_heads, self.head_dim))), *angles)

    def keys_values(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = projected.unflatten(-1, (2, self.num_groups, self.head_dim)).unbind(-3)
        return rotate(self.k_norm(keys), *angles), values


class NormedGroupedQueryAttention(GroupedQueryAttention):
    """The attention of Qwen3: an RMSNorm on every query and key head before they are rotated."""

    qk_norm = True


def build_attention(config: ArchitectureConfig, input_size: int) -> DraftAttention:
    """The attention of the config's architecture. Raises :class:`DraftError` where its weights are not as it says."""
    architecture = draft_architecture(config.architecture)
    architecture.check(config)
    module, _, name = architecture.attention.partition(":")
    attention: DraftAttention = getattr(import_module(module), name)(config, input_size)
    built = {name: tuple(weight.shape) for name, weight in attention.named_parameters()}
    if built != architecture.shapes(config, input_size):
        raise DraftError(
            f"the draft architecture {config.architecture!r} names the weights "
            f"{architecture.shapes(config, input_size)}, its attention has {built}; repair the package that adds it"
        )
    return attention
