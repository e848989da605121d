"""Confidence intervals: what they cover, and when there is none."""

import numpy as np
import pytest

from specforge.evaluation.report import DecodedPrompt, summarise
from specforge.evaluation.statistics import Bootstrap


def test_intervals_of_a_ratio_cover_the_truth_nineteen_times_in_twenty():
    """Prompts of random length whose tokens a round vary from prompt to prompt: a mean of 2.5, known beforehand."""
    generator = np.random.default_rng(5)
    bootstrap = Bootstrap(60, 800)
    covered = 0
    for _ in range(400):
        rounds = generator.integers(5, 30, 60).astype(float)
        tokens = rounds * generator.gamma(6.25, 0.4, 60)
        interval = bootstrap.interval([tokens, rounds], lambda sums: sums[0] / sums[1])
        assert interval is not None
        covered += interval[0] <= 2.5 <= interval[1]
    assert 0.91 <= covered / 400 <= 0.975


def test_interval_shrinks_with_the_root_of_the_number_of_prompts():
    generator = np.random.default_rng(1)

    def width(num_prompts: int) -> float:
        values = generator.normal(10.0, 1.0, num_prompts)
        found = Bootstrap(num_prompts).interval([values], lambda sums: sums[0] / num_prompts)
        assert found is not None
        return found[1] - found[0]

    assert width(400) == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert width(1600) == pytest.approx(2 * 1.96 / 40, rel=0.2)


def test_same_sample_gives_the_same_interval():
    columns = [[1.0, 4.0, 2.0, 2.5], [1.0, 2.0, 1.0, 1.0]]
    first, second = (Bootstrap(4).interval(columns, lambda sums: sums[0] / sums[1]) for _ in range(2))
    assert first == second is not None


def test_equal_prompts_have_an_interval_of_no_width():
    assert Bootstrap(5).interval([[6.0] * 5, [2.0] * 5], lambda sums: sums[0] / sums[1]) == (3.0, 3.0)


@pytest.mark.parametrize("num_prompts", [0, 1])
def test_fewer_than_two_prompts_have_no_interval(num_prompts: int):
    assert Bootstrap(num_prompts).interval([[1.0] * num_prompts], lambda sums: sums[0]) is None


def test_figure_that_most_resamples_lack_has_no_interval():
    counted = [[0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 1.0]]
    assert Bootstrap(4).interval(counted, lambda sums: sums[0] / sums[1]) is None


def row(seconds: float, accepted: tuple[int, ...], batch: int = 0) -> DecodedPrompt:
    tokens = tuple(range(11))
    return DecodedPrompt(3, batch, tokens, tokens, 1.0, seconds, accepted, None, False)


def test_report_has_intervals_of_its_figures():
    report = summarise([row(0.5, (0, 2), 0), row(0.25, (2, 2, 1), 1), row(0.4, (1,), 2)], 2, judged=True)
    assert report.accepted_length_ci95 == pytest.approx((2.0, 1 + 5 / 3))
    assert report.speed_up_ci95 == pytest.approx((2.0, 4.0))
    low, high = report.acceptance_per_position_ci95[0] or (None, None)
    assert low == 0.5
    assert high == 1.0
    nothing = summarise([row(0.5, ()), row(0.5, ())], 2, judged=True)
    assert nothing.accepted_length_ci95 is None
    assert nothing.acceptance_per_position_ci95 == ()


def test_speed_up_is_resampled_by_batch_because_prompts_of_one_share_its_seconds():
    """Two batches of eight whose prompts all took the same: as uncertain as two prompts, not as sixteen."""
    batches = [row(0.5, (1,), 0)] * 8 + [row(0.25, (1,), 1)] * 8
    found = summarise(batches, 2, judged=True)
    assert found.speed_up_ci95 == pytest.approx((2.0, 4.0))
    assert found.accepted_length_ci95 == (2.0, 2.0)
    assert summarise(batches[:8], 2, judged=True).speed_up_ci95 is None
    assert summarise(batches, 2, judged=True, whole_batches=False).speed_up_ci95 is None
