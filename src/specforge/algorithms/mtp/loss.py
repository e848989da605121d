"""MTP: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/mtp.md).

Legend: T packed tokens, C context tokens, R rows of the last step, K steps, M supervised (step, row) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.algorithms.base import Runs, StepOutput, TargetTables
from specforge.algorithms.mtp.features import Supervision
from specforge.algorithms.parts.losses import HardLabels, fused_loss, target_head


def step_weights(num_steps: int, decay: float) -> Tensor:
    """``decay**k`` divided by its sum over the steps, fp32 [K]."""
    weights = torch.tensor([decay**k for k in range(num_steps)], dtype=torch.float64)
    return (weights / weights.sum()).float()


def metric_names(num_steps: int) -> tuple[str, ...]:
    """What :func:`steps_loss` measures beside the accuracies."""
    return tuple(f"loss_step_{step}" for step in range(num_steps))


def steps_loss(
    tables: TargetTables, input_ids: Tensor, readouts: list[Tensor], supervision: Supervision, weights: Tensor
) -> StepOutput:
    """``sum over k of weights[k] * sum over supervised rows of CE``, undivided, and the metrics ``loss_step_k``.

    ``readouts`` as the model's unroll gives them; ``weights`` fp32 [K].
    """
    mask = supervision.mask
    chosen = [readout[step] for readout, step in zip(readouts[:-1], mask[:-1], strict=True)]
    steps = mask.nonzero(as_tuple=True)[0]
    labels = input_ids[supervision.labels[mask]]
    objective = HardLabels(labels, weights.to(labels.device)[steps])
    loss = fused_loss([target_head(tables, torch.cat([*chosen, readouts[-1]]))], objective)
    correct = torch.zeros_like(mask)
    correct[mask] = objective.proposal == labels
    losses = torch.zeros(len(mask), dtype=torch.float64, device=labels.device)
    losses.index_add_(0, steps, objective.cross_entropy.double())
    first, count = mask[0], mask.sum(1)
    return StepOutput(
        loss_sum=loss,
        correct=correct.sum(1),
        count=count,
        runs=Runs(supervision.labels[0, first] - 1, correct[:, first].cumprod(0).sum(0)),
        metrics=dict(zip(metric_names(len(mask)), zip(losses, count, strict=True), strict=True)),
    )
