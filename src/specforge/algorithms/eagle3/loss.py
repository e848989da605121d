"""EAGLE-3: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/eagle3.md).

Legend: T packed tokens, R computed rows, K unroll steps, M supervised (step, row) pairs in step-major order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.algorithms.base import StepOutput, TargetTables
from specforge.algorithms.eagle3.features import Supervision, UnrollPlan
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.losses import RowLosses, Teacher, soft_cross_entropy, teach
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.contracts.batches import TrainBatch


def unroll(draft: Eagle3Draft, tables: TargetTables, batch: TrainBatch[Tensor], plan: UnrollPlan) -> list[Tensor]:
    """What the head reads after each step, K tensors [R, H]."""
    ids = torch.cat((batch.input_ids, batch.input_ids.new_zeros(1)))
    readouts: list[Tensor] = draft(batch.features["aux"], tables.embed_tokens[ids], plan)
    return readouts


def make_teacher(
    draft: Eagle3Draft, tables: TargetTables, batch: TrainBatch[Tensor], supervision: Supervision
) -> Teacher:
    """The teacher at exactly the tokens that some supervised row needs."""
    needed = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
    needed[supervision.teachers[supervision.mask]] = True
    return teach(tables, batch.features["last"], needed, draft.t2d)


def unroll_loss(
    draft: Eagle3Draft,
    readouts: list[Tensor],
    supervision: Supervision,
    teacher: Teacher,
    step_weights: Tensor,
) -> StepOutput:
    """``sum over k of step_weights[k] * sum over supervised rows of CE``, undivided, and the metrics.

    ``step_weights`` fp32 [K]. Rows whose teacher token is outside the draft vocabulary add nothing to the loss and
    still count as supervised (as misses in the accuracy). Metrics by step: ``loss_step_k`` (sum of CE over supervised
    rows, their number), ``acceptance_rate_k`` (sum of min(p, q) over the rows with an in-vocabulary teacher, their
    number); over all steps: ``in_vocabulary``.
    """
    steps, rows = supervision.mask.nonzero(as_tuple=True)
    num_rows = supervision.mask.shape[1]
    teacher_rows = teacher.slots[supervision.teachers[steps, rows]]
    known = teacher.in_vocabulary[teacher_rows].float()
    flat = torch.cat(readouts).index_select(0, steps * num_rows + rows)
    weights = step_weights.to(known.device)[steps] * known
    loss, details = soft_cross_entropy(flat, draft.lm_head.weight, teacher, teacher_rows, weights)
    right = target_ids(draft.d2t)[details.proposal] == teacher.best[teacher_rows]
    correct = torch.zeros_like(supervision.mask)
    correct[steps, rows] = right
    first = supervision.mask[0]
    runs = 1 + correct.cumprod(0).sum(0)
    return StepOutput(
        loss_sum=loss,
        correct=correct.sum(1),
        count=supervision.mask.sum(1),
        run_length=(runs[first].sum(), first.sum()),
        metrics=_metrics(details, steps, known, supervision.mask.sum(1)),
    )


def empty_output(draft: Eagle3Draft, num_steps: int) -> StepOutput:
    """Zeros that reach every trainable parameter, whatever values the parameters have."""
    loss = torch.stack([p.flatten()[:0].sum() for p in draft.parameters() if p.requires_grad]).sum().float()
    none = torch.zeros(num_steps, dtype=torch.int64, device=loss.device)
    rows = RowLosses(none[:0].float(), none[:0], none[:0].float())
    return StepOutput(loss, none, none.clone(), (none[0], none[0]), _metrics(rows, none[:0], none[:0].float(), none))


def _metrics(rows: RowLosses, steps: Tensor, known: Tensor, counts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    def by_step(values: Tensor) -> Tensor:
        return torch.zeros(counts.numel(), dtype=torch.float64, device=values.device).index_add_(
            0, steps, values.double()
        )

    losses, overlaps, num_known = by_step(rows.cross_entropy * known), by_step(rows.overlap * known), by_step(known)
    metrics = {"in_vocabulary": (num_known.sum(), counts.sum())}
    for k in range(counts.numel()):
        metrics[f"loss_step_{k}"] = (losses[k], counts[k])
        metrics[f"acceptance_rate_{k}"] = (overlaps[k], num_known[k])
    return metrics
