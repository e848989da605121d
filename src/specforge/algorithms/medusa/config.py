"""Medusa: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from specforge.algorithms.draft_config import DraftConfig


@dataclass(frozen=True, kw_only=True)
class MedusaDraftConfig(DraftConfig):
    """The architecture of one Medusa draft: ``num_heads`` heads of ``num_blocks`` residual blocks each.

    ``shared_head``: all heads read out through the target's own output head, and the draft has none. The attention and
    MLP sizes are the target's; a draft without layers does not use them.
    """

    num_heads: int
    num_blocks: int = 1
    shared_head: bool = False

    @property
    def num_parameters(self) -> int:
        block = self.hidden_size * self.hidden_size + self.hidden_size
        head = 0 if self.shared_head else self.draft_vocab_size * self.hidden_size
        return self.num_heads * (self.num_blocks * block + head)


class MedusaOptions(BaseModel):
    """Options of Medusa training (``algorithm`` section of a run)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["medusa"] = Field("medusa", description="The algorithm these options belong to.")
    num_heads: PositiveInt = Field(4, description="Heads: tokens drafted in a chain.")
    num_blocks: PositiveInt = Field(1, description="Residual blocks of each head.")
    shared_head: bool = Field(
        False, description="All heads read out through the target's frozen head instead of each having its own."
    )
    head_decay: float = Field(
        0.8, gt=0.0, le=1.0, description="Weight of head k (from 0) in the loss is head_decay**k (not normalised)."
    )
    loss: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: cross entropy against the token of the text; soft: against the target's distribution.",
    )
