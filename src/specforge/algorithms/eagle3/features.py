"""EAGLE-3: which rows of a packed batch are trained, on which tokens, with which teacher (docs/algorithms/eagle3.md).

Row ``j`` combines the features of token ``j`` with the embedding of token ``j + 1 + k`` at unroll step ``k`` and is
taught by the target's distribution at token ``j + 1 + k``, which predicts token ``j + 2 + k``. Batches are unshifted;
all shifts happen here and none crosses the end of a document.

Legend: T packed tokens, C context tokens, R computed rows, K unroll steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specforge.algorithms.parts.alignment import document_ends, visible_context
from specforge.algorithms.parts.attention import PackedLayout, packed_layout
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class UnrollPlan:
    """What the model computes. Index ``T`` of a token stands for "behind the end": id 0, as a zero-filled shift gives.

    * ``context`` int64 [C], ascending: the tokens that some computed row can see; what lies behind is never touched
    * ``rows`` int64 [R], ascending: index into ``context`` of the rows whose output is needed at some step
    * ``first_tokens`` int64 [C]: token embedded in every context row at step 0 (all are keys of the later ones)
    * ``tokens`` int64 [K, R]: token embedded in the computed rows at each step
    * ``positions`` int64 [C]: rotary position of every context row at step 0; step ``k`` adds ``k``

    The plan of a ``share`` has its slices of the rows and of the context, and the ``layout`` of all of them:

    * ``context``, ``positions`` [C + X]: the slice of the context, then those own rows that are not in it
    * ``embedded`` int64 [E], ascending: the tokens that they embed; ``first_tokens`` [C] and ``tokens`` index into it
    """

    context: Tensor
    rows: Tensor
    first_tokens: Tensor
    tokens: Tensor
    positions: Tensor
    layout: PackedLayout
    share: SequenceShare | None = None
    embedded: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, slots=True)
class Supervision:
    """What the loss compares. ``mask`` bool [K, R]; ``teachers`` int64 [K, R]: token whose ``last`` teaches the row
    (valid where ``mask`` is set).
    """

    mask: Tensor
    teachers: Tensor


def row_weights(batch: TrainBatch[Tensor], first: Tensor, normalisation: str) -> tuple[Tensor, float]:
    """Weight of the rows of each token in the loss, fp32 [T], and the divisor that belongs to it.

    ``first`` bool [T] are the rows that are supervised at step 0: a sample, or a batch, has one of them iff it has a
    supervised row at any step. The weights of ``first`` add up to the divisor.
    """
    if normalisation == "token_mean":
        return torch.ones(first.numel(), device=first.device), float(first.sum())
    if normalisation == "micro_batch_mean":
        num_rows = int(first.sum())
        return torch.full((first.numel(),), 1.0 / max(1, num_rows), device=first.device), float(num_rows > 0)
    counts = torch.zeros(len(batch.lengths), dtype=torch.int64, device=first.device)
    counts.index_add_(0, batch.document_ids, first.long())
    return (1.0 / counts.clamp(min=1))[batch.document_ids], float((counts > 0).sum())


def plan_unroll(batch: TrainBatch[Tensor], supervised: Tensor) -> tuple[UnrollPlan, Supervision]:
    """The plan that computes exactly the rows that ``supervised`` [K, T] names at any step.

    Step ``k`` of a row depends on step 0 of the rows before it and on its own earlier steps only, so the other rows
    are needed as keys of step 0 and never beyond.
    """
    num_steps, num_tokens = supervised.shape
    rows = supervised.any(0).nonzero().squeeze(-1)
    ends = document_ends(batch)
    context, lengths = visible_context(batch, rows)
    ahead = rows + 1 + torch.arange(num_steps, device=rows.device).unsqueeze(-1)
    plan = UnrollPlan(
        context=context,
        rows=torch.searchsorted(context, rows),
        first_tokens=torch.where(context + 1 < ends[context], context + 1, num_tokens),
        tokens=torch.where(ahead < ends[rows], ahead, num_tokens),
        positions=batch.position_ids[context],
        layout=packed_layout(lengths, torch.searchsorted(context, rows)),
    )
    return plan, Supervision(mask=supervised[:, rows], teachers=ahead.clamp(max=max(num_tokens - 1, 0)))


def share_plan(plan: UnrollPlan, supervision: Supervision, share: SequenceShare) -> tuple[UnrollPlan, Supervision]:
    """What of a whole plan and its supervision is this rank's. Slices of rows and of context are alike in size on all
    ranks, so a row need not be in the slice of the context: its features are then fused on two ranks.
    """
    columns, rows = share.rows(plan.context.numel()), share.rows(plan.rows.numel())
    own_rows = plan.rows[rows]
    outside = own_rows[(own_rows < columns.start) | (own_rows >= columns.stop)]
    fused = torch.cat((torch.arange(columns.start, columns.stop, device=outside.device), outside))
    place = torch.zeros_like(plan.context)
    place[fused] = torch.arange(fused.numel(), device=fused.device)
    first_tokens, tokens = plan.first_tokens[columns], plan.tokens[:, rows].contiguous()
    embedded = torch.cat((first_tokens, tokens.flatten())).unique()
    part = replace(
        plan,
        context=plan.context[fused],
        rows=place[own_rows],
        first_tokens=torch.searchsorted(embedded, first_tokens),
        tokens=torch.searchsorted(embedded, tokens),
        positions=plan.positions[fused],
        share=share,
        embedded=embedded,
    )
    return part, Supervision(supervision.mask[:, rows], supervision.teachers[:, rows])
