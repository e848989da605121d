"""DFlash and D-PACE: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/dflash.md).

Legend: N blocks, b slots of a block, K = b - 1 trained slots of a block, H hidden size, M rows of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.algorithms.base import StepOutput, TargetTables
from specforge.algorithms.dflash.config import LossType
from specforge.algorithms.dflash.features import Supervision
from specforge.algorithms.parts.blocks import block_output
from specforge.algorithms.parts.losses import HardLabels, fused_loss, target_head

METRICS = ("cross_entropy",)


class DpaceLabels(HardLabels):
    """Hard labels whose weights follow from the block's own cross entropies, without gradient."""

    def __init__(self, supervision: Supervision, loss_type: LossType, alpha: float) -> None:
        mask = supervision.mask.flatten()
        super().__init__(supervision.labels.flatten(), mask.float(), group=supervision.mask.shape[1])
        self.loss_type, self.alpha = loss_type, alpha

    def row_weights(self, rows: slice) -> Tensor:
        entropy, valid = (values[rows].view(-1, self.group) for values in (self.cross_entropy, self.weights))
        return dpace_weights(entropy, valid, self.loss_type, self.alpha).flatten()


def dpace_weights(entropy: Tensor, valid: Tensor, loss_type: LossType, alpha: float) -> Tensor:
    """Weights [N, K] of D-PACE, 0 for slots that are not ``valid`` [N, K] (0 or 1); ``entropy`` [N, K] of the labels.

    With confidences ``s = (1 - alpha) * exp(-entropy) + alpha`` (1 where not valid), ``P_k`` their product up to slot
    ``k`` and ``R_k`` the sum of ``P_u`` over the valid slots ``u >= k``: ``R_k``, or ``P_k``, or ``R_k / P_k``.
    """
    confidence = torch.where(valid > 0, (1.0 - alpha) * torch.exp(-entropy) + alpha, 1.0)
    reach = confidence.cumprod(1)
    if loss_type == "dpace-cumulative-confidence-only":
        return reach * valid
    if loss_type == "dpace-continuation-value-only":
        return _continuation(confidence, valid) * valid
    return (reach * valid).flip(1).cumsum(1).flip(1) * valid


def _continuation(confidence: Tensor, valid: Tensor) -> Tensor:
    """``R_k / P_k = valid_k + s_{k+1} * R_{k+1} / P_{k+1}``, from the last slot on: nothing underflows."""
    values = [valid[:, -1]]
    for k in range(valid.shape[1] - 2, -1, -1):
        values.append(valid[:, k] + confidence[:, k + 1] * values[-1])
    return torch.stack(values[::-1], dim=1)


def dflash_loss(states: Tensor, tables: TargetTables, supervision: Supervision, slot_weights: Tensor) -> StepOutput:
    """``sum over supervised slots of slot_weights[k] * CE``, undivided, and the metrics.

    ``states`` [N, b, H]; ``slot_weights`` fp32 [K]. Only supervised slots meet the head.
    """
    places = supervision.mask.flatten().nonzero().squeeze(-1)
    weights = slot_weights.to(places.device).repeat(supervision.mask.shape[0])[places]
    objective = HardLabels(supervision.labels.flatten()[places], weights)
    rows = states[:, 1:].flatten(0, 1).index_select(0, places)
    loss = fused_loss([target_head(tables, rows)], objective)
    proposal = torch.zeros_like(supervision.labels).flatten()
    proposal[places] = objective.proposal
    return _output(loss, supervision, proposal, objective.cross_entropy.sum())


def dpace_loss(
    states: Tensor, tables: TargetTables, supervision: Supervision, loss_type: LossType, alpha: float
) -> StepOutput:
    """``sum over supervised slots of weight * CE``, undivided, and the metrics. ``states`` [N, b, H]."""
    objective = DpaceLabels(supervision, loss_type, alpha)
    loss = fused_loss([target_head(tables, states[:, 1:].flatten(0, 1))], objective)
    entropy = objective.cross_entropy[supervision.mask.flatten()].sum()
    return _output(loss, supervision, objective.proposal, entropy)


def _output(loss: Tensor, supervision: Supervision, proposal: Tensor, entropy: Tensor) -> StepOutput:
    """``proposal`` int64 [N*K]; ``entropy``: sum over the supervised slots."""
    right = proposal.view_as(supervision.labels) == supervision.labels
    correct, count, runs = block_output(supervision.blocks, right, supervision.mask)
    return StepOutput(loss, correct, count, runs, {METRICS[0]: (entropy, supervision.mask.sum())})
