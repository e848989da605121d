"""Rows of a packed batch: which are supervised, and which tokens they can see. Nothing crosses a document.

Legend: T packed tokens, C context tokens, R rows, K positions that a draft proposes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.contracts.batches import TrainBatch


def supervised_rows(batch: TrainBatch[Tensor], num_positions: int, mask_offset: int = 2) -> Tensor:
    """bool [K, T]: row ``j`` is supervised at position ``k``.

    True iff the loss mask of token ``j + mask_offset + k`` is set, and that token and the token ``j + 1 + k`` belong to
    the document of ``j``. A row predicts token ``j + 2 + k``, so 2 supervises exactly what is predicted.
    """
    num_tokens = batch.input_ids.numel()
    tokens = torch.arange(num_tokens, device=batch.input_ids.device)
    positions = torch.arange(num_positions, device=tokens.device).unsqueeze(-1)
    labels = tokens + mask_offset + positions
    inside = tokens + max(mask_offset, 1) + positions < document_ends(batch)
    return inside & batch.loss_mask.to(torch.bool)[labels.clamp(max=max(num_tokens - 1, 0))]


def document_ends(batch: TrainBatch[Tensor]) -> Tensor:
    """int64 [T]: index one past the document of each token."""
    lengths = torch.tensor(batch.lengths, dtype=torch.int64)
    return torch.repeat_interleave(lengths.cumsum(0), lengths).to(batch.input_ids.device)


def visible_context(batch: TrainBatch[Tensor], rows: Tensor) -> tuple[Tensor, list[int]]:
    """Tokens that causal ``rows`` int64 [R] (ascending) can see: int64 [C] ascending, and their number a document."""
    if not rows.numel():
        return rows, [0] * len(batch.lengths)
    starts = torch.tensor((0, *batch.lengths), dtype=torch.int64).cumsum(0)
    own = rows.cpu()
    first, last = torch.searchsorted(own, starts[:-1]), torch.searchsorted(own, starts[1:]) - 1
    lengths = torch.where(last >= first, own[last.clamp(min=0)] + 1 - starts[:-1], 0)
    offsets = torch.repeat_interleave(starts[:-1] - (lengths.cumsum(0) - lengths), lengths)
    return (torch.arange(offsets.numel()) + offsets).to(rows.device), lengths.tolist()
