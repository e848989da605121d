"""MTP: which rows of a packed batch each step computes, and which it supervises (docs/algorithms/mtp.md).

Row ``j`` combines a hidden state of token ``j`` with the embedding of token ``j + 1 + k`` at step ``k`` and predicts
token ``j + 2 + k``. It sees the rows of the same step only, up to itself.

Legend: T packed tokens, C context tokens, R rows of the last step, K steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.parts.alignment import document_ends, supervised_rows, visible_context
from specforge.algorithms.parts.attention import PackedLayout, packed_layout
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the model computes. Index ``T`` of a token stands for "behind the end", where id 0 is embedded.

    * ``context`` int64 [C], ascending: the tokens that some supervised row can see; a row of every step but the last
    * ``tokens`` int64 [K, C]: token embedded in the context rows at each step
    * ``positions`` int64 [C]: rotary position, the same at every step
    * ``last_rows`` int64 [R], ascending: index into ``context`` of the rows supervised at the last step
    """

    context: Tensor
    tokens: Tensor
    positions: Tensor
    last_rows: Tensor
    layout: PackedLayout
    last_layout: PackedLayout

    @property
    def num_steps(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, slots=True)
class Supervision:
    """``mask`` bool [K, C]; ``labels`` int64 [K, C]: index of the token that a row predicts (valid under the mask)."""

    mask: Tensor
    labels: Tensor


def plan_steps(batch: TrainBatch[Tensor], num_steps: int) -> tuple[StepPlan, Supervision]:
    """Row ``j`` is supervised at step ``k`` where the loss mask of token ``j + 2 + k`` is set, in its document.

    A row behind the last supervised one of its document is seen by none and not computed.
    """
    supervised = supervised_rows(batch, num_steps)
    rows = supervised.any(0).nonzero().squeeze(-1)
    context, lengths = visible_context(batch, rows)
    mask = supervised[:, context]
    ahead = context + 1 + torch.arange(num_steps, device=context.device).unsqueeze(-1)
    num_tokens = batch.input_ids.numel()
    last_rows = mask[-1].nonzero().squeeze(-1)
    plan = StepPlan(
        context=context,
        tokens=torch.where(ahead < document_ends(batch)[context], ahead, num_tokens),
        positions=batch.position_ids[context],
        last_rows=last_rows,
        layout=packed_layout(lengths, torch.arange(context.numel(), device=context.device)),
        last_layout=packed_layout(lengths, last_rows),
    )
    return plan, Supervision(mask, (ahead + 1).clamp(max=max(num_tokens - 1, 0)))
