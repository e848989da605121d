"""Golden vectors of Domino: SpecForge's convention, divided by the sum of the weights + 1e-6.

Legend: b slots of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import StepContext, target_logits
from specforge.algorithms.domino.config import DominoDraftConfig
from specforge.algorithms.domino.features import SlotLabels, label_slots, lambda_base
from specforge.algorithms.domino.loss import correction_inputs, domino_loss
from specforge.algorithms.domino.model import DominoDraft
from specforge.algorithms.parts import losses
from specforge.testing.golden.blocks import (
    BlockCase,
    block_fields,
    check_backbone,
    check_loss,
    padded_case,
)
from specforge.testing.golden.gradients import check_gradients
from specforge.testing.golden.report import Comparison, Kind, Metrics, NotBuilt
from specforge.testing.golden.vectors import Vector

EPS = 1e-6


def run_domino(vector: Vector, result: Comparison) -> None:
    if "table" in vector.facts:
        _schedule(vector, result)
    elif vector.facts.get("project") == "SpecForge" and "loss" in vector.facts:
        _loss(vector, result)
    else:
        raise NotBuilt(f"no runner for Domino vectors of the project {vector.facts.get('project')!r}")


def _schedule(vector: Vector, result: Comparison) -> None:
    for entry in vector.facts["table"]:
        for step, expected in entry["values"].items():
            context = StepContext(int(step), entry["total_steps"] or 0, 0)
            got = lambda_base(context, entry["lambda_start"], entry["decay_ratio"])
            result.check(Kind.METRICS, f"lambda of {entry['total_steps']} at {step}", got, expected)


def domino_config(facts: dict[str, Any]) -> DominoDraftConfig:
    """The draft config of a vector's json, whose Domino keys are in ``config`` or beside it."""
    extra = {**facts, **facts["config"]}
    names = ("emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")
    return DominoDraftConfig(**block_fields(facts), **{name: extra[name] for name in names})


def _loss(vector: Vector, result: Comparison) -> None:
    facts = vector.facts
    draft = DominoDraft(domino_config(facts))
    draft.load_state_dict(vector.group("w"))
    config = draft.config
    case = padded_case(vector, config.block_size)
    check_backbone(vector, result, case, draft)
    gamma = facts["gamma"] or math.inf
    slot_weights = [math.exp(-k / gamma) for k in range(config.block_size - config.first_label)]
    labels = label_slots(case.batch, case.blocks, config.shift_label, slot_weights)
    base, final = _compare_logits(vector, result, draft, case, labels)
    with _chunks_of(facts.get("objective_chunk_blocks", 0) * config.block_size):
        output = domino_loss(draft, case.tables, case.batch, labels, facts["lambda_base"])
    loss = output.loss_sum / (labels.weights.sum() + EPS)
    loss.backward()
    check_loss(vector, result, loss)
    check_gradients(vector, result, draft)
    right, count = (value.float() for value in output.metrics["final_accuracy"])
    mine: Metrics = {
        "accuracy": (Kind.METRICS, right / (count + EPS)),
        "accuracy_denom": (Kind.METRICS, count),
        "lambda_base": (Kind.RATES, torch.div(*output.metrics["lambda_base"])),
        "accept_len": (Kind.METRICS, _accepted_length(case, labels, final, config.first_label)),
        "base_accept_len": (Kind.METRICS, _accepted_length(case, labels, base, config.first_label)),
    }
    for name in ("final_loss", "base_loss", "base_accuracy"):
        value, total = output.metrics[name]
        kind = Kind.METRICS if name == "base_accuracy" else Kind.LOSSES
        mine[name] = (kind, value.float() / (total.float() + EPS))
    result.check_recorded({"accuracy": facts["accuracy"], **facts["metrics"]}, mine)


@contextmanager
def _chunks_of(num_rows: int) -> Iterator[None]:
    """The product's losses in chunks of ``num_rows`` (0: as it would)."""
    before = losses.MIN_CHUNK_ROWS, losses.CHUNK_ELEMENTS["cpu"]
    if num_rows:
        losses.MIN_CHUNK_ROWS, losses.CHUNK_ELEMENTS["cpu"] = num_rows, 0
    try:
        yield
    finally:
        losses.MIN_CHUNK_ROWS, losses.CHUNK_ELEMENTS["cpu"] = before


def _compare_logits(
    vector: Vector, result: Comparison, draft: DominoDraft, case: BlockCase, labels: SlotLabels
) -> tuple[Tensor, Tensor]:
    """Logits [blocks, b, V] before and after the correction."""
    with torch.no_grad():
        hidden = draft.block_states(case.tables, case.batch, case.blocks)
        inputs = correction_inputs(draft, case.tables, case.batch, labels, hidden, torch.arange(len(hidden)))
        base = target_logits(case.tables, hidden)
        final = base + F.linear(inputs, draft.correction_head)
    base, final = (logits.unflatten(0, (-1, draft.config.block_size)) for logits in (base, final))
    result.check(Kind.LOGITS, "out.base_logits", base, case.kept(vector.tensors["out.base_logits"]))
    result.check(Kind.LOGITS, "out.final_logits", final, case.kept(vector.tensors["out.final_logits"]))
    return base, final


def _accepted_length(case: BlockCase, labels: SlotLabels, logits: Tensor, first: int) -> Tensor:
    """That project's measure: an invalid label neither ends a run nor counts."""
    valid = labels.valid[:, first:]
    correct = (logits.argmax(-1) == case.batch.input_ids[labels.tokens])[:, first:]
    runs = 1 + ((correct | ~valid).long().cumprod(1) * valid).sum(1)
    blocks = valid.any(1)
    return runs[blocks].sum().float() / (blocks.sum().float() + EPS)
