import math

import pytest

from specforge.training.schedule import Schedule


def test_first_rate_is_base_over_warmup_and_never_zero():
    """Oracle 41."""
    schedule = Schedule("cosine", 1e-3, total_steps=1000, warmup_ratio=0.015)
    assert schedule.lr_at(0) == pytest.approx(1e-3 / 15)
    assert schedule.lr_at(14) == pytest.approx(1e-3)


def test_first_step_after_warmup_repeats_the_peak():
    assert Schedule("cosine", 2.0, 100, 0.1).lr_at(10) == pytest.approx(2.0)


def test_cosine_follows_its_closed_form():
    """Oracle 41."""
    schedule = Schedule("cosine", 1.0, total_steps=100, warmup_ratio=0.1)
    assert [schedule.lr_at(t) for t in (30, 55, 99)] == pytest.approx(
        [(1 + math.cos(math.pi * (t - 10) / 90)) / 2 for t in (30, 55, 99)]
    )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_rate_stays_at_the_minimum_after_the_end(kind):
    schedule = Schedule(kind, 1.0, total_steps=10, min_lr_ratio=0.25)
    assert schedule.lr_at(10) == schedule.lr_at(500) == pytest.approx(0.25)


def test_linear_falls_evenly_and_constant_stays():
    assert [Schedule("linear", 1.0, 4).lr_at(t) for t in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert Schedule("constant", 3.0, 4, warmup_ratio=0.5).lr_at(3) == 3.0


def test_inverse_square_root_falls_from_the_end_of_the_warmup():
    schedule = Schedule("inverse_sqrt", 2.0, total_steps=100, warmup_ratio=0.04)
    assert [schedule.lr_at(t) for t in (3, 4, 16, 64)] == pytest.approx([2.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("exponential", 2**0.5 - 1), ("minus_sqrt", 1 - 0.5**0.5)]
)
def test_wsd_stays_at_the_peak_and_falls_at_the_end_by_its_shape(shape, halfway):
    schedule = Schedule("wsd", 1.0, 100, 0.1, decay_ratio=0.2, decay_shape=shape)
    assert {schedule.lr_at(t) for t in range(10, 81)} == {1.0}
    assert [schedule.lr_at(t) for t in (90, 100, 200)] == pytest.approx([halfway, 0.0, 0.0])
