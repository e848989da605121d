"""P-EAGLE: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from specforge.algorithms.draft_config import DraftConfig, SizeOptions


@dataclass(frozen=True, kw_only=True)
class PEagleDraftConfig(DraftConfig):
    """The architecture of one P-EAGLE draft. ``mask_token_id`` is the embedding row that stands for unknown tokens."""

    num_layers: int = 4
    mask_token_id: int

    @property
    def num_parameters(self) -> int:
        hidden, fused = self.hidden_size, len(self.aux_layers) * self.target_hidden_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * self.intermediate_size + 2 * hidden
        first = hidden * (queries + 2 * keys) + hidden
        tables = (self.draft_vocab_size + self.vocab_size) * hidden
        return hidden * fused + fused + self.num_layers * layer + first + hidden + tables


class PEagleOptions(SizeOptions):
    """Options of P-EAGLE training (``algorithm`` section of a run). Sizes default to the target's own."""

    name: Literal["peagle"] = Field("peagle", description="The algorithm these options belong to.")
    num_depths: PositiveInt = Field(8, description="Tokens drafted in one pass in training, the first included.")
    num_layers: PositiveInt = Field(4, description="Decoder layers of the draft.")
    cod_ratio: float = Field(
        0.8, gt=0.0, le=1.0, description="Share of the supervised positions that is drawn at depth d: cod_ratio**d."
    )
    cod_min_ratio: float = Field(0.2, ge=0.0, le=1.0, description="The share never falls below this.")
    mask_offset: Literal[0, 1, 2] = Field(
        2,
        description="Position j is supervised where the loss mask of token j + offset is set. 2 is the token that it "
        "predicts; 0 and 1 are the alignments of public trainers.",
    )
    mask_token_id: NonNegativeInt | None = Field(
        None,
        description="Token whose embedding stands for unknown tokens; null: as for block drafts, the "
        "tokenizer's mask token, else an unused row.",
    )
    freeze_lm_head: bool = Field(False, description="Keep the draft's output head at the target's rows.")
    draft_vocab_size: PositiveInt | None = Field(
        None, description="Size of the pruned draft vocabulary; null keeps the target's vocabulary."
    )
    aux_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        description="Target layers whose outputs feed the draft, 0-based 'output of layer i'; null takes "
        "[1, L//2 - 1, L - 4] for a target of L layers.",
    )
