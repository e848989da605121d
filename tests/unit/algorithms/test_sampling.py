"""Distributions that tokens are drawn from."""

import math

import pytest
import torch

from specforge.algorithms.base import Sampling
from specforge.algorithms.parts.sampling import distribution, draw, pick

LOGITS = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0], [0.0, 0.0, 5.0, 0.0, 4.0]])


def sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Sampling:
    return Sampling(temperature, torch.Generator().manual_seed(0), top_k, top_p)


def test_plain_temperature_is_a_softmax():
    torch.testing.assert_close(distribution(LOGITS, sampling(0.7)), torch.softmax(LOGITS / 0.7, -1))


def test_tiny_temperature_is_the_lowest_of_the_best_ids():
    expected = torch.zeros(2, 5)
    expected[0, 1] = expected[1, 2] = 1.0
    assert torch.equal(distribution(LOGITS, sampling(0.0)), expected)
    assert torch.equal(distribution(LOGITS, sampling(9e-6)), expected)


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_exactly_so_many_ids(top_k: int, kept: list[int]):
    got = distribution(LOGITS[0], sampling(top_k=top_k))
    assert got.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(got[kept], torch.softmax(LOGITS[0, kept], -1))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [1]), (0.39, [1]), (0.5, [1, 3]), (0.9, [1, 2, 3]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]):
    got = distribution(LOGITS[0], sampling(top_p=top_p))
    assert got.nonzero().flatten().tolist() == kept
    torch.testing.assert_close(got[kept], torch.softmax(LOGITS[0, kept], -1))


def test_top_p_counts_among_the_top_k():
    assert distribution(LOGITS[0], sampling(top_k=2, top_p=0.5)).tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_every_point_picks_an_id_that_has_probability():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    points = [0.0, 0.2499, 0.25, 0.7499, 0.75, math.nextafter(1.0, 0.0)]
    assert [pick(probabilities, point) for point in points] == [1, 1, 3, 3, 4, 4]
    assert pick(torch.full((3,), 0.1), math.nextafter(1.0, 0.0)) == 2


def test_draws_follow_the_probabilities_and_the_generator():
    probabilities = torch.tensor([0.0, 3.0, 1.0])
    first = [draw(probabilities, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert first[0] == first[1]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.tensor([draw(probabilities, generator) for _ in range(4000)])
    assert abs(float((drawn == 1).double().mean()) - 0.75) < 0.03
    assert not (drawn == 0).any()


def test_nothing_to_draw_from_is_an_error():
    for wrong in (torch.zeros(3), torch.tensor([float("nan"), 1.0]), torch.tensor([float("inf"), 1.0])):
        with pytest.raises(ValueError, match="positive finite sum"):
            draw(wrong, torch.Generator())
