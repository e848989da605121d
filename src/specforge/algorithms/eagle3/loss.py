"""EAGLE-3: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/eagle3.md).

Legend: T packed tokens, R computed rows, K unroll steps, M supervised (step, row) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.base import Runs, StepOutput, TargetTables
from specforge.algorithms.eagle3.config import Eagle3Options
from specforge.algorithms.eagle3.features import Supervision, UnrollPlan
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.losses import (
    Distance,
    SoftTargets,
    Source,
    Teacher,
    WeighedTargets,
    cross_entropy,
    fused_loss,
    lk_hybrid,
    negative_log_acceptance,
)
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.contracts.batches import TrainBatch


def unroll(draft: Eagle3Draft, tables: TargetTables, batch: TrainBatch[Tensor], plan: UnrollPlan) -> list[Tensor]:
    """What the head reads after each step, K tensors [R, H]."""
    ids = torch.cat((batch.input_ids, batch.input_ids.new_zeros(1)))
    if plan.embedded is not None:
        ids = ids[plan.embedded]
    readouts: list[Tensor] = draft(batch.features["aux"], tables.embed_tokens[ids], plan)
    return readouts


def make_teacher(
    draft: Eagle3Draft, tables: TargetTables, batch: TrainBatch[Tensor], supervision: Supervision
) -> Teacher:
    """The teacher at exactly the tokens that some supervised row needs."""
    needed = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    needed[supervision.teachers[supervision.mask]] = True
    return Teacher(tables, batch.features["last"], needed, draft.t2d)


@dataclass(frozen=True, slots=True)
class LossRows:
    """The supervised (step, row) pairs, sorted by teacher.

    ``steps`` and ``teacher_rows`` int64 [M]; ``weights`` fp32 [M], 0 for a teacher token that the draft does not have,
    which ``known`` bool [M] marks. With a ``share`` they are this rank's of the micro-batch, else all of it.
    """

    teacher: Teacher
    steps: Tensor
    teacher_rows: Tensor
    weights: Tensor
    known: Tensor
    num_steps: int
    share: SequenceShare | None = None

    def by_step(self, values: Tensor) -> Tensor:
        """Sums fp64 [K] over the rows of each step whose teacher token the draft has."""
        sums = torch.zeros(self.num_steps, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.steps, values.double() * self.known)


RowLoss = Callable[[LossRows, Source], SoftTargets]
"""Makes the objective of the rows; the source is there to be measured first."""


def per_row(distance: Distance) -> RowLoss:
    """A loss in which no row depends on another."""
    return lambda rows, _source: SoftTargets(rows.teacher, rows.teacher_rows, rows.weights, distance)


def batch_mixture(decay: float, scale: float) -> RowLoss:
    """``lam * CE + (1 - lam) * (1 - alpha)`` with ``lam = scale * exp(-decay * (mean alpha of the step's rows))``.

    The mean is over the micro-batch, and it is measured first: every logit is computed twice.
    """

    def make(rows: LossRows, source: Source) -> SoftTargets:
        share = (scale * torch.exp(-decay * mean_overlaps(rows, source)))[rows.steps]
        return WeighedTargets(rows.teacher, rows.teacher_rows, rows.weights, (share, 1.0 - share))

    return make


@torch.no_grad()
def mean_overlaps(rows: LossRows, source: Source) -> Tensor:
    """Mean overlap of the micro-batch's rows of each step whose teacher token the draft has, fp32 [K], 0 without such
    a row.
    """
    objective = SoftTargets(rows.teacher, rows.teacher_rows, rows.weights)
    fused_loss([source], objective)
    sums = torch.stack((rows.by_step(objective.overlap), rows.by_step(torch.ones_like(objective.overlap))))
    overlaps, counts = sums if rows.share is None else rows.share.sum(sums)
    means: Tensor = (overlaps / counts.clamp(min=1)).float()
    return means


def row_loss(options: Eagle3Options) -> RowLoss:
    """The loss that ``options`` name."""
    if options.loss == "lk_batch":
        return batch_mixture(options.lk_decay, options.lk_scale)
    distances = {
        "soft_ce": cross_entropy,
        "lk_alpha": negative_log_acceptance,
        "lk_hybrid": lk_hybrid(options.lk_decay, options.lk_scale),
    }
    return per_row(distances[options.loss])


def unroll_loss(
    draft: Eagle3Draft,
    readouts: list[Tensor],
    supervision: Supervision,
    teacher: Teacher,
    weights: Tensor,
    loss: RowLoss,
    share: SequenceShare | None = None,
) -> StepOutput:
    """``sum over k and supervised rows of weights * loss``, undivided, and the metrics.

    ``weights`` fp32 [K, R], or of a shape that expands to it. Rows whose teacher token is outside the draft vocabulary
    add nothing to the loss and still count as supervised (as misses in the accuracy). Metrics: :func:`metric_names`.
    ``share``: the rows are this rank's of the micro-batch.
    """
    num_steps, num_rows = supervision.mask.shape
    steps, places = supervision.mask.nonzero(as_tuple=True)
    teacher_rows, order = teacher.slots[supervision.teachers[steps, places]].sort(stable=True)
    steps, places = steps[order], places[order]
    known = teacher.known(teacher_rows)
    row_weights = weights.to(known.device).expand(num_steps, num_rows)[steps, places] * known
    rows = LossRows(teacher, steps, teacher_rows, row_weights, known, num_steps, share)
    source = Source(torch.cat(readouts).index_select(0, steps * num_rows + places), draft.lm_head.weight)
    objective = loss(rows, source)
    loss_sum = fused_loss([source], objective)
    correct = torch.zeros_like(supervision.mask)
    correct[steps, places] = target_ids(draft.d2t)[objective.proposal] == objective.teacher_best
    first, counts = supervision.mask[0], supervision.mask.sum(1)
    return StepOutput(
        loss_sum=loss_sum,
        correct=correct.sum(1),
        count=counts,
        runs=Runs(supervision.teachers[0, first], correct[:, first].cumprod(0).sum(0)),
        metrics=_metrics(objective, rows, counts),
    )


def metric_names(num_steps: int) -> tuple[str, ...]:
    """What :func:`unroll_loss` measures, each a sum and its number.

    Over all steps: ``in_vocabulary`` (rows whose teacher token the draft has, all supervised rows). By step:
    ``loss_step_k`` (losses before their weights, supervised rows), ``acceptance_rate_k`` (sum of min(p, q) over the
    rows whose teacher token the draft has, their number).
    """
    by_step = (f"{name}_{k}" for k in range(num_steps) for name in ("loss_step", "acceptance_rate"))
    return ("in_vocabulary", *by_step)


def _metrics(objective: SoftTargets, rows: LossRows, counts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    losses, overlaps = rows.by_step(objective.losses), rows.by_step(objective.overlap)
    num_known = rows.by_step(torch.ones_like(objective.losses))
    pairs = [(num_known.sum(), counts.sum())]
    for k in range(rows.num_steps):
        pairs += [(losses[k], counts[k]), (overlaps[k], num_known[k])]
    return dict(zip(metric_names(rows.num_steps), pairs, strict=True))
