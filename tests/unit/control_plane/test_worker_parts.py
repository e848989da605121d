"""A worker may work in parts: what is said of it is said of them."""

import pytest
from controlled_run import Run

from specforge.control_plane.base import owner_among
from specforge.control_plane.metadata.base import Position
from specforge.control_plane.metadata.memory import InMemoryMetadataStore


@pytest.mark.parametrize(
    ("worker_id", "owner"),
    [
        ("capture-1", "capture-1"),
        ("capture-1/0.1", "capture-1"),
        ("capture-1/0.1/a", "capture-1"),
        ("capture-10", None),
        ("capture-10/0.1", None),
        ("capture", None),
        ("/", None),
        ("", None),
        ("b/x", "b/x"),
        ("b", None),
    ],
)
def test_which_worker_a_part_belongs_to(worker_id, owner):
    assert owner_among(worker_id, {"capture-1", "b/x"}) == owner


@pytest.fixture
def run():
    return Run(InMemoryMetadataStore())


def test_a_worker_leaves_in_good_order_with_all_its_parts(run):
    for worker in ("w0", "w0/0.1", "w0/1.1", "w00/0.1"):
        assert run.lease(1, worker)
    run.controller.leave("w0", None)
    summary = run.controller.summary()
    assert (summary["num_leased"], summary["num_crashes"]) == (1, 0)
    assert len(run.lease(10, "w0/0.2")) == 3


def test_parts_of_a_dead_worker_are_charged_and_given_nothing_any_more(run):
    lost = [*run.lease(1, "w0/0.1"), *run.lease(1, "w0/1.1")]
    run.controller.leave("w0", "killed")
    assert run.controller.lease("w0/0.2", 1, 0.0).finished
    assert run.controller.summary()["num_crashes"] == 1
    again = run.lease(10, "w1/0.2")
    assert [(lease.task.sample_id, lease.generation) for lease in again[:2]] == [
        (lease.task.sample_id, 2) for lease in lost
    ]


def test_a_part_dies_alone(run):
    run.lease(1, "w0/0.1")
    run.lease(1, "w0/1.1")
    run.controller.leave("w0/0.1", "its server is gone")
    assert run.controller.summary()["num_leased"] == 1
    assert run.controller.lease("w0/0.1", 1, 0.0).finished
    assert run.lease(1, "w0/0.2")


def test_a_heartbeat_of_the_worker_is_one_of_its_parts(run):
    run.lease(1, "w0/0.1")
    run.now = 8.0
    run.controller.heartbeat("w0")
    run.now = 12.0
    run.lease(0, "w9")
    assert run.controller.summary()["num_leased"] == 1


def test_a_resumed_run_keeps_leases_of_parts_of_living_workers_and_charges_those_of_dead_ones(run):
    run.lease(1, "w0/0.1")
    run.lease(1, "w1/0.1")
    run.lease(1, "w1/1.1")
    run.lease(1, "w2/0.1")
    again = Run(run.store, features=run.features)
    again.controller.resume(Position(0, 0), live_workers={"w0"}, crashed={"w1": "killed by signal 9"})
    summary = again.controller.summary()
    assert summary["num_leased"] == 1
    assert summary["num_crashes"] == 1
    assert len(again.store.crashed(1)) == 2
