"""Comparisons with their tolerances, collected per vector and printed as one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


class Kind(Enum):
    """Class of a compared value: (name, absolute tolerance, relative tolerance)."""

    LOGITS = ("logits", 1e-4, 0.0)
    LOSSES = ("losses", 0.0, 1e-6)
    GRADIENTS = ("gradients", 1e-5, 1e-5)
    METRICS = ("metrics", 0.0, 0.0)
    RATES = ("rates", 1e-5, 0.0)

    @property
    def title(self) -> str:
        return self.value[0]

    def excess(self, got: Tensor, expected: Tensor) -> float:
        """Largest error divided by what is allowed there; over 1 is over the tolerance, NaN counts as infinite."""
        error = (got - expected).abs()
        allowed = self.value[1] + self.value[2] * expected.abs()
        ratio = torch.where(error == 0, torch.zeros_like(error), error / allowed)
        return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if ratio.numel() else 0.0


Metrics = dict[str, tuple[Kind, Tensor | float]]
"""Computed values by the name of the vector's, with their class."""


class Status(Enum):
    PASSED = "passed"
    OVER = "over"
    FAILED = "could not run"
    NOT_BUILT = "not built"
    NO_INPUTS = "no inputs"


class NotBuilt(Exception):
    """The product does not have yet what this vector needs."""


class InputsAbsent(Exception):
    """The vector records results alone, and the file with its inputs and weights is not beside it."""


@dataclass(slots=True)
class Comparison:
    """What was compared for one vector."""

    name: str
    errors: dict[Kind, float] = field(default_factory=dict)
    over: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    status: Status = Status.PASSED
    note: str = ""

    def check(self, kind: Kind, name: str, got: Tensor | float, expected: Tensor | float) -> None:
        """Compare in fp64. ``name`` is the vector's own key and goes into the message when it is over."""
        mine, theirs = _double(got), _double(expected)
        self.names.add(name)
        if mine.shape != theirs.shape:
            self.over.append(f"{name}: shape {list(mine.shape)} instead of {list(theirs.shape)}")
            return
        error = float((mine - theirs).abs().max()) if mine.numel() else 0.0
        self.errors[kind] = max(self.errors.get(kind, 0.0), error)
        if (excess := kind.excess(mine, theirs)) > 1.0:
            self.over.append(f"{name} is {excess:.3g} x the tolerance")

    def check_recorded(self, recorded: dict[str, Any], computed: Metrics, prefix: str = "") -> None:
        """Compare everything that is ``recorded``; what has no ``computed`` counterpart is over."""
        for name, expected in recorded.items():
            if name not in computed:
                self.over.append(f"{prefix}{name} has no counterpart")
                continue
            kind, got = computed[name]
            self.check(kind, f"{prefix}{name}", got, torch.tensor(expected, dtype=torch.float64))

    def finish(self, expected_names: set[str]) -> Comparison:
        """Decide the status. A result of the vector that nobody compared is a failure."""
        if missing := sorted(expected_names - self.names):
            self.status, self.note = Status.FAILED, f"not compared: {', '.join(missing)}"
        if self.over:
            self.status, self.note = Status.OVER, "; ".join(self.over[:4])
        return self


def _double(value: Tensor | float) -> Tensor:
    return value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def print_table(console: Console, results: list[Comparison]) -> None:
    """One line a vector with the largest absolute error of each class."""
    table = Table()
    for title in ("vector", "result", *(kind.title for kind in Kind)):
        table.add_column(title, no_wrap=True)
    table.add_column("note")
    for result in results:
        errors = (f"{result.errors[kind]:.1e}" if kind in result.errors else "" for kind in Kind)
        table.add_row(result.name, result.status.value, *errors, result.note)
    console.print(table)
