"""Sums of an optimizer step, divided once at the end. Ratios are never averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from specforge.algorithms.base import StepOutput


@dataclass(slots=True)
class StepSums:
    """Adds up the outputs of the micro-batches of one optimizer step."""

    loss_sum: float = 0.0
    correct: list[float] = field(default_factory=list)
    count: list[float] = field(default_factory=list)
    run_length: tuple[float, float] = (0.0, 0.0)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, output: StepOutput) -> None:
        self.loss_sum += float(output.loss_sum.detach())
        self.correct = _add(self.correct, output.correct)
        self.count = _add(self.count, output.count)
        self.run_length = _add_pair(self.run_length, output.runs.sums())
        for name, pair in output.metrics.items():
            self.metrics[name] = _add_pair(self.metrics.get(name, (0.0, 0.0)), pair)

    def scalars(self, weight: float) -> dict[str, float]:
        """``loss``, ``accuracy_i``, ``simulated_acc_len``, ``product_acc_len`` and the algorithm's own metrics.

        ``weight``: what the loss of the whole step is divided by.
        """
        accuracies = [c / n if n else 0.0 for c, n in zip(self.correct, self.count, strict=True)]
        total, rows = self.run_length
        scalars = {
            "loss": self.loss_sum / (weight or 1.0),
            "simulated_acc_len": total / rows if rows else 1.0,
            "product_acc_len": 1.0 + sum(math.prod(accuracies[: i + 1]) for i in range(len(accuracies))),
        }
        scalars |= {f"accuracy_{i}": accuracy for i, accuracy in enumerate(accuracies)}
        scalars |= {name: value / count if count else 0.0 for name, (value, count) in self.metrics.items()}
        return scalars


def _add(sums: list[float], values: torch.Tensor) -> list[float]:
    new = [float(value) for value in values.detach().tolist()]
    return new if not sums else [a + b for a, b in zip(sums, new, strict=True)]


def _add_pair(sums: tuple[float, float], pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    return sums[0] + float(pair[0].detach()), sums[1] + float(pair[1].detach())
