"""Golden vectors of DFlash and D-PACE. Each project's own conventions are rebuilt here from the product's parts.

Legend: B samples, N blocks, b slots of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specforge.algorithms.dflash.algorithm import DFlash
from specforge.algorithms.dflash.config import DFlashDraftConfig, DFlashOptions
from specforge.algorithms.dflash.features import supervise
from specforge.algorithms.dflash.model import DFlashDraft
from specforge.testing.golden.blocks import (
    all_logits,
    block_fields,
    check_backbone,
    check_loss,
    packed_case,
    padded_case,
    recorded_mask,
)
from specforge.testing.golden.gradients import check_gradients
from specforge.testing.golden.report import Comparison, Kind, NotBuilt
from specforge.testing.golden.speculators import (
    accuracy_metrics,
    first_slot,
    mean_metric,
    slot_mask,
    slot_teacher,
    taught_loss,
)
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
    """``gamma`` null: no decay; the D-PACE losses have none, and the plain loss no ``dpace_alpha``."""
    options = {"block_size": block_size, "loss_type": facts.get("loss_type", "dflash")}
    if options["loss_type"] == "dflash":
        gamma = facts.get("gamma")
        return DFlashOptions(**options, gamma="uniform" if gamma is None else gamma)
    return DFlashOptions(**options, dpace_alpha=facts.get("dpace_alpha", 0.5))


# --- speculators -----------------------------------------------------------------------------------------------------


def _speculators(vector: Vector, result: Comparison) -> None:
    facts, draft = vector.facts, _draft(vector)
    case, first = packed_case(vector, draft.config.block_size), first_slot(facts, default=False)
    mask, teacher = slot_mask(case, first), slot_teacher(case, first)
    result.check(Kind.METRICS, "mid.loss_mask", mask.long(), recorded_mask(vector, case).long())
    targets = case.kept(vector.tensors["mid.targets"])
    result.check(Kind.LOGITS, "mid.targets", teacher[mask], targets[mask])
    logits = all_logits(case, case.states(draft))
    result.check(Kind.LOGITS, "out.logits", logits, case.kept(vector.tensors["out.logits"]))
    loss, metrics = taught_loss(facts, logits, teacher, mask, first)
    check_loss(vector, result, loss)
    loss.backward()
    check_gradients(vector, result, draft)
    metrics |= mean_metric("loss", Kind.LOSSES, loss)
    result.check_recorded(facts["metrics"], metrics | accuracy_metrics(logits, teacher, mask, first))


_PROJECTS: dict[str, Callable[[Vector, Comparison], None]] = {
    "SpecForge": _padded,
    "TorchSpec": _padded,
    "speculators": _speculators,
}
