"""Domino: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from specforge.algorithms.parts.block_config import BlockDraftConfig, BlockOptions


@dataclass(frozen=True, kw_only=True)
class DominoDraftConfig(BlockDraftConfig):
    """The architecture of one Domino draft: a block-diffusion backbone and a correction that reads drafted tokens.

    ``shift_label``: slot ``k`` predicts the token after its own position instead of the token at it. The first
    ``pure_draft_prefix_len`` proposals of a block are the backbone's alone.
    """

    emb_dim: int = 256
    gru_hidden_dim: int = 1024
    pure_draft_prefix_len: int = 1
    shift_label: bool = True

    @property
    def first_label(self) -> int:
        """The first slot of a block that predicts anything."""
        return 0 if self.shift_label else 1

    @property
    def num_proposals(self) -> int:
        """Tokens that one block drafts. With ``shift_label`` the last slot is trained and drafts nothing."""
        return self.block_size - 1

    @property
    def num_parameters(self) -> int:
        gru = 3 * self.gru_hidden_dim * (self.hidden_size + self.gru_hidden_dim)
        projection = self.emb_dim * (self.hidden_size + self.gru_hidden_dim + self.vocab_size)
        return super().num_parameters + gru + projection


class DominoOptions(BlockOptions):
    """Options of Domino training (``algorithm`` section of a run). Sizes default to the target's own."""

    name: Literal["domino"] = Field("domino", description="The algorithm these options belong to.")
    emb_dim: PositiveInt = Field(256, description="Width between the two matrices of the correction.")
    gru_hidden_dim: PositiveInt = Field(1024, description="State size of the GRU that reads the drafted tokens.")
    pure_draft_prefix_len: NonNegativeInt = Field(
        1, description="Proposals at the start of a block that are not corrected."
    )
    shift_label: bool = Field(
        True, description="Slot k predicts the token after its position (the only served form); false: the token at it."
    )
    lambda_start: float = Field(
        1.0, ge=0.0, description="Weight of the uncorrected loss at the first step (above 1 it stays at 1 for a while)."
    )
    lambda_decay_ratio: float = Field(
        0.5, gt=0.0, description="Share of all optimizer steps over which that weight falls to 0, linearly."
    )

    @model_validator(mode="after")
    def _some_proposals_are_corrected(self) -> Self:
        if self.pure_draft_prefix_len > self.block_size - 2:
            raise ValueError(
                f"pure_draft_prefix_len is {self.pure_draft_prefix_len}: no proposal of a block of {self.block_size} "
                f"is corrected; use at most {self.block_size - 2}, or the algorithm dflash"
            )
        return self
