"""Keeps samples with NaN or infinite features out of a step.

Legend: T tokens of a packed micro-batch, D feature width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specforge.contracts.batches import StepBatches, TrainBatch


def drop_nonfinite_samples(step: StepBatches[Tensor]) -> tuple[StepBatches[Tensor], int]:
    """``step`` without supervision on samples that have a NaN or an infinity in a feature, and their number.

    Such a sample keeps its place: its loss mask is cleared and its features are zero. Nothing of it reaches the loss or
    the divisor, and the other samples keep their rows.
    """
    cleaned = [_without_nonfinite(batch) for batch in step.micro_batches]
    num_dropped = sum(number for _, number in cleaned)
    return (replace(step, micro_batches=tuple(batch for batch, _ in cleaned)) if num_dropped else step), num_dropped


def _without_nonfinite(batch: TrainBatch[Tensor]) -> tuple[TrainBatch[Tensor], int]:
    whole = [torch.isfinite(feature).all() for feature in batch.features.values()]
    if not whole or bool(torch.stack(whole).all()):
        return batch, 0
    num_samples = len(batch.lengths)
    bad = torch.zeros(num_samples, dtype=torch.bool, device=batch.document_ids.device)
    for feature in batch.features.values():
        rows = ~torch.isfinite(feature).flatten(1).all(1)
        bad[batch.document_ids[rows]] = True
    dropped = bad[batch.document_ids]
    return (
        replace(
            batch,
            loss_mask=batch.loss_mask & ~dropped,
            features={name: x.masked_fill(dropped.unsqueeze(-1), 0.0) for name, x in batch.features.items()},
        ),
        int(bad.sum()),
    )
