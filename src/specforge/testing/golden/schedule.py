"""Learning rates and optimizer steps: the product's ``Schedule`` and ``MasterOptimizer`` against recorded ones.

Where a project counts otherwise, its own convention is rebuilt here out of the product's closed form.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import nn

from specforge.testing.golden.report import Comparison, Kind, NotBuilt
from specforge.testing.golden.vectors import Vector
from specforge.training.optimizer import MasterOptimizer, OptimizerSettings
from specforge.training.schedule import DecayShape, Schedule, ScheduleKind

_NUMBER = re.compile(r"(total|warm|min|decay)([\d.]+(?:e-?\d+)?)")
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
    project, kind, shape, numbers = _parse(name)
    total, warm = int(numbers["total"]), int(numbers.get("warm", 0))
    schedule = Schedule(
        cast("ScheduleKind", kind),
        base,
        total,
        warmup_ratio=(warm + 0.5) / total,
        min_lr_ratio=numbers.get("min", 0.0) / base,
        decay_ratio=(int(numbers.get("decay", 0)) + 0.5) / total,
        decay_shape=cast("DecayShape", shape),
    )
    conventions = {"specforge": _specforge_rate, "torchspec": _torchspec_rate}
    if project not in conventions:
        raise NotBuilt(f"the convention of {project!r} is not known")
    return [conventions[project](schedule, warm, step) for step in range(count)]


def _parse(name: str) -> tuple[str, str, str, dict[str, float]]:
    """(project, kind, shape of the decay, numbers) of ``PROJECT_KIND[_SHAPE]_totalT[_warmW][_minM][_decayD]``, the
    numbers in any order.
    """
    parts = name.split("_")
    found = [match for part in parts if (match := _NUMBER.fullmatch(part))]
    numbers = {match[1]: float(match[2]) for match in found}
    project, *words = parts[: len(parts) - len(found)]
    if "total" not in numbers or not words:
        raise NotBuilt(f"the sequence {name!r} is not named PROJECT_KIND_totalT_warmW")
    # a kind may have an underscore itself
    kind, shape = (
        ("_".join(words), "") if "_".join(words) in get_args(ScheduleKind) else (words[0], "_".join(words[1:]))
    )
    kind, shape = _KINDS.get(kind, kind), shape or "cosine"
    if kind not in get_args(ScheduleKind) or shape not in get_args(DecayShape):
        raise NotBuilt(f"the product has no schedule {kind!r} with the decay {shape!r}")
    return project, kind, shape, numbers


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
    """The warm-up starts at zero and reaches the peak a step later; the inverse square root is cut at the minimum and
    ends with the steps.
    """
    if schedule.kind == "inverse_sqrt":
        minimum, schedule = schedule.lr * schedule.min_lr_ratio, replace(schedule, min_lr_ratio=0.0)
        if step > schedule.total_steps:
            return minimum
        return max(minimum if step > warm else 0.0, _after_zero(schedule, warm, step))
    return _after_zero(schedule, warm, step)


def _after_zero(schedule: Schedule, warm: int, step: int) -> float:
    if warm == 0:
        return schedule.lr_at(step)
    if step == 0:
        return 0.0
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
