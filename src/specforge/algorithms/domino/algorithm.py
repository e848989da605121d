"""Domino: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, Pace, StepContext, StepOutput, TargetTables, zero_output
from specforge.algorithms.domino.config import DominoDraftConfig, DominoOptions
from specforge.algorithms.domino.features import SlotLabels, label_slots, lambda_base
from specforge.algorithms.domino.loss import METRICS, domino_loss
from specforge.algorithms.domino.model import DominoDraft
from specforge.algorithms.domino.proposer import DominoProposer
from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.parts.block_backbone import BLOCK_TRAINING, initialise
from specforge.algorithms.parts.blocks import sample_blocks
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo


class Domino(Algorithm):
    """A block-diffusion draft whose logits are corrected by a GRU over the tokens drafted before (Domino).

    Loss of an optimizer step: ``(1 - lambda) * L(final) + lambda * L(base)``, each ``sum of w * CE / sum of w`` over
    all slots of the step; ``lambda`` falls from ``lambda_start`` to 0 with the completed optimizer steps.
    """

    name: ClassVar[str] = "domino"
    config_type: ClassVar[type[DraftConfig]] = DominoDraftConfig
    recommended: ClassVar[Pace] = BLOCK_TRAINING

    def __init__(self, options: DominoOptions) -> None:
        self.options = options

    def draft_config(self, target: TargetInfo) -> DominoDraftConfig:
        options = self.options
        return DominoDraftConfig(
            **options.block_fields(target, "Domino"),
            emb_dim=options.emb_dim,
            gru_hidden_dim=options.gru_hidden_dim,
            pure_draft_prefix_len=options.pure_draft_prefix_len,
            shift_label=options.shift_label,
        )

    def capture_spec(self, config: DominoDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=False, dtype=dtype)

    def build_draft(
        self, config: DominoDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> DominoDraft:
        """Matrices N(0, 0.02), norms 1, the GRU uniform in ±1/sqrt(its state's size)."""
        del kept_ids  # the head is the target's own
        draft = DominoDraft(config)
        initialise(draft, tables, seed)
        generator, bound = torch.Generator().manual_seed(seed + 1), 1.0 / math.sqrt(config.gru_hidden_dim)
        for weight in draft.prefix_gru.parameters():
            drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            weight.data.copy_(drawn)
        return draft

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        return float(self._labels(batch, context).weights.sum(dtype=torch.float64))

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        assert isinstance(draft, DominoDraft)
        labels = self._labels(batch, context)
        if not labels.valid.any():
            return zero_output(draft, draft.config.num_proposals, METRICS, draft.no_states(tables, batch))
        base_share = lambda_base(context, self.options.lambda_start, self.options.lambda_decay_ratio)
        return domino_loss(draft, tables, batch, labels, base_share)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> DominoProposer:
        assert isinstance(draft, DominoDraft)
        return DominoProposer(draft, tables)

    @property
    def _num_trained_slots(self) -> int:
        return self.options.block_size if self.options.shift_label else self.options.block_size - 1

    def _labels(self, batch: TrainBatch[Tensor], context: StepContext) -> SlotLabels:
        options = self.options
        blocks = sample_blocks(batch, context, options.block_size, options.num_anchors)
        return label_slots(batch, blocks, options.shift_label, options.slot_weights(self._num_trained_slots))
