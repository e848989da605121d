"""Learning rates and optimizer steps: the product's ``Schedule`` and ``MasterOptimizer`` against recorded ones.

Where a project counts otherwise, its own convention is rebuilt here out of the product's closed form.
"""

from __future__ import annotations

import math
import re
from typing import Any, cast, get_args

import torch
from torch import nn

from specforge.testing.golden.report import Comparison, Kind, NotBuilt
from specforge.testing.golden.vectors import Vector
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.schedule import DecayShape, Schedule, ScheduleKind

_NAME = re.compile(
    r"(?P<project>[a-z]+)_(?P<kind>[A-Za-z]+?)(_(?P<shape>[a-z_]+))?_total(?P<total>\d+)(_warm(?P<warm>\d+))?"
    r"(_min(?P<min>[\d.e-]+))?(_decay(?P<decay>\d+))?"
)
_KINDS = {"invsqrt": "inverse_sqrt", "WSD": "wsd"}


def run_schedule(vector: Vector, result: Comparison) -> None:
    """Dispatch by what the file records."""
    if "lr" in vector.facts:
        for name, expected in vector.facts["lr"].items():
            got = torch.tensor(_rates(name, float(vector.facts["base_lr"]), len(expected)), dtype=torch.float64)
            # as shares of the peak: the tolerance is meant for rates around 1
            want = torch.tensor(expected, dtype=torch.float64) / float(vector.facts["base_lr"])
            result.check(Kind.RATES, name, got / float(vector.facts["base_lr"]), want)
    elif "hyper" in vector.facts:
        for dtype in ("fp32", "bf16"):
            _run_optimizer(vector, result, dtype)
    else:
        raise NotBuilt(f"no runner for a schedule vector with the keys {', '.join(vector.facts)}")


def _rates(name: str, base: float, count: int) -> list[float]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise NotBuilt(f"the sequence {name!r} is not named PROJECT_KIND_totalT_warmW")
    kind = _KINDS.get(match["kind"], match["kind"])
    shape = match["shape"] or "cosine"
    if kind not in get_args(ScheduleKind) or shape not in get_args(DecayShape):
        raise NotBuilt(f"the product has no schedule {kind!r} with the decay {shape!r}")
    total, warm = int(match["total"]), int(match["warm"] or 0)
    schedule = Schedule(
        cast("ScheduleKind", kind),
        base,
        total,
        warmup_ratio=(warm + 0.5) / total,
        min_lr_ratio=float(match["min"] or 0.0) / base,
        decay_ratio=(int(match["decay"] or 0) + 0.5) / total,
        decay_shape=cast("DecayShape", shape),
    )
    conventions = {"specforge": _specforge_rate, "torchspec": _torchspec_rate}
    if match["project"] not in conventions:
        raise NotBuilt(f"the convention of {match['project']!r} is not known")
    return [conventions[match["project"]](schedule, warm, step) for step in range(count)]


def _specforge_rate(schedule: Schedule, warm: int, step: int) -> float:
    """A chained cosine: the part after the warm-up is scaled by 2 / (1 + cos(pi / (T - w))), and past the end it climbs
    again, unscaled.
    """
    if schedule.kind != "cosine" or step < warm:
        return schedule.lr_at(step)
    if step > schedule.total_steps:
        return schedule.lr_at(max(warm, 2 * schedule.total_steps - step))
    scale = 2.0 / (1.0 + math.cos(math.pi / max(2, schedule.total_steps - warm)))
    return scale * schedule.lr_at(step)


def _torchspec_rate(schedule: Schedule, warm: int, step: int) -> float:
    """The warm-up starts at zero and reaches the peak a step later; the inverse square root ends with the steps."""
    if warm and step == 0:
        return 0.0
    if schedule.kind == "inverse_sqrt" and step > schedule.total_steps:
        return schedule.lr * schedule.min_lr_ratio
    return schedule.lr_at(step - 1 if step <= warm else step)


def _run_optimizer(vector: Vector, result: Comparison, dtype: str) -> None:
    """Recorded gradients through the product's optimizer; ``dtype`` is that of the model's parameters."""
    hyper: dict[str, Any] = vector.facts["hyper"]
    recorded = vector.group(dtype)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    parameters = {name: nn.Parameter(recorded[f"{name}0"].to(kind)) for name in ("a", "b")}
    settings = OptimizerSettings(
        betas=(hyper["betas"][0], hyper["betas"][1]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        max_grad_norm=hyper["max_grad_norm"],
    )
    optimizer = MasterOptimizer(parameters, settings)
    schedule = Schedule("cosine", hyper["lr"], hyper["total_steps"], hyper["warmup_ratio"])
    norms, rates = vector.facts[dtype]["grad_norm"], vector.facts[dtype]["lr_used"]
    for step, (norm, rate) in enumerate(zip(norms, rates, strict=True)):
        for name, parameter in parameters.items():
            parameter.grad = recorded[f"g{name}{step}"].to(kind)
        result.check(Kind.RATES, f"{dtype}.lr{step}", schedule.lr_at(step), rate)
        result.check(Kind.LOSSES, f"{dtype}.grad_norm{step}", optimizer.step(schedule.lr_at(step)), norm)
        masters = optimizer.state_tensors()
        for name, parameter in parameters.items():
            after = f"{name}{step + 1}"
            master, expected = masters[f"master.{name}"], recorded[f"master_{after}"]
            result.check(Kind.GRADIENTS, f"{dtype}.master_{after}", master, expected)
            # a rounded copy is equal or a whole bfloat16 apart
            exact = Kind.METRICS if dtype == "bf16" else Kind.GRADIENTS
            result.check(exact, f"{dtype}.{after}", parameter.float(), recorded[after])
