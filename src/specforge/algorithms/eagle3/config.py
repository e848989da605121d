"""EAGLE-3: the architecture of a draft and the options of a run. Imports no tensor library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from specforge.algorithms.parts.architectures import (
    ArchitectureConfig,
    ArchitectureOptions,
    draft_architecture,
    num_elements,
)

LayerId = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Eagle3DraftConfig(ArchitectureConfig):
    """The architecture of one EAGLE-3 draft."""

    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False

    @property
    def num_parameters(self) -> int:
        hidden, fused = self.hidden_size, len(self.aux_layers) * self.target_hidden_size
        matrices = (
            hidden * fused  # fc
            + 3 * hidden * self.intermediate_size
            + self.draft_vocab_size * hidden  # lm_head
        )
        # its input is the token's embedding beside the hidden state
        attention = num_elements(draft_architecture(self.architecture).shapes(self, 2 * hidden))
        norms = 4 * hidden + (self.fc_norm + self.norm_before_fc) * fused
        return matrices + attention + norms


class Eagle3Options(ArchitectureOptions):
    """Options of EAGLE-3 training (``algorithm`` section of a run). Sizes default to the target's own."""

    name: Literal["eagle3"] = Field("eagle3", description="The algorithm these options belong to.")
    ttt_steps: PositiveInt = Field(7, description="Steps of the training-time-test unroll: tokens drafted in training.")
    step_decay: float = Field(
        0.8, gt=0.0, le=1.0, description="Weight of step k in the loss is step_decay**k (not normalised)."
    )
    mask_offset: Literal[0, 1, 2] = Field(
        2,
        description="Row j of step k is supervised where the loss mask of token j + offset + k is set. 2 is the token "
        "that the row predicts; 0 and 1 are the alignments of other public trainers.",
    )
    loss: Literal["soft_ce", "lk_alpha", "lk_hybrid", "lk_batch"] = Field(
        "soft_ce",
        description="Loss of a row. soft_ce: cross entropy against the teacher. lk_alpha: -log of the chance alpha "
        "that a sampled token is accepted. lk_hybrid: soft_ce and 1 - alpha, mixed by each row's alpha. lk_batch: "
        "mixed by the mean alpha of the step's rows in the micro-batch, so it depends on how samples are grouped.",
    )
    lk_decay: float = Field(
        3.0,
        ge=0.0,
        description="lk_hybrid, lk_batch: the share of soft_ce is lk_scale * exp(-lk_decay * alpha).",
    )
    lk_scale: float = Field(1.0, gt=0.0, le=1.0, description="lk_hybrid, lk_batch: share of soft_ce where alpha is 0.")
    normalisation: Literal["token_mean", "sample_mean", "micro_batch_mean"] = Field(
        "token_mean",
        description="What the loss of an optimizer step is the mean over. token_mean: supervised rows. sample_mean: "
        "samples, each the mean of its rows. micro_batch_mean: micro-batches, each the mean of its rows, so it "
        "depends on how samples are grouped.",
    )
    freeze_lm_head: bool = Field(False, description="Keep the draft's output head at the target's rows.")
    draft_vocab_size: PositiveInt | None = Field(
        None, description="Size of the pruned draft vocabulary; null keeps the target's vocabulary."
    )
    aux_layers: tuple[LayerId, ...] | None = Field(
        None,
        description="Target layers whose outputs feed the draft, 0-based 'output of layer i'; null takes "
        "[1, L//2 - 1, L - 4] for a target of L layers.",
    )
    fc_norm: bool = Field(False, description="EAGLE-3.1: an RMSNorm on each auxiliary block before they are fused.")
    norm_output: bool = Field(False, description="EAGLE-3.1: the hidden state carried to the next step is normed.")
    norm_before_residual: bool = Field(
        False, description="The residual of the attention block is the normed hidden state instead of the raw one."
    )
    norm_before_fc: bool = Field(False, description="One RMSNorm over all auxiliary blocks before they are fused.")

    @model_validator(mode="after")
    def _options_of_the_loss(self) -> Self:
        fields = type(self).model_fields
        unused = [name for name in ("lk_decay", "lk_scale") if getattr(self, name) != fields[name].default]
        if unused and self.loss not in {"lk_hybrid", "lk_batch"}:
            raise ValueError(f"{unused[0]} belongs to loss lk_hybrid and lk_batch, but loss is {self.loss}")
        return self
