"""Sums of an optimizer step or of an evaluation, divided once at the end. Ratios are never averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specforge.algorithms.base import StepOutput
from specforge.errors import ContractError


@dataclass(slots=True)
class StepSums:
    """Adds up the outputs of the micro-batches of one optimizer step, or of one pass over evaluation samples.

    Sums are fp64, and travel between ranks as :meth:`values`: as many from an empty micro-batch as from any other,
    because it has every position and metric too.
    """

    loss_sum: float = 0.0
    correct: list[float] = field(default_factory=list)
    count: list[float] = field(default_factory=list)
    run_length: tuple[float, float] = (0.0, 0.0)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, output: StepOutput) -> None:
        self.merge(
            StepSums(
                float(output.loss_sum.detach()),
                _floats(output.correct),
                _floats(output.count),
                _pair(output.runs.sums()),
                {name: _pair(pair) for name, pair in output.metrics.items()},
            )
        )

    def values(self) -> list[float]:
        """All sums in a row: loss, rows and runs, positions, metrics by name."""
        pairs = [self.run_length, *(self.metrics[name] for name in sorted(self.metrics))]
        return [self.loss_sum, *(value for pair in pairs for value in pair), *self.correct, *self.count]

    def with_values(self, values: Sequence[float]) -> StepSums:
        """Sums of the same positions and metrics as these, with what :meth:`values` gave on another rank."""
        names, num_positions = sorted(self.metrics), len(self.count)
        expected = 3 + 2 * len(names) + 2 * num_positions
        if len(values) != expected:
            raise ContractError(
                f"expected {expected} sums of {num_positions} positions and the metrics {names}, got {len(values)}: "
                "every rank must run the same algorithm with the same options"
            )
        loss_sum, *rest = values
        pairs = list(zip(rest[0 : 2 + 2 * len(names) : 2], rest[1 : 2 + 2 * len(names) : 2], strict=True))
        positions = rest[2 + 2 * len(names) :]
        return StepSums(
            loss_sum,
            positions[:num_positions],
            positions[num_positions:],
            pairs[0],
            dict(zip(names, pairs[1:], strict=True)),
        )

    def merge(self, other: StepSums) -> None:
        """Add the sums of ``other``. The order of calls decides the last bits of the loss."""
        self.loss_sum += other.loss_sum
        self.correct = _sum(self.correct, other.correct)
        self.count = _sum(self.count, other.count)
        self.run_length = (self.run_length[0] + other.run_length[0], self.run_length[1] + other.run_length[1])
        for name, (value, count) in other.metrics.items():
            mine = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (mine[0] + value, mine[1] + count)

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


def _sum(sums: list[float], values: list[float]) -> list[float]:
    return list(values) if not sums else [a + b for a, b in zip(sums, values, strict=True)]


def _floats(values: torch.Tensor) -> list[float]:
    return [float(value) for value in values.detach().tolist()]


def _pair(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    return float(pair[0].detach()), float(pair[1].detach())
