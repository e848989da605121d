"""Which proposals the target accepts, so that the output is distributed as the target's own. Pure functions in fp64.

Chains that were drawn: speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv
2302.01318). Proposals that were not drawn (greedy chains, trees) are point masses: the children of a token are tested
one after the other on what is left of the target's distribution (SpecInfer's rule, arXiv 2305.09781, for such drafts).

Legend: l proposals, V target vocabulary. Row 0 of the target's outputs is after the last committed token, row i + 1
after proposal i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.base import Proposal
from specforge.algorithms.parts.sampling import draw

MIN_RESIDUAL_MASS = 1e-8
"""With less left after a rejection the target's own distribution is drawn from: the two are equal up to rounding."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """``accepted``: indices into the proposal, in order (a path in a tree); ``extra``: the target's own next token."""

    accepted: tuple[int, ...]
    extra: int


def verify_greedy(proposal: Proposal, choices: Sequence[int]) -> Verdict:
    """The longest path of proposals that the target would choose. ``choices`` [l + 1] are its greedy tokens."""
    children, node = _children(proposal), -1
    accepted: list[int] = []
    while (match := _child_with(proposal, children[node + 1], choices[node + 1])) is not None:
        accepted.append(node := match)
    return Verdict(tuple(accepted), choices[node + 1])


def verify_sampled(proposal: Proposal, target: Tensor, generator: torch.Generator) -> Verdict:
    """``target`` [l + 1, V]: the target's distributions. Every output token is distributed as they say."""
    if proposal.probabilities is None:
        return verify_point_masses(proposal, target, generator)
    return verify_drawn(proposal.tokens, target, proposal.probabilities, generator)


def verify_drawn(tokens: Sequence[int], target: Tensor, draft: Tensor, generator: torch.Generator) -> Verdict:
    """A chain whose ``tokens`` were drawn from ``draft`` [l, V]."""
    targets, drafts = _normalised(target), _normalised(draft)
    for index, token in enumerate(tokens):
        p, q = targets[index], drafts[index]
        # a token of probability q is accepted with probability min(1, p / q)
        if _uniform(generator) * float(q[token]) >= float(p[token]):
            return Verdict(tuple(range(index)), draw(residual(p, q), generator))
    return Verdict(tuple(range(len(tokens))), draw(targets[len(tokens)], generator))


def verify_point_masses(proposal: Proposal, target: Tensor, generator: torch.Generator) -> Verdict:
    """A chain or a tree of proposals that were not drawn."""
    children, node = _children(proposal), -1
    accepted: list[int] = []
    while True:
        siblings = children[node + 1]
        chances, rest = sibling_chances(target[node + 1], [proposal.tokens[child] for child in siblings])
        taken = next((i for i, chance in enumerate(chances) if _uniform(generator) < chance), None)
        if taken is None:
            return Verdict(tuple(accepted), draw(rest, generator))
        accepted.append(node := siblings[taken])


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q) [.., V], the probability that a token drawn from ``q`` is accepted; 1 where only q is 0."""
    return torch.where(p >= q, (p > 0).to(p.dtype), p / q.clamp(min=torch.finfo(q.dtype).tiny))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q) normalised [.., V]: what is drawn from after a rejection; ``p`` where nothing is left."""
    left = (p - q).clamp(min=0)
    mass = left.sum(dim=-1, keepdim=True)
    return torch.where(mass < MIN_RESIDUAL_MASS, p, left / mass.clamp(min=MIN_RESIDUAL_MASS))


def sibling_chances(p: Tensor, tokens: Sequence[int]) -> tuple[list[float], Tensor]:
    """Point masses tested in order on the target's distribution ``p`` [V]; ``tokens`` are distinct.

    The probability that each is accepted when those before it were not, and the distribution fp64 [V] of the token
    that takes their place when none is (zero where they hold all of ``p``: one of them is accepted then).
    """
    left = p.double().clone()
    chances = []
    for token in tokens:
        mass = float(left.sum())
        chances.append(float(left[token]) / mass if mass > 0 else 0.0)
        left[token] = 0.0
    return chances, left / left.sum().clamp(min=torch.finfo(left.dtype).tiny)


def expected_committed(acceptances: Sequence[float]) -> float:
    """Expected tokens of a round whose proposal i is accepted with probability ``acceptances[i]`` if it is reached."""
    reached, expected = 1.0, 1.0
    for chance in acceptances:
        reached *= chance
        expected += reached
    return expected


def _children(proposal: Proposal) -> list[list[int]]:
    """Indices of the proposals that follow each row, in order."""
    parents = range(-1, len(proposal.tokens) - 1) if proposal.parents is None else proposal.parents
    children: list[list[int]] = [[] for _ in range(len(proposal.tokens) + 1)]
    for index, parent in enumerate(parents):
        children[parent + 1].append(index)
    return children


def _child_with(proposal: Proposal, siblings: Sequence[int], token: int) -> int | None:
    return next((child for child in siblings if proposal.tokens[child] == token), None)


def _normalised(probabilities: Tensor) -> Tensor:
    wide = probabilities.double()
    return wide / wide.sum(dim=-1, keepdim=True)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))
