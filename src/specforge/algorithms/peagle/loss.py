"""P-EAGLE: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/peagle.md).

Legend: T packed tokens, K depths, E_d read-out elements of depth d, M all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.algorithms.base import Runs, StepOutput, TargetTables
from specforge.algorithms.parts.losses import SoftTargets, Source, Teacher, fused_loss
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.algorithms.peagle.features import ElementPlan
from specforge.algorithms.peagle.model import PEagleDraft


def metric_names(num_depths: int) -> tuple[str, ...]:
    """What :func:`elements_loss` measures beside the accuracies."""
    kinds = ("loss_depth", "acceptance_rate")
    return ("in_vocabulary", *(f"{kind}_{depth}" for depth in range(num_depths) for kind in kinds))


def elements_loss(
    draft: PEagleDraft, tables: TargetTables, last: Tensor, readouts: list[Tensor], plan: ElementPlan, num_depths: int
) -> StepOutput:
    """Sum over read-out elements of CE against the teacher at their position, undivided, and the metrics.

    ``last`` [T, Ht]; ``readouts`` [E_d, H] a depth. Elements whose teacher token is outside the draft vocabulary add
    nothing to the loss and still count (as misses in the accuracy). Metrics by depth: ``loss_depth_d`` (sum of CE,
    elements), ``acceptance_rate_d`` (sum of min(p, q), elements with an in-vocabulary teacher); ``in_vocabulary``.
    """
    positions = plan.packed_positions()
    depths = torch.cat([torch.full_like(found, depth) for depth, found in enumerate(positions)])
    tokens = torch.cat(positions) + 1  # the token whose features teach the position
    needed = torch.zeros(len(last), dtype=torch.bool, device=last.device)
    needed[tokens] = True
    teacher = Teacher(tables, last, needed, draft.t2d)
    teacher_rows, order = teacher.slots[tokens].sort(stable=True)
    known = teacher.known(teacher_rows).float()
    objective = SoftTargets(teacher, teacher_rows, known)
    loss = fused_loss([Source(torch.cat(readouts).index_select(0, order), draft.lm_head.weight)], objective)
    correct = torch.zeros_like(depths, dtype=torch.bool)
    correct[order] = target_ids(draft.d2t)[objective.proposal] == objective.teacher_best

    def by_depth(values: Tensor) -> Tensor:
        return torch.zeros(num_depths, dtype=torch.float64, device=depths.device).index_add_(0, depths[order], values)

    counts = torch.bincount(depths, minlength=num_depths)
    losses, num_known = by_depth(objective.cross_entropy.double() * known), by_depth(known.double())
    overlaps = by_depth(objective.overlap.double() * known)
    metrics = {"in_vocabulary": (num_known.sum(), counts.sum())}
    for depth in range(num_depths):
        metrics[f"loss_depth_{depth}"] = (losses[depth], counts[depth])
        metrics[f"acceptance_rate_{depth}"] = (overlaps[depth], num_known[depth])
    return StepOutput(
        loss_sum=loss,
        correct=by_depth(correct[order].double()).long(),
        count=counts,
        runs=Runs(positions[0] + 1, _run_lengths(plan, correct)),
        metrics=metrics,
    )


def _run_lengths(plan: ElementPlan, correct: Tensor) -> Tensor:
    """Leading run of correct depths of every supervised row of depth 0; a depth that was not drawn ends it.

    ``correct`` bool [M], depth-major.
    """
    alive = torch.zeros_like(plan.context, dtype=torch.bool)
    first, *deeper = correct.split([plan.outputs.numel(), *plan.sizes[1:]])
    alive[plan.outputs] = first
    lengths = alive.long()
    for anchors, right in zip(plan.anchors, deeper, strict=True):
        still = torch.zeros_like(alive)
        still[anchors] = right
        alive &= still
        lengths += alive
    return lengths[plan.outputs]
