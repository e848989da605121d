"""Golden vectors of DSpark. Each project's own conventions are rebuilt here from the product's parts.

Legend: N blocks, b slots of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import StepOutput, target_logits
from specforge.algorithms.dspark.config import DSparkDraftConfig
from specforge.algorithms.dspark.features import SlotLabels, label_slots
from specforge.algorithms.dspark.loss import LossWeights, dspark_loss
from specforge.algorithms.dspark.model import DSparkDraft, SlotOutputs
from specforge.testing.golden.blocks import (
    BlockCase,
    block_fields,
    check_backbone,
    check_loss,
    packed_case,
    padded_case,
    recorded_mask,
)
from specforge.testing.golden.gradients import check_gradients
from specforge.testing.golden.position_losses import overlap
from specforge.testing.golden.report import Comparison, Kind, Metrics, NotBuilt
from specforge.testing.golden.speculators import (
    accuracy_metrics,
    first_slot,
    mean_metric,
    slot_loss,
    slot_mask,
    slot_places,
    slot_teacher,
    taught_loss,
)
from specforge.testing.golden.vectors import Vector, named_source


def run_dspark(vector: Vector, result: Comparison) -> None:
    runner = _PROJECTS.get(str(vector.facts.get("project")))
    if runner is None or "loss" not in vector.facts:
        raise NotBuilt(f"no runner for DSpark vectors of the project {vector.facts.get('project')!r}")
    runner(vector, result)


def dspark_config(facts: dict[str, Any], weights: dict[str, Tensor]) -> DSparkDraftConfig:
    """The draft config of a vector's json, whose DSpark keys are in ``config`` or beside it."""
    extra = {**facts["config"], **facts}
    rank = extra.get("markov_rank") or 0
    proj = weights.get("confidence_head.proj.weight")
    return DSparkDraftConfig(
        **block_fields(facts),
        markov_rank=rank,
        markov_head_type=(rank and extra.get("markov_head_type")) or "vanilla",
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
    ratios = _ratios(output) | _agreement(case, labels, logits)
    result.check_recorded({"accuracy": [vector.facts["accuracy"]]}, {"accuracy": ratios["acc"].parts["value"]})
    for name, recorded in vector.facts["ratio_metrics"].items():
        if not _left_out(name, recorded["num"], vector.facts["alphas"]):
            mine: Metrics = ratios[name].parts if name in ratios else {}
            result.check_recorded(recorded, mine, f"{name}.")


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A metric as that project records it: ``kind`` is that of the numerator, ``weight_kind`` of the denominator."""

    kind: Kind
    numerator: Tensor
    denominator: Tensor
    weight_kind: Kind = Kind.METRICS

    @property
    def floats(self) -> tuple[Tensor, Tensor]:
        return self.numerator.float().reshape(-1), self.denominator.float().reshape(-1)

    @property
    def parts(self) -> Metrics:
        numerator, denominator = self.floats
        value = numerator / denominator.clamp(min=1e-6)
        return {
            "num": (self.kind, numerator),
            "den": (self.weight_kind, denominator),
            "value": (self.kind, value),
        }


def _ratios(output: StepOutput) -> dict[str, _Ratio]:
    """What the product measures."""
    ratios = {
        "acc": _Ratio(Kind.METRICS, output.correct.sum(), output.count.sum()),
        "accuracy_position": _Ratio(Kind.METRICS, output.correct, output.count),
    }
    for name, kind in _METRICS.items():
        if name in output.metrics:
            weight_kind = Kind.METRICS if name == "tau_probabilistic" else Kind.LOSSES
            ratios[name] = _Ratio(kind, *output.metrics[name], weight_kind)
    return ratios


def _agreement(case: BlockCase, labels: SlotLabels, logits: Tensor) -> dict[str, _Ratio]:
    """What that project measures besides, on logits [N, b, V]."""
    valid = labels.valid
    targets = case.batch.input_ids[labels.tokens]
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(valid)
    confidence = logits.softmax(-1).amax(-1)
    ratios = {
        "ce_position": _Ratio(Kind.LOSSES, (entropy * valid).sum(0), valid.sum(0)),
        "draft_top1_prob": _Ratio(Kind.RATES, confidence[valid].sum(), valid.sum()),
    }
    if "last" not in case.batch.features:
        return ratios
    teacher = target_logits(case.tables, case.batch.features["last"])[labels.previous]
    agreed = (teacher.argmax(-1) == logits.argmax(-1)) & valid
    return ratios | {
        "teacher_agreement": _Ratio(Kind.METRICS, agreed.sum(), valid.sum()),
        "teacher_top1_prob": _Ratio(Kind.RATES, teacher.softmax(-1).amax(-1)[valid].sum(), valid.sum()),
    }


def _left_out(name: str, recorded: list[float] | float, alphas: list[float]) -> bool:
    """Whether a metric is the zero that those projects record of a term without a factor or without a teacher."""
    _, l1, confidence = alphas
    if name == "l1_loss":
        off = l1 == 0
    elif name.startswith("confidence"):
        off = confidence == 0
    else:
        off = l1 == confidence == 0 and name.startswith(("teacher", "draft_top1", "tau_prob", "accept_rate"))
    return off and not torch.tensor(recorded).any()


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
    source = named_source(vector)
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
    mine: Metrics = {"loss": (Kind.LOSSES, output.loss_sum.detach() / labels.weights.sum())}
    mine |= _block_metrics(source, case, labels)
    names = {f"acceptance_rate_{k}": f"accept_rate@{k}" for k in range(logits.shape[1])}
    names |= {name: name for name in (*_METRICS, "confidence_bias")}
    names |= {"confidence_cumulative_bias": "confidence_cumprod_bias"}
    for name, theirs in names.items():
        if name in output.metrics:
            mine[theirs] = (_METRICS.get(name, Kind.RATES), torch.div(*output.metrics[name]))
    recorded = {name.removeprefix("train/"): value for name, value in vector.facts["metrics"].items()}
    kept = {name: value for name, value in recorded.items() if not _left_out(name, value, facts["alphas"])}
    result.check_recorded(kept, mine, "train/")


def _block_metrics(source: Vector, case: BlockCase, labels: SlotLabels) -> Metrics:
    """Means over samples: tokens that may be anchors, those that are, and the labels of a block."""
    supervised, kept = source.tensors["in.loss_mask"] != 0, case.keep.view(case.num_samples, -1)
    candidates = (supervised[:, :-1] & supervised[:, 1:]).sum(1).float()
    counts = torch.zeros(case.keep.numel())
    counts[case.keep] = labels.valid.sum(1).float()
    anchors = kept.sum(1).float()
    per_block = (counts.view_as(kept).sum(1) / anchors.clamp(min=1)).mean()
    return {
        "valid_anchors_abs": (Kind.METRICS, candidates.mean()),
        "valid_anchors_ratio": (Kind.RATES, candidates.mean() / supervised.shape[1]),
        "sampled_anchors_abs": (Kind.METRICS, anchors.mean()),
        "sampled_anchors_ratio": (Kind.RATES, anchors.mean() / kept.shape[1]),
        "block_supervised_tokens_abs": (Kind.RATES, per_block),
        "block_supervised_tokens_ratio": (Kind.RATES, per_block / case.blocks.block_size),
    }


# --- speculators -----------------------------------------------------------------------------------------------------


def _speculators(vector: Vector, result: Comparison) -> None:
    facts = vector.facts
    weights = {name: value for name, value in vector.group("w").items() if not name.startswith("verifier")}
    draft = _draft(dspark_config(facts, weights), weights)
    case, first = packed_case(vector, draft.config.block_size), first_slot(facts, default=True)
    (places, inside), mask = slot_places(case), slot_mask(case, first)
    # the token before the label: the slot's own, or without sample_from_anchor the one before (slot 0: the anchor)
    previous = torch.maximum(places - first, places[:, :1])
    outputs, _, logits = _outputs(draft, case, SlotLabels(case.blocks, previous, places, mask.float()))
    teacher = slot_teacher(case, first)
    found = {"mid.targets": teacher, "out.draft_logits": logits, "out.confidence_logits": outputs.confidence}
    for name, value in found.items():
        if name in vector.tensors and value is not None:
            result.check(Kind.LOGITS, name, value[inside], case.kept(vector.tensors[name])[inside])
    result.check(Kind.METRICS, "mid.loss_mask", mask.long(), recorded_mask(vector, case).long())
    loss, metrics = taught_loss(facts, logits, teacher, mask, first)
    accepted = overlap(logits, teacher).detach().clamp(0, 1)
    metrics |= _accepted_metrics(accepted, mask, first) | accuracy_metrics(logits, teacher, mask, first)
    if outputs.confidence is not None:
        entropy = F.binary_cross_entropy_with_logits(outputs.confidence, accepted, reduction="none")
        term = slot_loss(facts, entropy, mask, first)
        loss = loss + facts["confidence_head_alpha"] * term
        metrics |= mean_metric("confidence_loss", Kind.LOSSES, term)
        metrics |= _confidence_metrics(outputs.confidence.detach().sigmoid(), accepted, mask, first)
    loss.backward()
    check_loss(vector, result, loss)
    check_gradients(vector, result, draft)
    result.check_recorded(facts["metrics"], metrics | mean_metric("loss", Kind.LOSSES, loss))


def _accepted_metrics(accepted: Tensor, mask: Tensor, first: int) -> Metrics:
    """The acceptance of a slot, and the expected length of a block with its bonus token; ``accepted`` [N, b]."""
    runs = 1.0 + (accepted * mask)[:, first:].cumprod(1).sum(1)
    blocks = mask.any(1)
    return {
        "accept_rate_sum": (Kind.RATES, accepted[mask].sum()),
        "accept_rate_total": (Kind.METRICS, mask.sum()),
        "accept_len_sum": (Kind.RATES, runs[blocks].sum()),
        "accept_len_total": (Kind.METRICS, blocks.sum()),
    }


def _confidence_metrics(confidence: Tensor, accepted: Tensor, mask: Tensor, first: int) -> Metrics:
    """Sums over slots: the error of the confidence [N, b], itself, and the error of its product along the block."""
    planned, actual = ((values * mask)[:, first:].cumprod(1) for values in (confidence, accepted))
    sums = {
        "confidence_abs_error": (confidence - accepted)[mask].abs().sum(),
        "confidence_pred_mean": confidence[mask].sum(),
        "confidence_cumprod_bias": ((planned - actual) * mask[:, first:]).sum(),
    }
    metrics = Metrics()
    for name, value in sums.items():
        metrics |= {f"{name}_sum": (Kind.RATES, value), f"{name}_total": (Kind.METRICS, mask.sum())}
    return metrics


_PROJECTS: dict[str, Callable[[Vector, Comparison], None]] = {
    "SpecForge": _specforge,
    "DeepSpec": _deepspec,
    "speculators": _speculators,
}
