"""DFlash: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from specforge.algorithms.parts.block_config import BlockDraftConfig, BlockOptions

LossType = Literal["dflash", "dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"]


@dataclass(frozen=True, kw_only=True)
class DFlashDraftConfig(BlockDraftConfig):
    """The architecture of one DFlash draft: the backbone and nothing else."""


class DFlashOptions(BlockOptions):
    """Options of DFlash training (``algorithm`` section of a run). Sizes default to the target's own."""

    name: Literal["dflash"] = Field("dflash", description="The algorithm these options belong to.")
    loss_type: LossType = Field(
        "dflash",
        description="dflash: cross entropy weighted by the slot (gamma). dpace: weighted by what the slot adds to the "
        "accepted length, from the draft's own confidences; the other two take one of its two factors.",
    )
    dpace_alpha: float = Field(
        0.5, ge=0.0, le=1.0, description="D-PACE: confidences are mixed with 1 by this share; 1 ignores them."
    )

    @model_validator(mode="after")
    def _options_of_the_loss(self) -> Self:
        plain = self.loss_type == "dflash"
        if plain and self.dpace_alpha != type(self).model_fields["dpace_alpha"].default:
            raise ValueError("dpace_alpha belongs to the dpace losses, but loss_type is dflash")
        if not plain and self.gamma is not None:
            raise ValueError(
                f"gamma belongs to loss_type dflash, but it is {self.loss_type}, which weighs by confidence"
            )
        return self
