"""DSpark: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, Pace, StepContext, StepOutput, TargetTables, zero_output
from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.dspark.config import DSparkDraftConfig, DSparkOptions
from specforge.algorithms.dspark.features import SlotLabels, label_slots
from specforge.algorithms.dspark.loss import LossWeights, dspark_loss, metric_names
from specforge.algorithms.dspark.model import DSparkDraft
from specforge.algorithms.dspark.proposer import DSparkProposer
from specforge.algorithms.parts.block_backbone import BLOCK_TRAINING, INIT_STD, initialise
from specforge.algorithms.parts.blocks import sample_blocks
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo


class DSpark(Algorithm):
    """A block-diffusion draft with a logit bias from the previous token and a confidence in each proposal (DSpark).

    Loss of an optimizer step: ``sum of w * (ce_weight * CE + l1_weight * L1 + confidence_weight * BCE) / sum of w``
    over the slots of the step up to the first of a block without a label.
    """

    name: ClassVar[str] = "dspark"
    config_type: ClassVar[type[DraftConfig]] = DSparkDraftConfig
    recommended: ClassVar[Pace] = BLOCK_TRAINING

    def __init__(self, options: DSparkOptions) -> None:
        self.options = options
        confidence = options.confidence_weight if options.enable_confidence_head else 0.0
        self.factors = LossWeights(options.ce_weight, options.l1_weight, confidence)

    def draft_config(self, target: TargetInfo) -> DSparkDraftConfig:
        options = self.options
        return DSparkDraftConfig(
            **options.block_fields(target, "DSpark"),
            markov_rank=options.markov_rank,
            markov_head_type=options.markov_head_type,
            enable_confidence_head=options.enable_confidence_head,
            confidence_head_with_markov=options.confidence_head_with_markov,
        )

    def capture_spec(self, config: DSparkDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=self.factors.needs_teacher, dtype=dtype)

    def build_draft(
        self, config: DSparkDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> DSparkDraft:
        """Matrices N(0, 0.02), norms 1, biases 0."""
        del kept_ids  # the head is the target's own
        draft = DSparkDraft(config)
        initialise(draft, tables, seed)
        if draft.markov_head is not None:
            table = draft.markov_head.markov_w1.weight
            drawn = torch.empty(table.shape).normal_(std=INIT_STD, generator=torch.Generator().manual_seed(seed + 1))
            table.data.copy_(drawn)
        return draft

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        return float(self._labels(batch, context).weights.sum(dtype=torch.float64))

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        assert isinstance(draft, DSparkDraft)
        labels = self._labels(batch, context)
        if not labels.valid.any():
            names = metric_names(self.factors, self.options.block_size)
            return zero_output(draft, self.options.block_size, names, draft.no_states(tables, batch))
        return dspark_loss(draft, tables, batch, labels, self.factors)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> DSparkProposer:
        assert isinstance(draft, DSparkDraft)
        return DSparkProposer(draft, tables, self.options.confidence_threshold)

    def _labels(self, batch: TrainBatch[Tensor], context: StepContext) -> SlotLabels:
        options = self.options
        blocks = sample_blocks(batch, context, options.block_size, options.num_anchors)
        return label_slots(batch, blocks, options.slot_weights(options.block_size))
