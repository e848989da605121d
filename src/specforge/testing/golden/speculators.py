"""speculators' conventions for the slots of blocks in one packed row, written out on whole logits.

A slot counts where its own position is supervised, each on its own, and is taught by the target's logits at the token
before its label; sums are divided by the number of those slots + 1e-5. With ``sample_from_anchor``, slot ``k`` predicts
token ``a + 1 + k`` (``first`` is 0), without it token ``a + k`` (``first`` is 1). Labels of the next document count
where the mask is set.

Legend: T packed tokens, N blocks, b slots of a block, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.dflash.loss import dpace_weights
from specforge.testing.golden.blocks import BlockCase, all_logits
from specforge.testing.golden.position_losses import POSITION_LOSSES, loss_terms
from specforge.testing.golden.report import Kind, Metrics, NotBuilt

EPS = 1e-5


def first_slot(facts: dict[str, Any], default: bool) -> int:
    """The first slot that predicts; ``default`` is ``sample_from_anchor`` where the vector does not say."""
    return 0 if facts.get("sample_from_anchor", default) else 1


def slot_places(case: BlockCase) -> tuple[Tensor, Tensor]:
    """Index of every slot's own token in the pack, int64 [N, b], clamped, and whether it is in the pack."""
    places = case.blocks.anchors[:, None] + torch.arange(case.blocks.block_size)
    num_tokens = case.batch.input_ids.numel()
    return places.clamp(max=num_tokens - 1), places < num_tokens


def slot_mask(case: BlockCase, first: int) -> Tensor:
    """bool [N, b]: the mask of the token at the slot's own position; nothing before slot ``first``."""
    places, inside = slot_places(case)
    return case.batch.loss_mask[places] & inside & (torch.arange(places.shape[1]) >= first)


def slot_teacher(case: BlockCase, first: int) -> Tensor:
    """The target's logits [N, b, V] for the label of each slot."""
    places, _ = slot_places(case)
    return all_logits(case, case.batch.features["last"][(places - first).clamp(min=0)])


def slot_loss(facts: dict[str, Any], losses: Tensor, mask: Tensor, first: int) -> Tensor:
    """The weighted mean of a term's ``losses`` [N, b]."""
    weights = _slot_weights(facts, losses.detach(), mask.float(), first)
    return (losses * weights).sum() / (mask.sum() + EPS)


def _slot_weights(facts: dict[str, Any], losses: Tensor, valid: Tensor, first: int) -> Tensor:
    kind = facts.get("per_position_loss_weight", "fixed-exp-decay")
    if kind == "fixed-exp-decay":
        slots = torch.arange(valid.shape[1])
        return valid * torch.exp(-(slots - first).clamp(min=0) / (facts["gamma"] or math.inf))
    if kind in {"dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"}:
        return dpace_weights(losses, valid, kind, facts.get("dpace_alpha", 0.5))
    if kind in {None, "none", "uniform"}:
        return valid
    raise NotBuilt(f"weights {kind!r}")


def taught_loss(
    facts: dict[str, Any], logits: Tensor, teacher: Tensor, mask: Tensor, first: int
) -> tuple[Tensor, Metrics]:
    """The sum of the terms of ``loss_fn``, and each of them as a metric; ``logits`` and ``teacher`` [N, b, V]."""
    total, metrics = logits.new_zeros(()), Metrics()
    for name, factor in loss_terms(facts["loss_fn"]).items():
        losses = POSITION_LOSSES[name](logits.flatten(0, 1), teacher.flatten(0, 1)).view_as(mask)
        term = slot_loss(facts, losses, mask, first)
        total = total + factor * term
        metrics |= mean_metric(f"{name}_loss", Kind.LOSSES, term)
    return total, metrics


def mean_metric(name: str, kind: Kind, value: Tensor) -> Metrics:
    """What is recorded of a value that is a mean already."""
    return {f"{name}_sum": (kind, value.detach()), f"{name}_total": (Kind.METRICS, 1.0)}


def accuracy_metrics(logits: Tensor, teacher: Tensor, mask: Tensor, first: int) -> Metrics:
    """Greedy accuracies, of each slot and of all; ``eal`` sums the products of those means along the block."""
    correct = (logits.argmax(-1) == teacher.argmax(-1)) & mask
    right, count = correct.sum(0), mask.sum(0)
    rates = (right / count.clamp(min=1))[first:]
    metrics = mean_metric("eal", Kind.RATES, rates.cumprod(0).sum())
    metrics |= {"full_acc_sum": (Kind.METRICS, right.sum()), "full_acc_total": (Kind.METRICS, count.sum())}
    for slot in range(mask.shape[1]):
        metrics[f"position_{slot}_acc_sum"] = (Kind.METRICS, right[slot])
        metrics[f"position_{slot}_acc_total"] = (Kind.METRICS, count[slot])
    return metrics
