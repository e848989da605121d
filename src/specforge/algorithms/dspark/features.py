"""DSpark: what the slots of the blocks of a packed batch predict, with which weights (docs/algorithms/dspark.md).

Legend: T packed tokens, N blocks, b slots of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.parts.blocks import Blocks, slot_tokens
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class SlotLabels:
    """What the slots of ``blocks`` see and predict, int64 [N, b] each, indices of packed tokens.

    ``previous`` is the slot's own token: known when its successor is predicted, and where the target's distribution
    for that successor is. ``tokens`` is the successor. ``weights`` fp32 [N, b] are 0 from the first slot of a block on
    whose label is missing (outside the document or the loss mask).
    """

    blocks: Blocks
    previous: Tensor
    tokens: Tensor
    weights: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [N, b], a leading run in each block."""
        return self.weights > 0


def label_slots(batch: TrainBatch[Tensor], blocks: Blocks, slot_weights: Sequence[float]) -> SlotLabels:
    """Labels of ``blocks``. ``slot_weights``: one a slot, of those that have a label."""
    previous, _ = slot_tokens(blocks, 0)
    tokens, inside = slot_tokens(blocks, 1)
    supervised = (inside & batch.loss_mask.to(torch.bool)[tokens]).cumprod(dim=1)
    return SlotLabels(blocks, previous, tokens, supervised * torch.tensor(slot_weights, device=tokens.device))
