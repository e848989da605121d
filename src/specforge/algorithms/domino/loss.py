"""Domino: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/domino.md).

Legend: N blocks, b slots of a block, H hidden size, G state of the GRU, V vocabulary, M slots with a label, m rows of
a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import Runs, StepOutput, TargetTables
from specforge.algorithms.domino.features import SlotLabels
from specforge.algorithms.domino.model import DominoDraft
from specforge.algorithms.parts.blocks import block_output, slot_tokens
from specforge.algorithms.parts.losses import Objective, Source, fused_loss, softmax_, target_head
from specforge.contracts.batches import TrainBatch

METRICS = ("final_accuracy", "final_loss", "base_loss", "base_accuracy", "base_run_length", "lambda_base")


class CorrectedLabels(Objective):
    """``(1 - base_share) * CE(base + correction) + base_share * CE(base)`` against one token a row.

    ``labels`` int64 [M], ``weights`` fp32 [M]. The first product is the base's logits, the second the correction. At a
    share of 1 the correction gets a slope of exactly 0. Measures the cross entropies ``final`` and ``base`` and the
    greedy tokens ``final_proposal`` and ``base_proposal``.
    """

    def __init__(self, labels: Tensor, weights: Tensor, base_share: float) -> None:
        self.labels, self.weights, self.base_share = labels, weights, base_share
        self.num_rows = labels.numel()
        self.final = torch.zeros(self.num_rows, dtype=torch.float32, device=labels.device)
        self.base = torch.zeros_like(self.final)
        self.final_proposal, self.base_proposal = torch.zeros_like(labels), torch.zeros_like(labels)

    def evaluate(self, rows: slice, products: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        base, correction = products
        correction += base
        labels, weights = self.labels[rows].unsqueeze(-1), self.weights[rows]
        self.base[rows], self.base_proposal[rows] = _cross_entropy_(base, labels, weights * self.base_share)
        self.final[rows], self.final_proposal[rows] = _cross_entropy_(
            correction, labels, weights * (1.0 - self.base_share)
        )
        base += correction
        losses = self.base[rows] * self.base_share + self.final[rows] * (1.0 - self.base_share)
        return losses * weights, [base, correction]


def _cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(CE [m], greedy id [m]); ``logits`` [m, V] become the slope of ``weights * CE``. ``labels`` int64 [m, 1]."""
    chosen = logits.gather(-1, labels).squeeze(-1)
    slope, total, best = softmax_(logits)
    slope.scatter_add_(-1, labels, torch.full_like(chosen, -1.0).unsqueeze(-1)).mul_(weights.unsqueeze(-1))
    return total - chosen, best


def domino_loss(
    draft: DominoDraft, tables: TargetTables, batch: TrainBatch[Tensor], labels: SlotLabels, base_share: float
) -> StepOutput:
    """Sums of the weighted losses, undivided, and the metrics. At least one slot must have a label.

    ``correct`` and ``count`` have one entry for each slot that drafts, b - 1; the accuracies of the metrics are over
    all that are trained.
    """
    valid, first = labels.valid, draft.config.first_label
    rows = valid.flatten().nonzero().squeeze(-1)
    targets, weights = batch.input_ids[labels.tokens.flatten()[rows]], labels.weights.flatten()[rows]
    hidden = draft.block_states(tables, batch, labels.blocks).index_select(0, rows)
    inputs = correction_inputs(draft, tables, batch, labels, hidden, rows)
    objective = CorrectedLabels(targets, weights, base_share)
    sources = (target_head(tables, hidden), Source(inputs, draft.correction_head))
    loss = fused_loss(sources, objective)

    def correct(proposal: Tensor) -> Tensor:
        return torch.zeros_like(valid).flatten().index_put((rows,), proposal == targets).view_as(valid)[:, first:]

    right, count, runs = block_output(labels.blocks, correct(objective.final_proposal), valid[:, first:])
    base_right, _, base_runs = block_output(labels.blocks, correct(objective.base_proposal), valid[:, first:])
    total = weights.sum()
    metrics = {
        "final_accuracy": (right.sum(), count.sum()),
        "final_loss": ((objective.final * weights).sum(), total),
        "base_loss": ((objective.base * weights).sum(), total),
        "base_accuracy": (base_right.sum(), count.sum()),
        "base_run_length": base_runs.sums(),
        "lambda_base": (total * base_share, total),
    }
    num_proposals = draft.config.num_proposals  # the last slot is trained, and never drafts
    runs = Runs(runs.anchors, runs.lengths.clamp(max=num_proposals))
    return StepOutput(loss, right[:num_proposals], count[:num_proposals], runs, metrics)


def correction_inputs(
    draft: DominoDraft,
    tables: TargetTables,
    batch: TrainBatch[Tensor],
    labels: SlotLabels,
    hidden: Tensor,
    rows: Tensor,
) -> Tensor:
    """What the correction's head reads, [M, E]: 0 for slots that are not corrected.

    ``rows`` int64 [M] index the slots [N * b], ``hidden`` [M, H] are their states. The GRU is fed the block's own
    tokens: a slot sees them up to the one before what it predicts.
    """
    config, blocks = draft.config, labels.blocks
    first = config.first_label
    tokens, _ = slot_tokens(blocks, 0)
    embedded = tables.embed_tokens[batch.input_ids[tokens[:, : config.block_size - first]]]
    states = F.pad(draft.prefix_states(embedded), (0, 0, first, 0)).flatten(0, 1)
    corrected = rows % config.block_size >= config.pure_draft_prefix_len + first
    inputs = draft.correction_inputs(hidden, states.index_select(0, rows))
    return inputs * corrected.unsqueeze(-1)
