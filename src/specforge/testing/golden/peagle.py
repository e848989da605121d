"""Golden vectors of P-EAGLE. SpecForge's conventions are rebuilt here from the product's parts.

Legend: T tokens of the packed row, E elements, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import StepOutput, TargetTables
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.algorithms.peagle.config import PEagleDraftConfig
from specforge.algorithms.peagle.features import ElementPlan, make_plan
from specforge.algorithms.peagle.loss import elements_loss
from specforge.algorithms.peagle.model import PEagleDraft, element_attention
from specforge.testing.golden.gradients import check_gradients
from specforge.testing.golden.report import Comparison, Kind, NotBuilt
from specforge.testing.golden.vectors import Vector, recorded_sizes


def run_peagle(vector: Vector, result: Comparison) -> None:
    """One packed row with a recorded draw, ids and teacher shifted over documents, mask not shifted.

    Divided by the number of elements with an in-vocabulary teacher.
    """
    facts = vector.facts
    if facts.get("project") != "SpecForge" or "loss" not in facts:
        raise NotBuilt(f"no runner for P-EAGLE vectors of the project {facts.get('project')!r}")
    inputs = vector.group("in")
    draft = _draft(_config(facts["config"], inputs["aux_hidden"].shape[-1]), vector.group("w"))
    everything = recorded_plan(
        vector.tensors["mid.anchor_pos"],
        vector.tensors["mid.depth"],
        torch.cat((inputs["input_ids"][0, 1:], inputs["input_ids"].new_zeros(1))),
        inputs["lengths"].tolist(),
    )
    result.check(Kind.METRICS, "mid.mask", visible_elements(everything).long(), vector.tensors["mid.mask"].long())
    with torch.no_grad():
        logits = draft.lm_head(torch.cat(draft(inputs["aux_hidden"][0], everything)))
    result.check(Kind.LOGITS, "out.logits", logits, vector.tensors["out.logits"][0])
    valid = (inputs["loss_mask"][0] != 0).nonzero().squeeze(-1)
    plan = _read_out(everything, valid, inputs["lengths"].tolist())
    tables = TargetTables(draft.embed_tokens.weight.detach(), inputs["target_lm_head.weight"])
    readouts = draft(inputs["aux_hidden"][0], plan)
    output = elements_loss(draft, tables, inputs["last_hidden"][0], readouts, plan, facts["num_depths"])
    loss = output.loss_sum / output.metrics["in_vocabulary"][0].clamp(min=1e-6)
    loss.backward()
    for name in ("loss", "out.loss"):
        result.check(Kind.LOSSES, name, loss, facts["loss"] if name == "loss" else vector.tensors[name])
    _check_metrics(facts["metrics"], result, output, loss)
    check_gradients(vector, result, draft)


def recorded_plan(anchors: Tensor, depths: Tensor, token_ids: Tensor, lengths: Sequence[int]) -> ElementPlan:
    """The plan of recorded elements (depth-major, of depth 0 all T rows), with everything read out.

    ``token_ids`` int64 [T] are embedded at depth 0.
    """
    rows = torch.arange(token_ids.numel())
    deeper = [anchors[depths == depth] for depth in range(1, int(depths.max()) + 1)]
    return make_plan(rows, lengths, token_ids, rows, deeper, rows)


def visible_elements(plan: ElementPlan) -> Tensor:
    """bool [E, E]: what each element sees, read off the product's attention by values that name their element."""
    sizes = plan.sizes
    names = torch.eye(sum(sizes)).unsqueeze(1).split(sizes)
    silent = [torch.zeros_like(part) for part in names]
    return torch.cat(element_attention(plan.layouts, plan.shallower, silent, silent, names)).squeeze(1) > 0


def _read_out(plan: ElementPlan, rows: Tensor, lengths: Sequence[int]) -> ElementPlan:
    """``plan`` with only ``rows`` of depth 0 read out."""
    narrow = make_plan(plan.context, lengths, plan.token_ids, plan.positions, list(plan.anchors), rows)
    return replace(plan, outputs=narrow.outputs, output_layout=narrow.output_layout)


def _config(facts: dict[str, Any], aux_width: int) -> PEagleDraftConfig:
    sizes = recorded_sizes(facts, aux_width)
    return PEagleDraftConfig(**sizes, num_layers=facts["layers"], mask_token_id=facts["mask_token_id"])


def _draft(config: PEagleDraftConfig, weights: dict[str, Tensor]) -> PEagleDraft:
    """The product's draft with the vector's weights. Every weight must have a place."""
    draft = PEagleDraft(config, target_ids(weights["d2t"]))
    if not torch.equal(draft.t2d, weights["t2d"] != 0):
        raise ValueError("t2d of the vector does not mark the ids of its d2t")
    draft.load_state_dict(weights | {"t2d": weights["t2d"] != 0})
    return draft


def _check_metrics(metrics: dict[str, float], result: Comparison, output: StepOutput, loss: Tensor) -> None:
    """Accuracies count the elements with an in-vocabulary teacher."""
    known = [output.metrics[f"acceptance_rate_{depth}"][1] for depth in range(output.count.numel())]
    values: dict[str, Tensor] = {"loss_sum": loss, "loss_total": torch.ones(())}
    for depth, number in enumerate(known):
        values[f"position_{depth}_acc_sum"] = output.correct[depth]
        values[f"position_{depth}_acc_total"] = number
    values["full_acc_sum"], values["full_acc_total"] = output.correct.sum(), torch.stack(known).sum()
    kinds = {name: Kind.LOSSES if name == "loss_sum" else Kind.METRICS for name in values}
    result.check_recorded(metrics, {name: (kinds[name], value) for name, value in values.items()})
