"""Golden vectors of verification: acceptance, residuals and expected length of chains, and the rule of siblings.

Legend: l proposals, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import Sampling
from specforge.algorithms.parts.sampling import distribution
from specforge.evaluation.verification import acceptance, expected_committed, residual, sibling_chances
from specforge.testing.golden.report import Comparison, Kind
from specforge.testing.golden.vectors import Vector


def run_verify(vector: Vector, result: Comparison) -> None:
    facts = vector.facts
    target, draft = torch.tensor(facts["target_logits"]), torch.tensor(facts["draft_logits"])
    for place, chain in enumerate(facts["chain"]):
        _run_chain(f"chain[{place}]", chain, (target, draft), result)
    for place, siblings in enumerate(facts["siblings"]):
        _run_siblings(f"siblings[{place}]", siblings, result)
    if "monte_carlo" in facts:
        _check_monte_carlo(facts, result)


def _run_chain(name: str, chain: dict[str, Any], logits: tuple[Tensor, Tensor], result: Comparison) -> None:
    sampling = Sampling(chain["temperature"], torch.Generator())
    target, draft = (distribution(part, sampling) for part in logits)
    _rates(result, f"{name}.p", target, chain["p"])
    _rates(result, f"{name}.q", draft, chain["q"])
    p, q = target[: len(draft)].double(), draft.double()
    alphas = (q * acceptance(p, q)).sum(-1)
    _rates(result, f"{name}.accept_prob_by_token", acceptance(p, q), chain["accept_prob_by_token"])
    _rates(result, f"{name}.residual", residual(p, q), chain["residual"])
    _rates(result, f"{name}.alpha", alphas, chain["alpha"])
    _rates(result, f"{name}.expected_committed", expected_committed(alphas.tolist()), chain["expected_committed"])


def _run_siblings(name: str, facts: dict[str, Any], result: Comparison) -> None:
    p = torch.tensor(facts["p"], dtype=torch.float64)
    chances, rest = sibling_chances(p, facts["candidates"])
    marginal, reached = torch.zeros_like(p), 1.0
    for token, chance in zip(facts["candidates"], chances, strict=True):
        marginal[token] = reached * chance
        reached *= 1.0 - chance
    marginal += reached * rest
    _rates(result, f"{name}.conditional_accept_prob", torch.tensor(chances), facts["conditional_accept_prob"])
    _rates(result, f"{name}.final_residual", rest, facts["final_residual"])
    _rates(result, f"{name}.prob_none_accepted", reached, facts["prob_none_accepted"])
    _rates(result, f"{name}.marginal", marginal, facts["marginal"])
    equal = torch.allclose(marginal, p / p.sum(), rtol=0.0, atol=1e-9)
    result.check(Kind.METRICS, f"{name}.marginal_equals_p", float(equal), float(facts["marginal_equals_p"]))


def _check_monte_carlo(facts: dict[str, Any], result: Comparison) -> None:
    """The recorded mean of N drawn rounds is within four standard errors of the formula."""
    drawn, chain = facts["monte_carlo"], facts["chain"][0]
    probabilities = [1.0, *torch.tensor(chain["alpha"], dtype=torch.float64).cumprod(0).tolist(), 0.0]
    mean = expected_committed(chain["alpha"])
    shares = [before - after for before, after in itertools.pairwise(probabilities)]
    variance = sum(share * (count - mean) ** 2 for count, share in enumerate(shares, start=1))
    deviation = abs(drawn["mean_committed"] - mean) / (variance / drawn["N"]) ** 0.5
    result.check(Kind.METRICS, "monte_carlo.mean_committed", float(deviation < 4.0), 1.0)


def _rates(result: Comparison, name: str, got: Tensor | float, expected: Any) -> None:
    result.check(Kind.RATES, name, got, torch.tensor(expected, dtype=torch.float64))
