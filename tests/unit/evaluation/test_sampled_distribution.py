"""Sampled speculative decoding follows the target's distribution, whatever drafts: a chi-square test on 8 tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Sampling, TreeShape
from specforge.algorithms.catalog import algorithm_names
from specforge.evaluation import speculative, verification
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.evaluation.verification import Verdict
from specforge.inference.huggingface import HFTargetEngine
from specforge.testing.drafting import Drafting, make_drafting
from specforge.testing.sampled_decoding import (
    RememberingEngine,
    RememberingProposer,
    chi_square_p,
    exact_distribution,
    sampled_counts,
)

PROMPT = (3, 1, 6)
LENGTH = 3
NUM_NEW = LENGTH + 1
"""One more than is looked at, so that the first round is a full one."""
NUM_PROPOSALS = 2
NUM_RUNS = 10_000
SEEDS = range(10)
TREE = TreeShape(top_k=2, depth=1, num_nodes=6)

ACCEPTED, REJECTED = 1e-4, 1e-6
"""Bounds of the p-value for what follows the target, and for what does not."""


@dataclass
class Lab:
    """Decoders share what the target and the draft computed; only the randomness differs."""

    engine: RememberingEngine
    proposer: RememberingProposer
    drafting: Drafting

    def p_value(self, seed: int, num_runs: int, tree: TreeShape | None = None, **cuts: float) -> float:
        sampling = Sampling(0.8, torch.Generator().manual_seed(seed), **cuts)
        decoder = SpeculativeDecoder(
            self.engine, self.proposer, self.drafting.spec, NUM_PROPOSALS, sampling=sampling, tree=tree
        )
        counts = sampled_counts(decoder, PROMPT, (8,) * LENGTH, num_runs, NUM_NEW)
        return chi_square_p(counts, exact_distribution(self.engine, PROMPT, LENGTH, sampling))


@pytest.fixture(scope="module")
def target(make_target: Callable[[int], HFTargetEngine]) -> HFTargetEngine:
    return make_target(8)


@pytest.fixture(scope="module")
def lab(target: HFTargetEngine) -> Callable[[str], Lab]:
    """The target and a draft of a case; what they have computed is remembered from test to test."""
    engine, made = RememberingEngine(target), {}

    def make(case: str) -> Lab:
        if case not in made:
            drafting = make_drafting(target, case)
            made[case] = Lab(engine, RememberingProposer(drafting.proposer), drafting)
        return made[case]

    return make


@pytest.mark.parametrize("case", algorithm_names())
def test_sampled_chains_follow_the_target(lab: Callable[[str], Lab], case: str):
    """Oracle 46. A few runs of every draft; the full test has 100,000."""
    assert lab(case).p_value(seed=0, num_runs=1000) > ACCEPTED


@pytest.mark.parametrize("case", ["eagle3", "medusa"])
def test_sampled_trees_follow_the_target(lab: Callable[[str], Lab], case: str):
    assert lab(case).p_value(seed=0, num_runs=1000, tree=TREE) > ACCEPTED


@pytest.mark.parametrize("cuts", [{"top_k": 3}, {"top_p": 0.7}], ids=["top_k", "top_p"])
def test_cut_distributions_are_followed_too(lab: Callable[[str], Lab], cuts: dict[str, float]):
    assert lab("eagle3").p_value(seed=0, num_runs=1000, **cuts) > ACCEPTED


@pytest.mark.full
@pytest.mark.parametrize("case", algorithm_names())
def test_100_000_sampled_chains_follow_the_target(lab: Callable[[str], Lab], case: str):
    assert min(lab(case).p_value(seed, NUM_RUNS) for seed in SEEDS) > ACCEPTED


@pytest.mark.full
@pytest.mark.parametrize("case", ["eagle3", "medusa"])
def test_100_000_sampled_trees_follow_the_target(lab: Callable[[str], Lab], case: str):
    assert min(lab(case).p_value(seed, NUM_RUNS, tree=TREE) for seed in SEEDS) > ACCEPTED


@pytest.mark.full
def test_wrong_verifier_is_found_out_by_every_seed(lab: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verification, "residual", lambda p, _q: p)
    assert max(lab("eagle3").p_value(seed, NUM_RUNS) for seed in SEEDS) < REJECTED


def test_residual_that_forgets_the_draft_is_found_out(lab: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch):
    """After a rejection the target's own distribution, instead of what the draft left of it."""
    monkeypatch.setattr(verification, "residual", lambda p, _q: p)
    assert lab("eagle3").p_value(seed=0, num_runs=2500) < REJECTED


def test_verifier_that_accepts_everything_is_found_out(lab: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verification, "_uniform", lambda _generator: 0.0)
    assert lab("eagle3").p_value(seed=0, num_runs=2500) < REJECTED


def test_siblings_tested_on_the_whole_distribution_are_found_out(
    lab: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch
):
    def chances(p: Tensor, tokens: list[int]) -> tuple[list[float], Tensor]:
        return [float(p[token]) for token in tokens], p.double()

    monkeypatch.setattr(verification, "sibling_chances", chances)
    assert lab("eagle3").p_value(seed=0, num_runs=2500, tree=TREE) < REJECTED


def test_greedy_proposals_tested_by_the_drafts_probabilities_are_found_out(
    lab: Callable[[str], Lab], monkeypatch: pytest.MonkeyPatch
):
    """Proposals that were not drawn, verified as if they had been."""

    def verify(proposal: Proposal, target: Tensor, generator: torch.Generator) -> Verdict:
        soft = torch.full_like(target[: len(proposal.tokens)], 1 / 8)
        return verification.verify_drawn(proposal.tokens, target, soft, generator)

    monkeypatch.setattr(speculative, "verify_sampled", verify)
    one = lab("eagle3")
    monkeypatch.setattr(one.proposer, "propose", _best_token(one.proposer.propose))
    assert one.p_value(seed=0, num_runs=2500) < REJECTED


def _best_token(propose: Callable[..., Proposal]) -> Callable[..., Proposal]:
    def best(tokens: list[int], features: dict[str, Tensor], request: DraftRequest) -> Proposal:
        return propose(tokens, features, DraftRequest(request.num_proposals))

    return best


@pytest.mark.parametrize("case", algorithm_names())
def test_remembered_proposals_are_those_that_the_draft_makes(target: HFTargetEngine, case: str):
    drafting = make_drafting(target, case)
    remembering = RememberingProposer(make_drafting(target, case).proposer)
    decoders = []
    for proposer, engine in ((drafting.proposer, target), (remembering, RememberingEngine(target))):
        sampling = Sampling(1.0, torch.Generator().manual_seed(3))
        decoders.append(SpeculativeDecoder(engine, proposer, drafting.spec, NUM_PROPOSALS, sampling=sampling))
    for _ in range(25):
        plain, remembered = (decoder.speculative(PROMPT, 5) for decoder in decoders)
        assert plain.rounds == remembered.rounds
    assert remembering.num_computed < 60


def test_chi_square_tail_is_that_of_the_tables():
    """20 degrees of freedom: 31.41 at 5 %, 45.31 at 0.1 %."""
    expected = torch.full((21,), 1 / 21, dtype=torch.float64)
    for statistic, p in ((31.410, 0.05), (45.315, 0.001)):
        counts = torch.full((21,), 1000.0, dtype=torch.float64)
        shift = (statistic * 1000 / 2) ** 0.5
        counts[0] += shift
        counts[1] -= shift
        assert chi_square_p(counts, expected) == pytest.approx(p, rel=1e-3)


def test_outcome_without_probability_is_fatal():
    assert chi_square_p(torch.tensor([50, 50, 1]), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)) == 0.0
