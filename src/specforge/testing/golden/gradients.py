"""Gradients of a draft against those of a vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from specforge.testing.golden.report import Comparison, Kind
from specforge.testing.golden.vectors import Vector


def check_gradients(
    vector: Vector, result: Comparison, draft: nn.Module, product_name: Callable[[str], str] = str
) -> None:
    """Every gradient of the vector (ours is zero where there is none), none of ours beyond them, and the norms.

    ``product_name``: the product's name of a parameter of the vector.
    """
    mine = {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}
    expected = {product_name(name): (name, gradient) for name, gradient in vector.group("grad").items()}
    for name, (theirs, gradient) in expected.items():
        result.check(Kind.GRADIENTS, f"grad.{theirs}", mine.get(name, torch.zeros_like(gradient)), gradient)
    norms = {name: gradient.norm() for name, gradient in mine.items()}
    recorded = {product_name(name): norm for name, norm in vector.facts.get("grad_norms", {}).items()}
    for name, value in recorded.items():
        result.check(Kind.GRADIENTS, f"grad_norms.{name}", norms.get(name, torch.zeros(())), value)
    if expected or recorded:
        left = sorted(name for name in norms if name not in {*expected, *recorded} and bool(norms[name] != 0))
        result.over += [f"{name} has a gradient that the vector has not" for name in left]
    if "grad_norm" in vector.facts:
        norm = torch.stack(list(norms.values())).norm()
        result.check(Kind.GRADIENTS, "grad_norm", norm, vector.facts["grad_norm"])
