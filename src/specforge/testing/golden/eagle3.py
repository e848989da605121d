"""Golden vectors of EAGLE-3. Each project's own conventions are rebuilt here from the product's parts.

Legend: B samples, S padded length, T = B * S packed tokens (a padded sample is a document of S tokens), K steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.algorithms.base import StepContext, TargetTables, target_logits
from specforge.algorithms.eagle3.algorithm import Eagle3
from specforge.algorithms.eagle3.config import Eagle3DraftConfig, Eagle3Options
from specforge.algorithms.eagle3.features import Supervision, UnrollPlan, plan_unroll
from specforge.algorithms.eagle3.loss import (
    LossRows,
    RowLoss,
    make_teacher,
    mean_overlaps,
    per_row,
    unroll,
    unroll_loss,
)
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.algorithms.parts.attention import packed_layout
from specforge.algorithms.parts.losses import (
    SoftTargets,
    Source,
    Teacher,
    WeighedTargets,
    cross_entropy,
    negative_log_acceptance,
)
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot
from specforge.testing.golden.gradients import check_gradients
from specforge.testing.golden.position_losses import POSITION_LOSSES, loss_terms
from specforge.testing.golden.report import Comparison, Kind, Metrics, NotBuilt
from specforge.testing.golden.vectors import Vector, named_source, recorded_sizes

STEP_DECAY = 0.8


def run_eagle3(vector: Vector, result: Comparison) -> None:
    runner = _PROJECTS.get(str(vector.facts.get("project")))
    if runner is None or "loss" not in vector.facts:
        raise NotBuilt(f"no runner for EAGLE-3 vectors of the project {vector.facts.get('project')!r}")
    runner(vector, result)


@dataclass(frozen=True, slots=True)
class _Case:
    """A vector turned into the product's records."""

    draft: Eagle3Draft
    tables: TargetTables
    batch: TrainBatch[Tensor]
    num_steps: int


# --- SpecForge -------------------------------------------------------------------------------------------------------


def _specforge(vector: Vector, result: Comparison) -> None:
    """Mask not shifted (offset 0), divided by B * S. Its ``norm_output = false`` drops the norm before the head."""
    facts = vector.facts
    case = padded_case(vector, facts["ttt_length"], facts["cfg_extra"])
    objective = _SpecForgeObjective.of(facts["kw"], case.batch.input_ids.numel())
    _compare_unroll(vector, result, case)
    plan, supervision = plan_unroll(case.batch, supervised_rows(case.batch, case.num_steps, 0))
    teacher = make_teacher(case.draft, case.tables, case.batch, supervision)
    divisors = objective.divisors(supervision, teacher)
    readouts = unroll(case.draft, case.tables, case.batch, plan)
    weights = (_decay(case.num_steps) / divisors).unsqueeze(-1)
    output = unroll_loss(case.draft, readouts, supervision, teacher, weights, objective.row_loss)
    loss = output.loss_sum
    loss.backward()
    step_losses = [output.metrics[f"loss_step_{k}"][0] / divisors[k] for k in range(case.num_steps)]
    rates = [torch.div(*output.metrics[f"acceptance_rate_{k}"]) for k in range(case.num_steps)]
    _check_losses(vector, result, loss, step_losses)
    _check_list(vector, result, Kind.METRICS, "acc_corrects", output.correct)
    _check_list(vector, result, Kind.METRICS, "acc_denoms", output.count)
    _check_list(vector, result, Kind.METRICS, "acces", output.correct.float() / output.count.float())
    _check_list(vector, result, Kind.RATES, "acceptance_rates", torch.stack(rates))
    check_gradients(vector, result, case.draft, _product_name)


class _SpecForgeObjective:
    """Soft CE, or its LK losses: ``alpha`` is the mean of -log alpha over the rows with an in-vocabulary teacher,
    ``lambda`` is ``lam * (soft CE as it is without LK) + (1 - lam) * (1 - mean alpha)`` with
    ``lam = kl_scale * exp(-kl_decay * mean alpha)``.
    """

    def __init__(self, kind: str | None, size: int, scale: float, decay: float) -> None:
        self.kind, self.size, self.scale, self.decay = kind, size, scale, decay

    @classmethod
    def of(cls, values: dict[str, Any], size: int) -> _SpecForgeObjective:
        """From the vector's ``kw``; ``size`` is B * S."""
        if unknown := set(values) - {"lk_loss_type", "kl_scale", "kl_decay"}:
            raise ValueError(f"unknown keys in kw: {sorted(unknown)}")
        kind = values.get("lk_loss_type")
        if kind not in (None, "alpha", "lambda"):
            raise ValueError(f"unknown lk_loss_type {kind!r}; expected 'alpha' or 'lambda'")
        return cls(kind, size, values.get("kl_scale", 1.0), values.get("kl_decay", 1.0))

    def divisors(self, supervision: Supervision, teacher: Teacher) -> Tensor:
        """What the sums over the rows of each step are divided by, fp32 [K]."""
        if self.kind == "alpha":
            return _known_counts(supervision, teacher).clamp(min=1).float()
        return torch.full((supervision.mask.shape[0],), float(self.size))

    @property
    def row_loss(self) -> RowLoss:
        if self.kind == "lambda":
            return self._mixture
        return per_row(negative_log_acceptance if self.kind == "alpha" else cross_entropy)

    def _mixture(self, rows: LossRows, source: Source) -> SoftTargets:
        share = self.scale * torch.exp(-self.decay * mean_overlaps(rows, source))
        counts = rows.by_step(torch.ones_like(rows.weights)).clamp(min=1).float()
        shares = share[rows.steps], ((1.0 - share) * self.size / counts)[rows.steps]
        return WeighedTargets(rows.teacher, rows.teacher_rows, rows.weights, shares)


def _known_counts(supervision: Supervision, teacher: Teacher) -> Tensor:
    """Supervised rows of each step whose teacher token the draft has, int64 [K]."""
    known = torch.zeros_like(supervision.mask)
    known[supervision.mask] = teacher.known(teacher.slots[supervision.teachers[supervision.mask]])
    return known.sum(1)


def padded_case(vector: Vector, num_steps: int, extra: dict[str, Any]) -> _Case:
    if unknown := set(extra) - {"fc_norm", "norm_output"}:
        raise ValueError(f"unknown keys in cfg_extra: {sorted(unknown)}")
    inputs, weights = vector.group("in"), vector.group("w")
    config = replace(
        _config(vector.facts["config"], inputs["aux_hidden"].shape[-1]), fc_norm=bool(extra.get("fc_norm", False))
    )
    draft = _draft(config, weights)
    if not extra.get("norm_output", True):
        draft.norm = nn.Identity()
    tables = TargetTables(weights["embed_tokens.weight"], inputs["target_lm_head.weight"])
    return _Case(draft, tables, _batch(inputs, inputs["loss_mask"]), num_steps)


# --- TorchSpec -------------------------------------------------------------------------------------------------------


def _torchspec(vector: Vector, result: Comparison) -> None:
    """SpecForge's inputs; each step divided by its own number of rows with an in-vocabulary teacher."""
    source = named_source(vector)
    case = padded_case(source, len(vector.facts["plosses"]), source.facts["cfg_extra"])
    plan, supervision, teacher = _full_plan(case)
    counts = _known_counts(supervision, teacher).clamp(min=1)
    readouts = unroll(case.draft, case.tables, case.batch, plan)
    weights = (_decay(case.num_steps) / counts).unsqueeze(-1)
    output = unroll_loss(case.draft, readouts, supervision, teacher, weights, per_row(cross_entropy))
    output.loss_sum.backward()
    step_losses = [output.metrics[f"loss_step_{k}"][0] / counts[k] for k in range(case.num_steps)]
    _check_losses(vector, result, output.loss_sum, step_losses)
    _check_list(vector, result, Kind.METRICS, "acces", output.correct.float() / counts.float())
    check_gradients(vector, result, case.draft, _product_name)


# --- DeepSpec --------------------------------------------------------------------------------------------------------


def _deepspec(vector: Vector, result: Comparison) -> None:
    """Full vocabulary, query and key norms, head frozen and the target's; the mask of the last valid token is cut."""
    inputs, weights = vector.group("in"), vector.group("w")
    config = _config(vector.facts["config"], inputs["aux_hidden"].shape[-1])
    draft = _draft(replace(config, architecture="qwen3"), weights)
    draft.lm_head.requires_grad_(False)
    mask = inputs["loss_mask"].clone()
    mask[torch.arange(mask.shape[0]), inputs["attention_mask"].sum(1) - 1] = 0
    tables = TargetTables(weights["embed_tokens.weight"], weights["lm_head.weight"])
    case = _Case(draft, tables, _batch(inputs, mask), vector.facts["config"]["ttt"])
    logits = _compare_unroll(vector, result, case)
    output = _algorithm(case.num_steps).forward_loss(draft, tables, case.batch, StepContext(0, 1, 0))
    size = case.batch.input_ids.numel()
    loss = output.loss_sum / size
    loss.backward()
    _check_losses(vector, result, loss, [])
    check_gradients(vector, result, draft, _product_name)
    run_sum, run_count = output.runs.sums()
    mine: Metrics = {
        "train/loss": (Kind.LOSSES, loss),
        "train/tau_greedy": (Kind.METRICS, run_sum.double() / run_count.double()),
        "train/tau_probabilistic": (Kind.RATES, _tau(case, logits)),
    }
    for k in range(case.num_steps):
        accuracy = output.correct[k].double() / output.count[k].double()
        mine |= {
            f"train/ploss_{k}": (Kind.LOSSES, output.metrics[f"loss_step_{k}"][0] / size),
            f"train/valid_tokens@{k}": (Kind.METRICS, output.count[k]),
            f"train/accuracy@{k}": (Kind.METRICS, accuracy),
            f"train/accept_rate@{k}": (Kind.RATES, torch.div(*output.metrics[f"acceptance_rate_{k}"])),
        }
    result.check_recorded(vector.facts["metrics"], mine)


def _tau(case: _Case, logits: list[Tensor]) -> Tensor:
    """Mean over rows supervised at step 0 of ``1 + sum_k prod_{i<=k} sum_v min(p, q)``."""
    _, supervision, _ = _full_plan(case)
    teacher = torch.softmax(target_logits(case.tables, case.batch.features["last"]), dim=-1)
    accepted = []
    for k, step in enumerate(logits):
        overlap = torch.minimum(teacher[supervision.teachers[k]], torch.softmax(step, dim=-1)).sum(-1)
        accepted.append(torch.where(supervision.mask[k], overlap, 0.0))
    runs = 1 + torch.stack(accepted).cumprod(0).sum(0)
    return runs[supervision.mask[0]].mean()


# --- speculators -----------------------------------------------------------------------------------------------------


def _speculators(vector: Vector, result: Comparison) -> None:
    """One packed row whose first token of each document is dropped; ids, teacher and mask shift over documents.

    Divided by the number of supervised rows of the step + 1e-5; teachers outside the draft vocabulary are kept.
    """
    facts, inputs, weights = vector.facts, vector.group("in"), vector.group("w")
    config = _config(facts["config"], inputs["hidden_states"].shape[-1])
    draft = _draft(replace(config, **facts["flags"]), weights)
    draft.lm_head.requires_grad_(False)
    num_steps, num_rows = facts["ttt_steps"], inputs["input_ids"].numel()
    ids, mask = inputs["input_ids"].flatten(), inputs["loss_mask"].flatten() != 0
    ahead = torch.arange(num_rows) + torch.arange(num_steps)[:, None]
    tokens = ahead.clamp(max=num_rows)
    supervised = (ahead < num_rows) & mask[ahead.clamp(max=num_rows - 1)]
    plan = UnrollPlan(
        context=torch.arange(num_rows),
        rows=torch.arange(num_rows),
        first_tokens=tokens[0],
        tokens=tokens,
        positions=inputs["position_ids"].flatten(),
        layout=packed_layout(_run_lengths(inputs["document_ids"].flatten()), torch.arange(num_rows)),
    )
    embeddings = weights["embed_tokens.weight"][torch.cat((ids, ids.new_zeros(1)))]
    logits = [draft.lm_head(readout) for readout in draft(inputs["hidden_states"][0], embeddings, plan)]
    last = _rms_norm(inputs["verifier_last_hidden_states"][0], weights["verifier_norm.weight"], config.rms_norm_eps)
    teacher = F.linear(last, weights["verifier_lm_head.weight"])
    outcome = _SpeculatorsLoss(facts["loss_fn"], facts["ttt_step_loss_decay"])
    total = outcome.run(logits, teacher, supervised, ahead)
    total.backward()
    alive = inputs["document_ids"].flatten() >= 0
    for k, step in enumerate(logits):
        rows = alive & (plan.tokens[k] < num_rows)
        expected = vector.tensors[f"out.step{k}.logits"].flatten(0, 1)
        result.check(Kind.LOGITS, f"out.step{k}.logits", step[rows], expected[rows])
    _check_losses(vector, result, total, [])
    result.check_recorded(
        facts["metrics"],
        {
            name: (Kind.LOSSES if name.startswith("loss") else Kind.METRICS, value)
            for name, value in outcome.metrics.items()
        },
    )
    check_gradients(vector, result, draft, _product_name)


class _SpeculatorsLoss:
    """Loss and cumulative accuracies of that project, written out on whole logits [T, W]."""

    def __init__(self, loss_fn: str, decay: float) -> None:
        self.terms = loss_terms(loss_fn)
        self.decay = decay
        self.metrics: dict[str, Tensor] = {}

    def run(self, logits: list[Tensor], teacher: Tensor, supervised: Tensor, ahead: Tensor) -> Tensor:
        total = logits[0].new_zeros(())
        correct_so_far = supervised[0]
        for k, step in enumerate(logits):
            mask, target = supervised[k], teacher[ahead[k].clamp(max=teacher.shape[0] - 1)]
            row_losses = sum(weight * POSITION_LOSSES[name](step, target) for name, weight in self.terms.items())
            loss = self.decay**k * (row_losses * mask).sum() / (mask.sum() + 1e-5)
            total = total + loss
            conditional = correct_so_far & (ahead[k] < teacher.shape[0])
            correct_so_far = correct_so_far & mask & (step.argmax(-1) == target.argmax(-1))
            self.metrics |= {
                f"loss_{k}_sum": loss,
                f"loss_{k}_total": torch.ones(()),
                f"full_acc_{k}_sum": correct_so_far.sum(),
                f"full_acc_{k}_total": mask.sum(),
                f"cond_acc_{k}_sum": correct_so_far.sum(),
                f"cond_acc_{k}_total": conditional.sum(),
            }
        self.metrics |= {"loss_sum": total, "loss_total": torch.ones(())}
        return total


# --- shared ----------------------------------------------------------------------------------------------------------


def _config(facts: dict[str, Any], aux_width: int) -> Eagle3DraftConfig:
    return Eagle3DraftConfig(**recorded_sizes(facts, aux_width))


def _draft(config: Eagle3DraftConfig, weights: dict[str, Tensor]) -> Eagle3Draft:
    """The product's draft with the vector's weights. Every weight must have a place, except the target's."""
    state = {
        _product_name(name): value for name, value in weights.items() if not name.startswith(("embed", "verifier"))
    }
    kept = target_ids(state["d2t"]) if "d2t" in state else torch.arange(config.vocab_size)
    draft = Eagle3Draft(config, kept)
    state.setdefault("d2t", draft.d2t)
    state["t2d"] = state["t2d"] != 0 if "t2d" in state else draft.t2d
    draft.load_state_dict(state)
    return draft


def _product_name(name: str) -> str:
    return name.replace("layers.0.", "midlayer.")


def _batch(inputs: dict[str, Tensor], mask: Tensor) -> TrainBatch[Tensor]:
    """Padded samples as documents of S tokens: what follows the valid tokens is causal and never supervised."""
    size, length = inputs["input_ids"].shape
    return TrainBatch(
        input_ids=inputs["input_ids"].flatten(),
        loss_mask=mask.flatten() != 0,
        position_ids=torch.arange(length).repeat(size),
        document_ids=torch.arange(size).repeat_interleave(length),
        features={"aux": inputs["aux_hidden"].flatten(0, 1), "last": inputs["last_hidden"].flatten(0, 1)},
        lengths=(length,) * size,
        sample_ids=tuple(str(i) for i in range(size)),
        slots=tuple(Slot(0, i) for i in range(size)),
    )


def _algorithm(num_steps: int) -> Eagle3:
    return Eagle3(Eagle3Options(ttt_steps=num_steps, step_decay=STEP_DECAY, mask_offset=0))


def _decay(num_steps: int) -> Tensor:
    return torch.tensor([STEP_DECAY**k for k in range(num_steps)])


def _full_plan(case: _Case) -> tuple[UnrollPlan, Supervision, Teacher]:
    """A plan that computes every row, with SpecForge's supervision and the teacher of its rows."""
    supervised = supervised_rows(case.batch, case.num_steps, 0)
    plan, everything = plan_unroll(case.batch, torch.ones_like(supervised))
    supervision = Supervision(supervised, everything.teachers)
    return plan, supervision, make_teacher(case.draft, case.tables, case.batch, supervision)


def _compare_unroll(vector: Vector, result: Comparison, case: _Case) -> list[Tensor]:
    """Logits and pre-norm states of every step at the rows that have a teacher there; returns the logits."""
    plan, _, _ = _full_plan(case)
    outputs: list[Tensor] = []
    hook = case.draft.norm.register_forward_hook(lambda _module, inputs, _output: outputs.append(inputs[0]))
    with torch.no_grad():
        logits = [case.draft.lm_head(x) for x in unroll(case.draft, case.tables, case.batch, plan)]
    hook.remove()
    lengths = vector.tensors["in.attention_mask"].sum(1)
    for k in range(case.num_steps):
        rows = (torch.arange(case.batch.lengths[0]) < (lengths - k)[:, None]).flatten()
        for name, got in ((f"out.step{k}.logits", logits[k]), (f"out.step{k}.hidden_prenorm", outputs[k])):
            if name in vector.tensors:
                result.check(Kind.LOGITS, name, got[rows], vector.tensors[name].flatten(0, 1)[rows])
    return logits


def _check_losses(vector: Vector, result: Comparison, loss: Tensor, steps: list[Tensor]) -> None:
    result.check(Kind.LOSSES, "loss", loss, vector.facts["loss"])
    if "out.loss" in vector.tensors:
        result.check(Kind.LOSSES, "out.loss", loss, vector.tensors["out.loss"])
    if steps:
        _check_list(vector, result, Kind.LOSSES, "plosses", torch.stack(steps))


def _check_list(vector: Vector, result: Comparison, kind: Kind, name: str, got: Tensor) -> None:
    """A list that the vector has in its json, its tensors, or both."""
    if name in vector.facts:
        result.check(kind, name, got, torch.tensor(vector.facts[name], dtype=torch.float64))
    if f"out.{name}" in vector.tensors:
        result.check(kind, f"out.{name}", got, vector.tensors[f"out.{name}"])


def _run_lengths(document_ids: Tensor) -> tuple[int, ...]:
    _, counts = torch.unique_consecutive(document_ids, return_counts=True)
    return tuple(counts.tolist())


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


_PROJECTS: dict[str, Callable[[Vector, Comparison], None]] = {
    "SpecForge": _specforge,
    "TorchSpec": _torchspec,
    "DeepSpec": _deepspec,
    "speculators": _speculators,
}
