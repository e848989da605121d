"""What drafts that fill a block of masked slots have in common: architecture and options. Imports no tensor library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from specforge.algorithms.draft_config import DraftConfig, SizeOptions, checked_layers
from specforge.contracts.capture import TargetInfo
from specforge.errors import ConfigError, DraftError

FULL, SLIDING = "full_attention", "sliding_attention"
LayerId = Annotated[int, Field(ge=0)]
LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, kw_only=True)
class BlockDraftConfig(DraftConfig):
    """A backbone of ``num_layers`` Qwen3-like layers over blocks of ``block_size`` slots.

    ``mask_token_id`` is the row of the target's embedding that stands in every slot but the first. ``layer_types`` has
    one of ``full_attention`` and ``sliding_attention`` a layer; ``sliding_window`` is the number of positions that a
    sliding layer sees, its own included.
    """

    num_layers: int
    block_size: int
    mask_token_id: int
    layer_types: tuple[str, ...]
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if len(self.layer_types) != self.num_layers or set(self.layer_types) - {FULL, SLIDING}:
            raise DraftError(
                f"layer_types must name {self.num_layers} layers {FULL} or {SLIDING}, got {list(self.layer_types)}; "
                "change the draft config"
            )
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise DraftError(f"a layer of type {SLIDING} needs sliding_window, got none; change the draft config")

    @property
    def num_parameters(self) -> int:
        hidden, fused = self.hidden_size, len(self.aux_layers) * self.target_hidden_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = (
            hidden * (queries + 2 * keys)
            + queries * hidden
            + 3 * hidden * self.intermediate_size
            + 2 * hidden
            + 2 * self.head_dim
        )
        return hidden * fused + 2 * hidden + self.num_layers * layer

    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer, ``None`` for a full one."""
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types)


class BlockOptions(SizeOptions):
    """Options that all block drafts share."""

    block_size: int = Field(
        16, ge=2, description="Slots of a block; the first holds the last committed token, the others are masked."
    )
    num_layers: PositiveInt = Field(5, description="Decoder layers of the draft.")
    num_anchors: PositiveInt = Field(
        512,
        description="Blocks that are drawn of every sample in every epoch; all possible ones where there are fewer.",
    )
    gamma: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | Literal["uniform"] | None = Field(
        None,
        description="The loss of the k-th trained slot of a block weighs exp(-k / gamma), k from 0; uniform: all weigh "
        "1; null: 7 for blocks of 16 and more, 5 for 10 to 15, 4 below.",
    )
    mask_token_id: int | None = Field(
        None,
        ge=0,
        description="Token whose embedding stands in the masked slots; null: the tokenizer's mask token, else the "
        "first row that it does not know, else a stop token. A token of the text is a poor choice.",
    )
    aux_layers: tuple[LayerId, ...] | None = Field(
        None,
        description="Target layers whose outputs are the context, 0-based 'output of layer i'; null spreads as many as "
        "the draft has layers from 1 to L - 3 (one: L // 2) for a target of L layers.",
    )
    layer_types: tuple[LayerType, ...] | None = Field(
        None, description="Attention of each layer of the draft, full_attention or sliding_attention; null: all full."
    )
    sliding_window: PositiveInt | None = Field(
        None, description="Positions that a sliding layer sees, the slot's own included; such a layer is causal."
    )

    @model_validator(mode="after")
    def _layer_types_fit(self) -> BlockOptions:
        types = self.layer_types or ()
        if types and len(types) != self.num_layers:
            raise ValueError(f"layer_types must have an entry for each of {self.num_layers} layers, got {len(types)}")
        if (SLIDING in types) != (self.sliding_window is not None):
            raise ValueError(f"sliding_window belongs to layer_types with {SLIDING}: set both or neither")
        return self

    def block_fields(self, target: TargetInfo, algorithm: str) -> dict[str, Any]:
        """All fields of :class:`BlockDraftConfig` for ``target``. Raises :class:`ConfigError`, naming ``algorithm``."""
        mask = target.unused_token_id if self.mask_token_id is None else self.mask_token_id
        if mask >= target.vocab_size:
            raise ConfigError(
                f"mask_token_id must be a row of the target's embedding, 0 to {target.vocab_size - 1}, got {mask}; "
                "choose an unused row or leave it out"
            )
        default = default_block_layers(target.num_layers, self.num_layers)
        return {
            **self.sizes(target),
            "draft_vocab_size": target.vocab_size,
            "aux_layers": checked_layers(self.aux_layers, default, target.num_layers, algorithm),
            "num_layers": self.num_layers,
            "block_size": self.block_size,
            "mask_token_id": mask,
            "layer_types": self.layer_types or (FULL,) * self.num_layers,
            "sliding_window": self.sliding_window,
        }

    def slot_weights(self, num_slots: int) -> tuple[float, ...]:
        """``exp(-k / gamma)`` for ``k = 0 .. num_slots - 1``: the weights of the trained slots of a block."""
        gamma = default_gamma(self.block_size) if self.gamma is None else self.gamma
        return tuple(1.0 if gamma == "uniform" else math.exp(-k / gamma) for k in range(num_slots))


def default_gamma(block_size: int) -> float:
    """The published decays of DFlash: 7 for blocks of 16, 5 for 10, 4 for 8."""
    return 7.0 if block_size >= 16 else 5.0 if block_size >= 10 else 4.0


def default_block_layers(num_layers: int, n: int) -> tuple[int, ...]:
    """``n`` ids "output of layer i" of a target of ``num_layers``: the middle one, or evenly from 1 to L - 3.

    Rounded half to even, as the published drafts were.
    """
    if n == 1:
        return (num_layers // 2,)
    return tuple(round(1 + k * (num_layers - 4) / (n - 1)) for k in range(n))
