"""Distributions that tokens are drawn from, and drawing from them. Drafts and target are processed alike.

Legend: V vocabulary, of the target or of a draft.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specforge.algorithms.base import Sampling

GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the distribution is a point mass on the largest logit."""


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities fp32 [.., V] of the tokens after ``logits`` [.., V], exactly 0 for what is cut off.

    Softmax at ``temperature`` over the ``top_k`` largest logits, of them the smallest set whose probability reaches
    ``top_p``, renormalised. Ties at a border go to the lower id.
    """
    if sampling.temperature < GREEDY_TEMPERATURE:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
    scaled = logits.float() / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return torch.softmax(scaled, dim=-1)
    ordered, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered = ordered[..., : sampling.top_k]
        ids = ids[..., : sampling.top_k]
    kept = torch.softmax(ordered, dim=-1)
    if sampling.top_p is not None:
        before = kept.cumsum(dim=-1) - kept
        kept = kept.masked_fill(before >= sampling.top_p, 0.0)
        kept = kept / kept.sum(dim=-1, keepdim=True)
    return torch.zeros_like(scaled).scatter_(-1, ids, kept)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """An id drawn from ``probabilities`` [V] (which need not sum to 1) with one fp64 number of ``generator``."""
    return pick(probabilities, float(torch.rand((), dtype=torch.float64, generator=generator)))


def pick(probabilities: Tensor, point: float) -> int:
    """The id at ``point`` (0 <= point < 1) of the cumulative sum of ``probabilities`` [V].

    Computed in fp64 on the CPU. An id of probability 0 is at no point.
    """
    cumulative = probabilities.detach().to("cpu", torch.float64).cumsum(dim=0)
    total = float(cumulative[-1])
    if not 0.0 < total < math.inf:
        raise ValueError(f"expected probabilities with a positive finite sum, got a sum of {total}")
    # the product may round up to the total: the last id that has probability is meant then
    below = min(point * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, below, right=True))
