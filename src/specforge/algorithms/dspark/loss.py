"""DSpark: the loss and the metrics of one micro-batch, all as sums (docs/algorithms/dspark.md).

Legend: T packed tokens, N blocks, b slots of a block, H hidden size, r rank of the bias, V vocabulary, M slots with a
label in the order of their teachers' tokens, m rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import StepOutput, TargetTables
from specforge.algorithms.dspark.features import SlotLabels
from specforge.algorithms.dspark.model import DSparkDraft, SlotOutputs
from specforge.algorithms.parts.blocks import block_output
from specforge.algorithms.parts.losses import Objective, Source, Teacher, fused_loss, softmax_, target_head
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Factors of the three terms."""

    cross_entropy: float
    l1: float
    confidence: float

    @property
    def needs_teacher(self) -> bool:
        return self.l1 > 0 or self.confidence > 0


def metric_names(weights: LossWeights, block_size: int) -> tuple[str, ...]:
    """The metrics of a micro-batch under ``weights``."""
    names: tuple[str, ...] = ("ce_loss",)
    if weights.needs_teacher:
        names += ("l1_loss", "tau_probabilistic", *(f"acceptance_rate_{k}" for k in range(block_size)))
    if weights.confidence > 0:
        names += ("confidence_loss", "confidence_abs_error", "confidence_bias", "confidence_cumulative_bias")
    return names


class TextAndTeacher(Objective):
    """``cross_entropy * CE(label) + l1 * sum over v of |q - p|`` of the draft's q, with the teacher's p.

    ``labels`` int64 [M], ``weights`` fp32 [M], ``teacher_rows`` int64 [M] ascending (unused without a teacher).
    Measures ``cross_entropy``, ``proposal`` (the draft's greedy token) and, with a teacher, ``l1``.
    """

    def __init__(
        self, labels: Tensor, weights: Tensor, factors: LossWeights, teacher: Teacher | None, teacher_rows: Tensor
    ) -> None:
        self.labels, self.weights, self.factors = labels, weights, factors
        self.teacher, self.teacher_rows = teacher, teacher_rows
        self.num_rows = labels.numel()
        self.cross_entropy = torch.zeros(self.num_rows, dtype=torch.float32, device=labels.device)
        self.l1 = torch.zeros_like(self.cross_entropy)
        self.proposal = torch.zeros_like(labels)
        self._host_rows = teacher_rows.cpu()

    @property
    def acceptance(self) -> Tensor:
        """fp32 [M]: chance that a token drawn from q is accepted, ``1 - l1 / 2``."""
        return (1.0 - 0.5 * self.l1).clamp(0.0, 1.0)

    def evaluate(self, rows: slice, products: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits = products[0]
        for product in products[1:]:
            logits += product
        labels, weights = self.labels[rows].unsqueeze(-1), self.weights[rows]
        chosen = logits.gather(-1, labels).squeeze(-1)
        draft, total, self.proposal[rows] = softmax_(logits)
        self.cross_entropy[rows] = total - chosen
        losses = self.factors.cross_entropy * self.cross_entropy[rows]
        if self.teacher is None:
            draft *= self.factors.cross_entropy
        else:
            bounds = (int(self._host_rows[rows.start]), int(self._host_rows[rows.stop - 1]))
            self.l1[rows] = l1 = self._distance_(draft, self.teacher.logits(self.teacher_rows[rows], bounds))
            losses = losses + self.factors.l1 * l1
        draft.scatter_add_(-1, labels, torch.full_like(chosen, -self.factors.cross_entropy).unsqueeze(-1))
        draft *= weights.unsqueeze(-1)
        return losses * weights, [draft] * len(products)

    def _distance_(self, draft: Tensor, teacher_logits: Tensor) -> Tensor:
        """L1 [m] of ``draft`` q [m, V] to the teacher; q becomes its part of the slope, ``q * (ce + l1 * (s - q.s))``
        with ``s = sign(q - p)``.
        """
        target, _, _ = softmax_(teacher_logits)
        difference = torch.sub(draft, target, out=target)
        l1 = difference.abs().sum(-1)
        sign = difference.sign_()
        covered = torch.linalg.vecdot(draft, sign)
        draft *= sign.sub_(covered.unsqueeze(-1)).mul_(self.factors.l1).add_(self.factors.cross_entropy)
        return l1


def dspark_loss(
    draft: DSparkDraft, tables: TargetTables, batch: TrainBatch[Tensor], labels: SlotLabels, factors: LossWeights
) -> StepOutput:
    """Sums of the weighted losses, undivided, and the metrics. At least one slot must have a label."""
    outputs = draft.slot_outputs(tables, batch, labels)
    rows = labels.valid.flatten().nonzero().squeeze(-1)
    # slots of several blocks share a teacher: side by side, each is computed once
    rows = rows[labels.previous.flatten()[rows].argsort(stable=True)]
    targets, weights = batch.input_ids[labels.tokens.flatten()[rows]], labels.weights.flatten()[rows]
    teacher, teacher_rows = None, rows
    if factors.needs_teacher:
        at = labels.previous.flatten()[rows]
        needed = torch.zeros_like(batch.input_ids, dtype=torch.bool).index_fill(0, at, True)
        everything = torch.ones(tables.lm_head.shape[0], dtype=torch.bool, device=at.device)
        teacher = Teacher(tables, batch.features["last"], needed, everything)
        teacher_rows = teacher.slots[at]
    objective = TextAndTeacher(targets, weights, factors, teacher, teacher_rows)
    loss = fused_loss(_sources(draft, tables, outputs, rows), objective)
    correct = _scatter(objective.proposal == targets, rows, labels.valid)
    right, count, runs = block_output(labels.blocks, correct, labels.valid)
    total = weights.sum()
    metrics = {"ce_loss": ((objective.cross_entropy * weights).sum(), total)}
    if teacher is not None:
        metrics |= {"l1_loss": ((objective.l1 * weights).sum(), total)}
        metrics |= _acceptance_metrics(_scatter(objective.acceptance, rows, labels.valid), labels.valid)
    if outputs.confidence is not None and factors.confidence > 0:
        logits = outputs.confidence.flatten().index_select(0, rows).float()
        losses = F.binary_cross_entropy_with_logits(logits, objective.acceptance, reduction="none") * weights
        loss = loss + factors.confidence * losses.sum()
        metrics |= {"confidence_loss": (losses.detach().sum(), total)}
        metrics |= _confidence_metrics(logits.detach().sigmoid(), objective.acceptance, weights, rows, labels.valid)
    return StepOutput(loss, right, count, runs, metrics)


def _sources(draft: DSparkDraft, tables: TargetTables, outputs: SlotOutputs, rows: Tensor) -> list[Source]:
    sources = [target_head(tables, outputs.hidden.flatten(0, 1).index_select(0, rows))]
    if draft.markov_head is not None and outputs.markov is not None:
        inputs = outputs.markov.flatten(0, 1).index_select(0, rows)
        sources.append(Source(inputs, draft.markov_head.markov_w2.weight))
    return sources


def _scatter(values: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """[N, b] with ``values`` [M] at ``rows`` (indices of the flat slots), 0 elsewhere."""
    return values.new_zeros(valid.numel()).index_put((rows,), values).view_as(valid)


def _acceptance_metrics(acceptance: Tensor, valid: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of ``acceptance`` [N, b], 0 where not ``valid``: its mean at each slot, and 1 + the expected run of a block."""
    counts, sums = valid.sum(0), acceptance.sum(0)
    blocks = valid.any(1)
    runs = 1.0 + acceptance.cumprod(1).sum(1)
    metrics = {f"acceptance_rate_{k}": (sums[k], counts[k]) for k in range(valid.shape[1])}
    return metrics | {"tau_probabilistic": ((runs * blocks).sum(), blocks.sum())}


def _confidence_metrics(
    confidence: Tensor, acceptance: Tensor, weights: Tensor, rows: Tensor, valid: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weighted means over slots, [M] each: ``|confidence - acceptance|``, the difference itself, and the difference of
    the products along a block (what a verifier that plans ahead would rely on).
    """
    total, difference = weights.sum(), confidence - acceptance
    planned, actual = (_scatter(values, rows, valid).cumprod(1).flatten()[rows] for values in (confidence, acceptance))
    return {
        "confidence_abs_error": ((difference.abs() * weights).sum(), total),
        "confidence_bias": ((difference * weights).sum(), total),
        "confidence_cumulative_bias": (((planned - actual) * weights).sum(), total),
    }
