"""Golden vectors of DFlash and D-PACE. Each project's own conventions are rebuilt here from the product's parts.

Legend: B samples, N blocks, b slots of a block, K trained slots of a block, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.dflash.algorithm import DFlash
from specforge.algorithms.dflash.config import DFlashDraftConfig, DFlashOptions
from specforge.algorithms.dflash.features import supervise
from specforge.algorithms.dflash.loss import dpace_weights
from specforge.algorithms.dflash.model import DFlashDraft
from specforge.testing.golden.blocks import (
    BlockCase,
    all_logits,
    block_fields,
    check_backbone,
    check_gradients,
    check_loss,
    packed_case,
    padded_case,
    recorded_mask,
)
from specforge.testing.golden.eagle3 import POSITION_LOSSES
from specforge.testing.golden.report import Comparison, Kind, NotBuilt
from specforge.testing.golden.vectors import Vector


def run_dflash(vector: Vector, result: Comparison) -> None:
    runner = _PROJECTS.get(str(vector.facts.get("project")))
    if runner is None or "loss" not in vector.facts:
        raise NotBuilt(f"no runner for DFlash vectors of the project {vector.facts.get('project')!r}")
    runner(vector, result)


def _draft(vector: Vector) -> DFlashDraft:
    draft = DFlashDraft(DFlashDraftConfig(**block_fields(vector.facts)))
    draft.load_state_dict(vector.group("w"))
    return draft


# --- SpecForge, TorchSpec --------------------------------------------------------------------------------------------


def _padded(vector: Vector, result: Comparison) -> None:
    """Divided by the sum of the slots' weights; D-PACE by the number of samples."""
    facts, draft = vector.facts, _draft(vector)
    case = padded_case(vector, draft.config.block_size)
    algorithm = DFlash(_options(facts, draft.config.block_size))
    check_backbone(vector, result, case, draft)
    output = algorithm.block_loss(draft, case.tables, case.batch, case.blocks)
    mask = supervise(case.blocks, case.batch).mask
    divisor = float(case.num_samples)
    if algorithm.options.loss_type == "dflash":
        divisor = float((mask.sum(0) * torch.tensor(algorithm.options.slot_weights(mask.shape[1]))).sum())
    check_loss(vector, result, output.loss_sum / divisor)
    (output.loss_sum / divisor).backward()
    check_gradients(vector, result, draft)
    correct, count = output.correct.sum(), output.count.sum()
    optional = {
        "loss_num": (Kind.LOSSES, output.loss_sum),
        "loss_den": (Kind.LOSSES, torch.tensor(divisor)),
        "accuracy": (Kind.METRICS, correct.float() / count.float()),
        "accuracy_denom": (Kind.METRICS, count),
    }
    for name, (kind, value) in optional.items():
        if name in facts:
            result.check(kind, name, value, facts[name])
        if f"out.{name}" in vector.tensors:
            result.check(kind, f"out.{name}", value, vector.tensors[f"out.{name}"])
    if "out.logits" in vector.tensors:
        logits = all_logits(case, case.states(draft))
        result.check(Kind.LOGITS, "out.logits", logits, case.kept(vector.tensors["out.logits"]))


def _options(facts: dict[str, Any], block_size: int) -> DFlashOptions:
    gamma = facts.get("gamma")
    return DFlashOptions(
        block_size=block_size,
        gamma="uniform" if gamma is None else gamma,
        loss_type=facts.get("loss_type", "dflash"),
        dpace_alpha=facts.get("dpace_alpha", 0.5),
    )


# --- speculators -----------------------------------------------------------------------------------------------------


def _speculators(vector: Vector, result: Comparison) -> None:
    """One packed row; taught by the target's logits at the token before each label; divided by the number of
    supervised slots + 1e-5.

    With ``sample_from_anchor``, slot ``k`` predicts token ``a + 1 + k`` and is supervised by the mask of token
    ``a + k``; labels of the next document count where the mask is set.
    """
    facts, draft = vector.facts, _draft(vector)
    case = packed_case(vector, draft.config.block_size)
    first = 0 if facts["sample_from_anchor"] else 1
    mask, teacher = _slot_mask(case, first), _teacher(case, 0 if first == 0 else -1)
    result.check(Kind.METRICS, "mid.loss_mask", mask.long(), recorded_mask(vector, case).long())
    targets = case.kept(vector.tensors["mid.targets"])
    result.check(Kind.LOGITS, "mid.targets", teacher[mask], targets[mask])
    logits = all_logits(case, case.states(draft))
    result.check(Kind.LOGITS, "out.logits", logits, case.kept(vector.tensors["out.logits"]))
    terms = json.loads(facts["loss_fn"]) if facts["loss_fn"].startswith("{") else {facts["loss_fn"]: 1.0}
    row_losses = torch.stack(
        [share * _by_slot(POSITION_LOSSES[name], logits, teacher) for name, share in terms.items()]
    ).sum(0)
    weights = _speculators_weights(facts, row_losses.detach(), mask, first)
    loss = (row_losses * weights).sum() / (mask.sum() + 1e-5)
    check_loss(vector, result, loss)
    loss.backward()
    check_gradients(vector, result, draft)
    _check_metrics(facts, result, loss, (logits.argmax(-1) == teacher.argmax(-1)) & mask, mask)


def _slot_mask(case: BlockCase, first: int) -> Tensor:
    """bool [N, b]: the mask of the token at the slot's own position, in the pack; nothing before slot ``first``."""
    slots = torch.arange(case.blocks.block_size)
    places = case.blocks.anchors[:, None] + slots
    inside = places < case.batch.input_ids.numel()
    mask = case.batch.loss_mask[places.clamp(max=case.batch.input_ids.numel() - 1)]
    return mask & inside & (slots >= first)


def _teacher(case: BlockCase, shift: int) -> Tensor:
    """The target's logits [N, b, V] at token ``a + k + shift`` of the pack."""
    places = case.blocks.anchors[:, None] + torch.arange(case.blocks.block_size) + shift
    return all_logits(case, case.batch.features["last"][places.clamp(0, case.batch.input_ids.numel() - 1)])


def _by_slot(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, teacher: Tensor) -> Tensor:
    """A loss of rows [.., V], for all slots [N, b, V]: [N, b]."""
    return loss(logits.flatten(0, 1), teacher.flatten(0, 1)).view(logits.shape[:2])


def _speculators_weights(facts: dict[str, Any], entropy: Tensor, mask: Tensor, first: int) -> Tensor:
    """Weights [N, b] of the slots' losses."""
    kind, valid = facts["per_position_loss_weight"], mask.float()
    if kind == "fixed-exp-decay":
        slots = torch.arange(mask.shape[1])
        return valid * torch.exp(-(slots - first).clamp(min=0) / facts["gamma"])
    if kind in {"dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"}:
        return dpace_weights(entropy, valid, kind, facts["dpace_alpha"])
    if kind in {None, "none", "uniform"}:
        return valid
    raise NotBuilt(f"weights {kind!r}")


def _check_metrics(facts: dict[str, Any], result: Comparison, loss: Tensor, correct: Tensor, mask: Tensor) -> None:
    runs = torch.where(mask, correct, torch.ones_like(correct)).cumprod(1) * mask
    mine = {
        "loss_sum": loss,
        "loss_total": torch.ones(()),
        "full_acc_sum": correct.sum(),
        "full_acc_total": mask.sum(),
        "eal_sum": runs.sum(1).float().mean(),
        "eal_total": torch.ones(()),
    }
    for slot in range(mask.shape[1]):
        mine[f"position_{slot}_acc_sum"] = correct[:, slot].sum()
        mine[f"position_{slot}_acc_total"] = mask[:, slot].sum()
    for name, expected in facts["metrics"].items():
        result.check(Kind.LOSSES if name.startswith("loss") else Kind.METRICS, name, mine[name], expected)


_PROJECTS: dict[str, Callable[[Vector, Comparison], None]] = {
    "SpecForge": _padded,
    "TorchSpec": _padded,
    "speculators": _speculators,
}
