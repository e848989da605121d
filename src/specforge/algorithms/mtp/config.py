"""MTP: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveInt

from specforge.algorithms.draft_config import DraftConfig, SizeOptions

QK_NORM_MODEL_TYPES = frozenset({"qwen3", "qwen3_moe"})
"""Targets whose attention norms every query and key head."""


@dataclass(frozen=True, kw_only=True)
class MtpDraftConfig(DraftConfig):
    """The architecture of one MTP draft. ``qk_norm`` puts an RMSNorm on every query and key head before RoPE."""

    qk_norm: bool = False

    @property
    def num_parameters(self) -> int:
        hidden = self.hidden_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        matrices = 2 * hidden * hidden + 2 * hidden * (queries + keys) + 3 * hidden * self.intermediate_size
        return matrices + 5 * hidden + 2 * self.qk_norm * self.head_dim


class MtpOptions(SizeOptions):
    """Options of MTP training (``algorithm`` section of a run). Sizes default to the target's own."""

    name: Literal["mtp"] = Field("mtp", description="The algorithm these options belong to.")
    num_steps: PositiveInt = Field(3, description="Times the layer is applied: tokens drafted in training.")
    step_decay: float = Field(
        0.6, gt=0.0, le=1.0, description="Weight of step k in the loss is step_decay**k, normalised to a sum of 1."
    )
    init_from_target: bool = Field(
        True,
        description="Start from a copy of the target's last decoder layer and final norm; false: random weights.",
    )
    qk_norm: bool | None = Field(
        None, description="RMSNorm on query and key heads before RoPE; null takes what the target's family has."
    )
