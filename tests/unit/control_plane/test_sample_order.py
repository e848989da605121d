"""The order of samples, and the policy that grants captures."""

import subprocess
import sys

import pytest

from specforge.contracts.refs import Slot
from specforge.control_plane.backpressure import Credits
from specforge.control_plane.prompts import SampleOrder
from specforge.errors import ConfigError


def test_every_epoch_holds_every_sample_once():
    order = SampleOrder(num_samples=11, num_epochs=3, seed=4)
    assert order.total == 33
    epochs = [[order.index_at(s) for s in range(e * 11, (e + 1) * 11)] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_slots_are_numbered_epoch_after_epoch():
    order = SampleOrder(num_samples=5, num_epochs=2, seed=0)
    assert order.slot(7) == Slot(1, 2)
    assert [order.linear(order.slot(s)) for s in range(order.total)] == list(range(10))


def test_without_shuffle_the_order_is_that_of_the_prompts():
    order = SampleOrder(num_samples=3, num_epochs=2, seed=9, shuffle=False)
    assert [order.index_at(s) for s in range(6)] == [0, 1, 2, 0, 1, 2]


def test_the_order_depends_on_the_seed_and_on_no_process():
    order = SampleOrder(num_samples=20, num_epochs=2, seed=4)
    indices = [order.index_at(s) for s in range(40)]
    assert indices != [SampleOrder(20, 2, seed=5).index_at(s) for s in range(40)]
    program = (
        "from specforge.control_plane.prompts import SampleOrder as O\n"
        "print([O(20, 2, seed=4).index_at(s) for s in range(40)])"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert printed.stdout.strip() == str(indices)


def test_an_empty_run_is_refused():
    with pytest.raises(ConfigError, match="got 0 samples"):
        SampleOrder(num_samples=0, num_epochs=1, seed=0)


def test_bytes_hold_back_captures_but_never_those_of_the_next_step():
    limits = Credits(window_slots=8, step_slots=2, max_resident_bytes=100)
    assert limits.grants(slot=5, first_open=0, resident_bytes=60, estimated_bytes=40)
    assert not limits.grants(slot=5, first_open=0, resident_bytes=61, estimated_bytes=40)
    assert limits.grants(slot=1, first_open=0, resident_bytes=1000, estimated_bytes=40)
    assert limits.window_end(first_open=4, total=10) == 10


def test_a_window_smaller_than_a_step_is_refused():
    with pytest.raises(ConfigError, match="raise it to 4"):
        Credits(window_slots=3, step_slots=4, max_resident_bytes=None)
