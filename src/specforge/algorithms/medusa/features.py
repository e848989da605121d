"""Medusa: which rows of a packed batch each head is trained on (docs/algorithms/medusa.md).

Row ``j`` holds the target's last hidden state of token ``j``. Head ``k`` (from 0) predicts token ``j + 2 + k``; the
target's own head predicts ``j + 1``. The teacher of head ``k`` is the target's distribution at token ``j + 1 + k``.

Legend: T packed tokens, R computed rows, K heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.parts.alignment import supervised_rows
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class Supervision:
    """``rows`` int64 [R], ascending: tokens whose state some head reads. ``mask`` bool [K, R]: by which heads.
    ``teachers`` int64 [K, R]: token whose ``last`` teaches the row; the label is the token after it (valid where
    ``mask`` is set).
    """

    rows: Tensor
    mask: Tensor
    teachers: Tensor


def supervise(batch: TrainBatch[Tensor], num_heads: int) -> Supervision:
    """Row ``j`` trains head ``k`` where the loss mask of token ``j + 2 + k`` is set, inside the document of ``j``."""
    supervised = supervised_rows(batch, num_heads)
    rows = supervised.any(0).nonzero().squeeze(-1)
    heads = torch.arange(num_heads, device=rows.device).unsqueeze(-1)
    return Supervision(rows, supervised[:, rows], rows + 1 + heads)
