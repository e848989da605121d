"""DFlash: capture, draft, loss and proposer behind the contract of :mod:`specforge.algorithms.base`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from specforge.algorithms.base import (
    Algorithm,
    DraftModel,
    Pace,
    StepContext,
    StepOutput,
    TargetTables,
    zero_output,
)
from specforge.algorithms.dflash.config import DFlashDraftConfig, DFlashOptions
from specforge.algorithms.dflash.features import supervise
from specforge.algorithms.dflash.loss import METRICS, dflash_loss, dpace_loss
from specforge.algorithms.dflash.model import DFlashDraft
from specforge.algorithms.dflash.proposer import DFlashProposer
from specforge.algorithms.draft_config import DraftConfig
from specforge.algorithms.parts.block_backbone import BLOCK_TRAINING, initialise
from specforge.algorithms.parts.blocks import Blocks, sample_blocks
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.contracts.batches import TrainBatch
from specforge.contracts.capture import CaptureSpec, TargetInfo


class DFlash(Algorithm):
    """Block diffusion: one pass fills a block of masked slots behind the last token (DFlash).

    Loss of an optimizer step: ``sum of w * CE / sum of w`` over the supervised slots of all blocks, ``w`` by the slot.
    With D-PACE the weights come from the draft's own confidences, and the sum is divided by the number of supervised
    slots, which is known before the forward.
    """

    name: ClassVar[str] = "dflash"
    config_type: ClassVar[type[DraftConfig]] = DFlashDraftConfig
    recommended: ClassVar[Pace] = BLOCK_TRAINING
    splits_sequences: ClassVar[bool] = True

    def __init__(self, options: DFlashOptions) -> None:
        self.options = options

    def draft_config(self, target: TargetInfo) -> DFlashDraftConfig:
        return DFlashDraftConfig(**self.options.block_fields(target, "DFlash"))

    def capture_spec(self, config: DFlashDraftConfig, dtype: str) -> CaptureSpec:
        return CaptureSpec(aux_layers=config.aux_layers, last_hidden=False, dtype=dtype)

    def build_draft(
        self, config: DFlashDraftConfig, tables: TargetTables, seed: int, kept_ids: Tensor | None = None
    ) -> DFlashDraft:
        """Matrices N(0, 0.02), norms 1. The vocabulary is the target's: ``kept_ids`` has no use."""
        assert kept_ids is None, "a DFlash draft has the target's vocabulary"
        draft = DFlashDraft(config)
        initialise(draft, tables, seed)
        return draft

    def supervised_weight(self, batch: TrainBatch[Tensor], context: StepContext) -> float:
        blocks = self._blocks(batch, context)
        return float((supervise(blocks, batch).mask.sum(0).cpu().double() * self._divisors().double()).sum())

    def forward_loss(
        self, draft: DraftModel, tables: TargetTables, batch: TrainBatch[Tensor], context: StepContext
    ) -> StepOutput:
        return self.block_loss(draft, tables, batch, self._blocks(batch, context), context.sequence)

    def block_loss(
        self,
        draft: DraftModel,
        tables: TargetTables,
        batch: TrainBatch[Tensor],
        blocks: Blocks,
        share: SequenceShare | None = None,
    ) -> StepOutput:
        """The sums of given ``blocks`` of ``batch``; with a ``share``, of its own blocks among them."""
        assert isinstance(draft, DFlashDraft)
        supervision = supervise(blocks, batch)
        if not supervision.mask.any():
            return zero_output(draft, blocks.block_size - 1, METRICS, draft.no_states(tables, batch))
        states = draft.states(tables, batch, blocks, share)
        if share is not None:
            supervision = supervise(blocks.part(share.rows(blocks.num_blocks)), batch)
        if self.options.loss_type == "dflash":
            return dflash_loss(states, tables, supervision, self._divisors())
        return dpace_loss(states, tables, supervision, self.options.loss_type, self.options.dpace_alpha)

    def proposer(self, draft: DraftModel, tables: TargetTables) -> DFlashProposer:
        assert isinstance(draft, DFlashDraft)
        return DFlashProposer(draft, tables)

    def _blocks(self, batch: TrainBatch[Tensor], context: StepContext) -> Blocks:
        return sample_blocks(batch, context, self.options.block_size, self.options.num_anchors)

    def _divisors(self) -> Tensor:
        """What a supervised slot adds to the divisor, fp32 [b - 1]; for plain DFlash also its weight."""
        num_slots = self.options.block_size - 1
        if self.options.loss_type != "dflash":
            return torch.ones(num_slots)
        return torch.tensor(self.options.slot_weights(num_slots), dtype=torch.float32)
