"""Golden vectors of DSpark. Each project's own conventions are rebuilt here from the product's parts.

Legend: N blocks, b slots of a block, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import StepOutput, target_logits
from specforge.algorithms.dspark.config import DSparkDraftConfig
from specforge.algorithms.dspark.features import SlotLabels, label_slots
from specforge.algorithms.dspark.loss import LossWeights, dspark_loss
from specforge.algorithms.dspark.model import DSparkDraft, SlotOutputs
from specforge.algorithms.parts.blocks import slot_tokens
from specforge.testing.golden.blocks import (
    BlockCase,
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
from specforge.testing.golden.vectors import Vector, read_vector


def run_dspark(vector: Vector, result: Comparison) -> None:
    runner = _PROJECTS.get(str(vector.facts.get("project")))
    if runner is None or "loss" not in vector.facts:
        raise NotBuilt(f"no runner for DSpark vectors of the project {vector.facts.get('project')!r}")
    runner(vector, result)


def dspark_config(facts: dict[str, Any], weights: dict[str, Tensor]) -> DSparkDraftConfig:
    """The draft config of a vector's json, whose DSpark keys are in ``config`` or beside it."""
    extra = {**facts["config"], **facts}
    proj = weights.get("confidence_head.proj.weight")
    return DSparkDraftConfig(
        **block_fields(facts),
        markov_rank=extra["markov_rank"],
        markov_head_type=extra["markov_head_type"],
        enable_confidence_head=proj is not None,
        confidence_head_with_markov=proj is not None and proj.shape[1] > facts["config"]["hidden_size"],
    )


def _draft(config: DSparkDraftConfig, weights: dict[str, Tensor]) -> DSparkDraft:
    draft = DSparkDraft(config)
    draft.load_state_dict(weights)
    return draft


def _decays(facts: dict[str, Any], block_size: int) -> list[float]:
    return [math.exp(-k / (facts["gamma"] or math.inf)) for k in range(block_size)]


def _outputs(draft: DSparkDraft, case: BlockCase, labels: SlotLabels) -> tuple[SlotOutputs, Tensor, Tensor]:
    """What the draft gives, and the logits [N, b, V] before and after the bias."""
    outputs = draft.slot_outputs(case.tables, case.batch, labels)
    base = target_logits(case.tables, outputs.hidden)
    if draft.markov_head is None or outputs.markov is None:
        return outputs, base, base
    return outputs, base, base + draft.markov_head.markov_w2(outputs.markov)


def _train(vector: Vector, result: Comparison, draft: DSparkDraft, case: BlockCase, labels: SlotLabels) -> StepOutput:
    """The product's loss divided by the sum of the weights, with its gradients."""
    output = dspark_loss(draft, case.tables, case.batch, labels, LossWeights(*vector.facts["alphas"]))
    loss = output.loss_sum / labels.weights.sum()
    loss.backward()
    check_loss(vector, result, loss)
    check_gradients(vector, result, draft)
    return output


# --- SpecForge -------------------------------------------------------------------------------------------------------


def _specforge(vector: Vector, result: Comparison) -> None:
    draft = _draft(dspark_config(vector.facts, vector.group("w")), vector.group("w"))
    case = padded_case(vector, draft.config.block_size)
    labels = label_slots(case.batch, case.blocks, _decays(vector.facts, draft.config.block_size))
    check_backbone(vector, result, case, draft)
    with torch.no_grad():
        outputs, base, logits = _outputs(draft, case, labels)
    found = {"base_logits": base, "draft_logits": logits, "confidence_logits": outputs.confidence}
    for name, value in found.items():
        if f"out.{name}" in vector.tensors and value is not None:
            result.check(Kind.LOGITS, f"out.{name}", value, case.kept(vector.tensors[f"out.{name}"]))
    output = _train(vector, result, draft, case, labels)
    expected = vector.facts["ratio_metrics"]
    count = output.count.sum().float()
    result.check(Kind.METRICS, "acc.num", output.correct.sum(), expected["acc"]["num"][0])
    result.check(Kind.METRICS, "acc.den", count, expected["acc"]["den"][0])
    result.check(
        Kind.METRICS, "accuracy_position.num", output.correct, torch.tensor(expected["accuracy_position"]["num"])
    )
    result.check(
        Kind.METRICS, "accuracy_position.den", output.count, torch.tensor(expected["accuracy_position"]["den"])
    )
    for name, kind in _METRICS.items():
        if name in output.metrics and name in expected:
            result.check(kind, name, torch.div(*output.metrics[name]), expected[name]["value"][0])


_METRICS = {
    "ce_loss": Kind.LOSSES,
    "l1_loss": Kind.LOSSES,
    "confidence_loss": Kind.LOSSES,
    "confidence_abs_error": Kind.RATES,
    "tau_probabilistic": Kind.RATES,
}


# --- DeepSpec --------------------------------------------------------------------------------------------------------


def _deepspec(vector: Vector, result: Comparison) -> None:
    """Inputs and weights of a SpecForge vector; heads that the objective does not use are not there."""
    named = re.search(r"(\S+)\.safetensors", vector.facts["inputs"])
    if named is None:
        raise ValueError(f"no file named in inputs: {vector.facts['inputs']!r}")
    path = vector.path.parent / f"{named[1]}.json"
    source = read_vector(path)
    facts = {**source.facts, **vector.facts}
    weights = source.group("w")
    dropped: tuple[str, ...] = () if facts["markov_rank"] else ("markov_head.",)
    dropped += () if facts["alphas"][2] else ("confidence_head.",)
    weights = {name: value for name, value in weights.items() if not name.startswith(dropped)}
    draft = _draft(dspark_config(facts, weights), weights)
    case = padded_case(source, draft.config.block_size)
    labels = label_slots(case.batch, case.blocks, _decays(facts, draft.config.block_size))
    with torch.no_grad():
        _, _, logits = _outputs(draft, case, labels)
    result.check(Kind.LOGITS, "out.draft_logits", logits, case.kept(vector.tensors["out.draft_logits"]))
    output = _train(vector, result, draft, case, labels)
    expected = vector.facts["metrics"]
    names = {f"acceptance_rate_{k}": f"accept_rate@{k}" for k in range(logits.shape[1])}
    names |= {name: name for name in _METRICS}
    names |= {"confidence_bias": "confidence_bias", "confidence_cumulative_bias": "confidence_cumprod_bias"}
    for name, theirs in names.items():
        if name in output.metrics:
            kind = _METRICS.get(name, Kind.RATES)
            result.check(kind, theirs, torch.div(*output.metrics[name]), expected[f"train/{theirs}"])


# --- speculators -----------------------------------------------------------------------------------------------------


def _speculators(vector: Vector, result: Comparison) -> None:
    """One packed row; a slot counts where its own position is supervised, each on its own; teacher's greedy labels.

    Divided by the number of those slots + 1e-5.
    """
    facts = vector.facts
    weights = {name: value for name, value in vector.group("w").items() if not name.startswith("verifier")}
    draft = _draft(dspark_config(facts, weights), weights)
    case = packed_case(vector, draft.config.block_size)
    tokens, inside = slot_tokens(case.blocks, 0)
    mask = inside & case.batch.loss_mask[tokens]
    labels = SlotLabels(case.blocks, tokens, tokens, mask * torch.tensor(_decays(facts, draft.config.block_size)))
    outputs, _, logits = _outputs(draft, case, labels)
    teacher = target_logits(case.tables, case.batch.features["last"])[tokens]
    found = {"mid.targets": teacher, "out.draft_logits": logits, "out.confidence_logits": outputs.confidence}
    for name, value in found.items():
        if name in vector.tensors and value is not None:
            result.check(Kind.LOGITS, name, value[inside], case.kept(vector.tensors[name])[inside])
    result.check(Kind.METRICS, "mid.loss_mask", mask.long(), recorded_mask(vector, case).long())
    terms, loss = _speculators_loss(facts, outputs, logits, teacher, labels.weights)
    loss.backward()
    check_loss(vector, result, loss)
    check_gradients(vector, result, draft)
    for name, value in terms.items():
        result.check(Kind.LOSSES, f"{name}_loss_sum", value, facts["metrics"][f"{name}_loss_sum"])
    correct = (logits.argmax(-1) == teacher.argmax(-1)) & mask
    for k in range(draft.config.block_size):
        result.check(Kind.METRICS, f"acc@{k}", correct[:, k].sum(), facts["metrics"][f"position_{k}_acc_sum"])
        result.check(Kind.METRICS, f"total@{k}", mask[:, k].sum(), facts["metrics"][f"position_{k}_acc_total"])


def _speculators_loss(
    facts: dict[str, Any], outputs: SlotOutputs, logits: Tensor, teacher: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """(each term, their weighted sum), written out on whole logits [N, b, V]; ``weights`` [N, b]."""
    count = (weights > 0).sum() + 1e-5
    factors: dict[str, float] = json.loads(facts["loss_fn"])
    terms = {}
    for name in factors:
        losses = POSITION_LOSSES[name](logits.flatten(0, 1), teacher.flatten(0, 1)).view_as(weights)
        terms[name] = (losses * weights).sum() / count
    if outputs.confidence is not None:
        acceptance = torch.minimum(logits.softmax(-1), teacher.softmax(-1)).sum(-1).detach().clamp(0, 1)
        entropy = F.binary_cross_entropy_with_logits(outputs.confidence, acceptance, reduction="none")
        terms["confidence"] = (entropy * weights).sum() / count
        factors = {**factors, "confidence": facts["confidence_head_alpha"]}
    return terms, torch.stack([factor * terms[name] for name, factor in factors.items()]).sum()


_PROJECTS: dict[str, Callable[[Vector, Comparison], None]] = {
    "SpecForge": _specforge,
    "DeepSpec": _deepspec,
    "speculators": _speculators,
}
