"""Medusa: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/medusa.md).

Legend: T packed tokens, R computed rows, K heads, M supervised rows of one head, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.algorithms.base import Runs, StepOutput, TargetTables
from specforge.algorithms.medusa.features import Supervision
from specforge.algorithms.medusa.model import MedusaDraft
from specforge.algorithms.parts.losses import HardLabels, SoftTargets, Source, Teacher, fused_loss, target_head
from specforge.contracts.batches import TrainBatch


def metric_names(num_heads: int, *, soft: bool) -> tuple[str, ...]:
    """What :func:`heads_loss` measures beside the accuracies."""
    kinds = ("loss_head", "acceptance_rate") if soft else ("loss_head",)
    return tuple(f"{kind}_{head}" for kind in kinds for head in range(num_heads))


def head_source(draft: MedusaDraft, tables: TargetTables, head: int, states: Tensor) -> Source:
    """The product that gives the logits of ``head`` from its ``states`` [M, H]."""
    if draft.config.shared_head:
        return target_head(tables, states)
    return Source(states, draft.head_weight(head))


def make_teacher(tables: TargetTables, batch: TrainBatch[Tensor], supervision: Supervision) -> Teacher:
    """The target's full distributions at the tokens that some supervised row needs."""
    needed = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    needed[supervision.teachers[supervision.mask]] = True
    everything = torch.ones(tables.lm_head.shape[0], dtype=torch.bool, device=tables.lm_head.device)
    return Teacher(tables, batch.features["last"], needed, everything)


def heads_loss(
    draft: MedusaDraft,
    tables: TargetTables,
    batch: TrainBatch[Tensor],
    supervision: Supervision,
    *,
    teacher: Teacher | None,
    decay: float,
) -> StepOutput:
    """``sum over k of decay**k * sum over rows of CE``, undivided, and the metrics.

    CE is against the token of the text, or with a ``teacher`` against its distribution; what counts as correct is that
    token, or the teacher's greedy one. Metrics by head: ``loss_head_k`` and, with a teacher, ``acceptance_rate_k``.
    """
    last = batch.features["last"][supervision.rows]
    correct = torch.zeros_like(supervision.mask)
    losses: list[Tensor] = []
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    for head, mask in enumerate(supervision.mask):
        places = mask.nonzero().squeeze(-1)
        source = head_source(draft, tables, head, draft(head, last[places]))
        teachers = supervision.teachers[head, places]
        weights = torch.full_like(teachers, 1, dtype=torch.float32) * decay**head
        objective: HardLabels | SoftTargets
        if teacher is None:
            objective = HardLabels(batch.input_ids[teachers + 1], weights)
            losses.append(fused_loss([source], objective))
            expected = objective.labels
        else:
            objective = SoftTargets(teacher, teacher.slots[teachers], weights)
            losses.append(fused_loss([source], objective))
            expected = objective.teacher_best
            metrics[f"acceptance_rate_{head}"] = (objective.overlap.sum(), mask.sum())
        metrics[f"loss_head_{head}"] = (objective.cross_entropy.sum(), mask.sum())
        correct[head, places] = objective.proposal == expected
    first = supervision.mask[0]
    return StepOutput(
        loss_sum=torch.stack(losses).sum(),
        correct=correct.sum(1),
        count=supervision.mask.sum(1),
        runs=Runs(supervision.teachers[0, first], correct[:, first].cumprod(0).sum(0)),
        metrics=metrics,
    )
