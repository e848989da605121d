"""DSpark: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from specforge.algorithms.parts.block_config import BlockDraftConfig, BlockOptions

MarkovHeadType = Literal["vanilla", "gated", "rnn"]


@dataclass(frozen=True, kw_only=True)
class DSparkDraftConfig(BlockDraftConfig):
    """The architecture of one DSpark draft: a block-diffusion backbone, a bias from the previous token, a confidence.

    A ``markov_rank`` of 0 means no bias.
    """

    markov_rank: int = 256
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True

    @property
    def num_proposals(self) -> int:
        """Tokens that one block drafts."""
        return self.block_size

    @property
    def num_parameters(self) -> int:
        hidden, rank = self.hidden_size, self.markov_rank
        count = super().num_parameters + 2 * self.vocab_size * rank
        if rank and self.markov_head_type == "gated":
            count += rank * (hidden + rank) + rank
        if rank and self.markov_head_type == "rnn":
            count += 3 * rank * (hidden + 2 * rank) + 3 * rank
        if self.enable_confidence_head:
            count += hidden + self.confidence_head_with_markov * rank + 1
        return count


class DSparkOptions(BlockOptions):
    """Options of DSpark training (``algorithm`` section of a run). Sizes default to the target's own."""

    name: Literal["dspark"] = Field("dspark", description="The algorithm these options belong to.")
    block_size: int = Field(7, ge=2, description="Slots of a block: tokens drafted in one pass.")
    markov_rank: NonNegativeInt = Field(256, description="Rank of the bias from the previous token; 0: no bias.")
    markov_head_type: MarkovHeadType = Field(
        "vanilla", description="The bias reads the previous token alone, or also the slot's state (gated, rnn)."
    )
    enable_confidence_head: bool = Field(True, description="Predict how likely each proposal is accepted.")
    confidence_head_with_markov: bool = Field(True, description="That prediction also reads the previous token.")
    ce_weight: NonNegativeFloat = Field(0.1, description="Factor of the cross entropy against the text.")
    l1_weight: NonNegativeFloat = Field(0.9, description="Factor of the L1 distance to the target's distribution.")
    confidence_weight: NonNegativeFloat = Field(
        1.0, description="Factor of the confidence head's loss; nothing without that head."
    )
    confidence_threshold: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Drafting stops before the first proposal whose predicted acceptance is below; 0: never.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if not self.markov_rank and self.enable_confidence_head and self.confidence_head_with_markov:
            raise ValueError(
                "markov_rank is 0, so there is no embedding of the previous token for the confidence head; "
                "set confidence_head_with_markov=false or a markov_rank above 0"
            )
        if self.confidence_threshold > 0 and not self.enable_confidence_head:
            raise ValueError(
                f"confidence_threshold is {self.confidence_threshold} without a confidence head; "
                "set enable_confidence_head=true or leave the threshold at 0"
            )
        if self.confidence_threshold > 0 and not self.confidence_weight:
            raise ValueError(
                f"confidence_threshold is {self.confidence_threshold}, but confidence_weight is 0, so nothing teaches "
                "the confidence; set a confidence_weight above 0 or leave the threshold at 0"
            )
        if self.ce_weight == self.l1_weight == 0:
            raise ValueError("ce_weight and l1_weight are both 0: nothing teaches the draft; set one above 0")
        return self
