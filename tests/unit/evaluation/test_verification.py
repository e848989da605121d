"""The rules of acceptance, by their own formulas and by drawing."""

import pytest
import torch
from torch import Tensor

from specforge.algorithms.base import Proposal
from specforge.algorithms.parts.sampling import draw
from specforge.evaluation.verification import (
    acceptance,
    expected_committed,
    residual,
    sibling_chances,
    verify_drawn,
    verify_greedy,
    verify_point_masses,
    verify_sampled,
)


def distributions(rows: int, seed: int, vocab_size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(1.5 * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64), dim=-1)


def test_acceptance_and_residual_make_up_the_target():
    """Oracle 46. min(p, q) + (rejected mass) x residual = p, exactly."""
    p, q = distributions(40, 0), distributions(40, 1)
    accepted = q * acceptance(p, q)
    rejected = 1 - accepted.sum(-1, keepdim=True)
    torch.testing.assert_close(accepted + rejected * residual(p, q), p, rtol=0, atol=1e-15)


def test_siblings_and_their_residual_make_up_the_target():
    p = distributions(1, 3)[0]
    tokens = [4, 0, 3]
    chances, rest = sibling_chances(p, tokens)
    marginal, reached = torch.zeros_like(p), 1.0
    for token, chance in zip(tokens, chances, strict=True):
        marginal[token] = reached * chance
        reached *= 1 - chance
    torch.testing.assert_close(marginal + reached * rest, p, rtol=0, atol=1e-15)
    assert not rest[tokens].any()


def test_siblings_that_hold_everything_leave_nothing_to_chance():
    p = torch.tensor([0.3, 0.0, 0.7], dtype=torch.float32)
    chances, rest = sibling_chances(p, [0, 2])
    assert chances[1] == 1.0
    assert not rest.any()
    assert sibling_chances(p, [1])[0] == [0.0]


def test_nothing_left_after_a_rejection_falls_back_to_the_target():
    p = distributions(1, 5)[0]
    assert torch.equal(residual(p, p), p)
    assert torch.equal(residual(p, p + 1e-12), p)


def test_draft_equal_to_the_target_is_always_accepted():
    p = distributions(3, 7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert verify_drawn([2, 5], p, p[:2], generator).accepted == (0, 1)


def test_token_that_the_target_rules_out_is_never_accepted():
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    q = torch.tensor([[0.5, 0.5]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        assert verify_drawn([0], p, q, generator) == verify_point_masses(Proposal((0,)), p, generator)
        assert verify_drawn([0], p, q, generator).extra == 1


def test_mean_of_committed_tokens_follows_the_formula():
    """Oracle 46. 1 + sum over i of the product of the first i acceptances, for a draft that ignores its own tokens."""
    p, q = distributions(4, 11), distributions(3, 12)
    alphas = torch.minimum(p[:3], q).sum(-1).tolist()
    generator = torch.Generator().manual_seed(2)
    committed = [
        len(verify_drawn([draw(row, generator) for row in q], p, q, generator).accepted) + 1 for _ in range(4000)
    ]
    mean, error = sum(committed) / 4000, torch.tensor(committed).double().std() / 4000**0.5
    assert abs(mean - expected_committed(alphas)) < 4 * error
    assert expected_committed([0.5, 0.5, 0.0]) == 1.75


def test_sampled_verdict_picks_the_rule_by_how_proposals_were_made():
    p, q = distributions(2, 13), distributions(1, 14)
    draws = [torch.Generator().manual_seed(4) for _ in range(4)]
    assert verify_sampled(Proposal((3,), q), p, draws[0]) == verify_drawn((3,), p, q, draws[1])
    assert verify_sampled(Proposal((3,)), p, draws[2]) == verify_point_masses(Proposal((3,)), p, draws[3])


def test_greedy_verdict_of_a_chain_stops_at_the_first_difference():
    assert verify_greedy(Proposal((4, 5, 6)), [4, 5, 6, 7]).accepted == (0, 1, 2)
    assert verify_greedy(Proposal((4, 5, 6)), [4, 9, 6, 7]).accepted == (0,)
    assert verify_greedy(Proposal((4, 5, 6)), [4, 9, 6, 7]).extra == 9
    assert verify_greedy(Proposal(()), [3]).extra == 3


@pytest.mark.parametrize(
    ("choices", "accepted", "extra"),
    [([7, 0, 0, 0, 0], (), 7), ([4, 9, 0, 0, 0], (0,), 9), ([5, 0, 6, 0, 8], (1, 3), 8), ([5, 0, 9, 0, 8], (1,), 9)],
)
def test_greedy_verdict_of_a_tree_is_the_path_that_the_target_takes(
    choices: list[int], accepted: tuple[int, ...], extra: int
):
    tree = Proposal((4, 5, 4, 6), parents=(-1, -1, 0, 1))
    verdict = verify_greedy(tree, choices)
    assert (verdict.accepted, verdict.extra) == (accepted, extra)


def test_sampled_tree_gives_the_joint_distribution_of_the_target():
    """Oracle 46. Two tokens after a tree, over all four ways to leave it."""
    tree = Proposal((2, 0, 1, 2), parents=(-1, -1, 0, 0))
    p = distributions(5, 17, vocab_size=3)
    after = {(): p[0], (2,): p[1], (0,): p[2], (2, 1): p[3], (2, 2): p[4]}
    generator = torch.Generator().manual_seed(9)
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(6000):
        verdict = verify_sampled(tree, p, generator)
        tokens = [*(tree.tokens[index] for index in verdict.accepted), verdict.extra]
        if len(tokens) == 1:  # token 1: it is in no branch, so any distribution may follow it
            tokens.append(draw(p[0], generator))
        counts[tokens[0], tokens[1]] += 1
    follows = torch.stack([after.get((first,), p[0]) for first in range(3)])
    expected = p[0][:, None] * follows
    deviation = (counts / 6000 - expected) / (expected * (1 - expected) / 6000).sqrt()
    assert deviation.abs().max() < 4.0
