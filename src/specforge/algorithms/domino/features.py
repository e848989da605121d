"""Domino: what the slots of the blocks of a packed batch predict, with which weights (docs/algorithms/domino.md).

Legend: T packed tokens, N blocks, b slots of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.base import StepContext
from specforge.algorithms.parts.blocks import Blocks, slot_tokens
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class SlotLabels:
    """``tokens`` int64 [N, b]: index of the packed token that a slot predicts; ``weights`` fp32 [N, b], 0 for a slot
    without a label (outside the document, outside the loss mask, or slot 0 where labels are not shifted).
    """

    blocks: Blocks
    tokens: Tensor
    weights: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [N, b]."""
        return self.weights > 0


def label_slots(
    batch: TrainBatch[Tensor], blocks: Blocks, shift_label: bool, slot_weights: Sequence[float]
) -> SlotLabels:
    """Labels of ``blocks``: the token after each slot's own, or the token at it for slots 1 .. b - 1.

    ``slot_weights`` are those of the slots that predict, b or b - 1 of them.
    """
    tokens, inside = slot_tokens(blocks, 1 if shift_label else 0)
    weights = torch.zeros(blocks.block_size, device=tokens.device)
    weights[blocks.block_size - len(slot_weights) :] = torch.tensor(slot_weights, device=tokens.device)
    valid = inside & batch.loss_mask.to(torch.bool)[tokens]
    return SlotLabels(blocks, tokens, valid * weights)


def lambda_base(context: StepContext, start: float, decay_ratio: float) -> float:
    """Weight of the uncorrected loss after ``context.global_step`` completed optimizer steps, 0 without a horizon.

    ``start`` falls linearly to 0 over the first ``decay_ratio`` of ``total_steps``, clamped to [0, 1].
    """
    if context.total_steps <= 0:
        return 0.0
    steps = max(1, int(context.total_steps * decay_ratio))
    return min(max(start * (1.0 - min(context.global_step / steps, 1.0)), 0.0), 1.0)
