"""DFlash: which slots of which blocks are trained on which tokens (docs/algorithms/dflash.md).

Slot ``k`` of a block at anchor ``a`` predicts token ``a + k``, its own position; slot 0 holds the anchor and is not
trained. Batches are unshifted and no label is taken from another document.

Legend: N blocks, b slots of a block, K = b - 1 trained slots of a block, M supervised slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specforge.algorithms.parts.blocks import Blocks, slot_labels
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class Supervision:
    """``labels`` int64 [N, K] (a token of the document where ``mask`` is not set), ``mask`` bool [N, K]."""

    blocks: Blocks
    labels: Tensor
    mask: Tensor


def supervise(blocks: Blocks, batch: TrainBatch[Tensor]) -> Supervision:
    """Labels of the slots 1 .. b - 1. A slot is supervised iff its token is in the document and its loss mask is set,
    whatever the slots before it are.
    """
    labels, mask = slot_labels(blocks, batch, 0)
    return Supervision(blocks, labels[:, 1:], mask[:, 1:])
