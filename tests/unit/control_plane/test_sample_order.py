"""The order of samples: a pure function of the seed."""

import subprocess
import sys

import pytest

from specforge.contracts.refs import Slot
from specforge.control_plane.prompts import SampleOrder
from specforge.errors import ConfigError, ContractError


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


def test_a_slot_of_another_run_is_refused():
    order = SampleOrder(num_samples=5, num_epochs=2, seed=0)
    with pytest.raises(ContractError, match="5 samples an epoch"):
        order.linear(Slot(0, 5))


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
