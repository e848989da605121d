"""DataFlowController over every store: order, credits, leases, endings, resumption."""

import threading
import time

import pytest
from controlled_run import NUM_SAMPLES, Run

from specforge.control_plane.channel.memory import memory_channel
from specforge.control_plane.controller import ControllerSettings
from specforge.control_plane.metadata.base import Position
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.control_plane.modes import Deployment, DeploymentMode, resolve_control_plane
from specforge.control_plane.prompts import ListedTasks, SampleOrder
from specforge.errors import ConfigError, ContractError, ControlPlaneError, DataError, InvalidTransition, ProducerFailed
from specforge.testing.features import NamedFeatures
from specforge.testing.metadata_store import make_ref, make_task


@pytest.fixture(params=["noop", "memory", "sqlite"])
def store(request, tmp_path):
    makers = {"noop": NoOpMetadataStore, "memory": InMemoryMetadataStore}
    store = makers[request.param]() if request.param in makers else SqlMetadataStore(tmp_path / "ledger.sqlite")
    yield store
    store.close()


@pytest.fixture
def memory():
    return InMemoryMetadataStore()


def test_a_run_trains_every_slot_once_in_order(store):
    run = Run(store, epochs=3)
    assert run.run_to_end() == list(range(18))
    assert run.lease() == []
    assert run.controller.lease("w0", 1, 60.0).finished
    run.controller.checkpointed(run.store.counts().last_step)
    summary = run.controller.account()
    assert (summary["num_slots_trained"], summary["num_slots_durable"]) == (18, 18)
    assert summary["num_unique_samples_trained"] == NUM_SAMPLES
    assert summary["resident_bytes"] == summary["num_committed"] == summary["num_leased"] == 0
    assert len(run.features.freed) == len(set(run.features.freed))


def test_leases_follow_the_slot_order_inside_the_window(store):
    run = Run(store)
    leases = [*run.lease(3), *run.lease(3)]
    assert [lease.task.index for lease in leases] == run.indices(range(4))
    assert run.lease() == []
    assert all(lease.generation == 1 and lease.duration_s == 10.0 for lease in leases)


def test_refs_are_dispatched_in_slot_order_whatever_the_commit_order(store):
    run = Run(store)
    leases = run.lease()
    assert run.commit(leases[1:3]) == [True, True]
    assert run.poll() == []
    run.commit(leases[:1])
    refs = run.poll()
    assert [run.order.linear(ref.slot) for ref in refs] == [0, 1, 2]
    assert [ref.ref.sample_id for ref in refs] == [lease.task.sample_id for lease in leases[:3]]


def test_the_window_moves_with_the_acks(store):
    run = Run(store)
    run.commit(run.lease())
    refs = run.poll()
    run.train(refs[1:2], 1)
    assert [lease.task.index for lease in run.lease()] == run.indices([4])
    run.train(refs[:1], 1)
    assert [lease.task.index for lease in run.lease()] == run.indices([5])


def test_features_are_released_when_no_slot_of_the_window_needs_them(store):
    run = Run(store)
    leases = run.lease()
    run.commit(leases)
    run.train(run.poll(2), 1)
    assert run.features.freed == [(lease.task.sample_id, 1) for lease in leases[:2]]


def test_live_features_serve_the_next_epoch_without_a_new_capture(store):
    run = Run(store, epochs=2, num_samples=2, window_slots=4)
    leases = run.lease()
    assert len(leases) == 2
    run.commit(leases)
    refs = run.poll()
    assert [run.order.linear(ref.slot) for ref in refs] == [0, 1, 2, 3]
    run.train(refs[:2], 1)
    assert run.features.freed == []
    run.train(refs[2:], 2)
    assert sorted(run.features.freed) == [("s0", 1), ("s1", 1)]


def test_bytes_bound_what_is_leased_and_resident(store):
    run = Run(store, bytes_per_token=10, max_resident_bytes=250)
    leases = run.lease()
    assert len(leases) == 3, "8 tokens of 10 bytes each, 250 bytes in all"
    run.commit(leases, num_bytes=60)
    assert run.controller.summary()["resident_bytes"] == 180
    assert run.lease() == []
    run.train(run.poll(1), 1)
    assert len(run.lease()) == 1
    assert run.controller.summary()["resident_bytes"] == 200


def test_a_tiny_byte_budget_still_lets_every_step_through(store):
    run = Run(store, bytes_per_token=10, max_resident_bytes=1)
    assert run.run_to_end() == list(range(NUM_SAMPLES))


def test_a_commit_of_an_expired_attempt_is_refused(store):
    run = Run(store)
    late = run.lease(2)
    run.now = 10.0
    again = run.lease(2, "w1")
    assert [(a.task, a.generation) for a in again] == [(lease.task, 2) for lease in late]
    assert run.commit(late) == [False, False]
    assert run.commit(again) == [True, True]
    assert run.commit(late) == [False, False]
    assert [ref.ref.generation for ref in run.poll()] == [2, 2]


def test_repeating_an_accepted_commit_changes_nothing(store):
    run = Run(store)
    leases = run.lease(2)
    assert run.commit(leases) == run.commit(leases) == [True, True]
    assert len(run.poll()) == 2
    assert run.poll() == []


def test_a_heartbeat_keeps_the_leases_of_its_worker_only(store):
    run = Run(store)
    mine, others = run.lease(1, "w0"), run.lease(1, "w1")
    run.now = 9.0
    run.controller.heartbeat("w0")
    run.now = 11.0
    assert run.commit([*mine, *others]) == [True, False]


def test_a_failed_prompt_is_tried_again_and_then_fails_the_run(store):
    run = Run(store, max_attempts=2)
    for generation in (1, 2):
        (lease,) = run.lease(1)
        assert lease.generation == generation
        run.controller.fail("w0", lease.task.sample_id, generation, "token out of range")
        run.controller.fail("w0", lease.task.sample_id, generation, "repeated call")
    with pytest.raises(ProducerFailed, match=r"more than max_quarantined = 0.*token out of range"):
        run.reader.poll(1)
    assert run.controller.lease("w0", 1, 60.0).finished
    assert run.controller.summary()["state"] == "failed"


def test_quarantined_samples_leave_their_slots_and_a_restart_repeats_that(tmp_path):
    path = tmp_path / "ledger.sqlite"
    run = Run(SqlMetadataStore(path), epochs=2, max_attempts=1, max_quarantined=1)
    poison = run.indices([1])[0]
    leases = run.lease()
    bad = next(lease for lease in leases if lease.task.index == poison)
    run.controller.fail("w0", bad.task.sample_id, 1, "poison")
    run.commit([lease for lease in leases if lease is not bad])
    trained = run.run_to_end()
    skipped = [s for s in range(12) if run.order.index_at(s) == poison]
    assert trained == [s for s in range(12) if s not in skipped]
    assert run.controller.summary()["num_quarantined"] == 1
    run.store.close()

    again = Run(SqlMetadataStore(path), epochs=2, max_attempts=1, max_quarantined=1)
    again.controller.resume(Position(4, 2))
    assert again.run_to_end(step=3) == [s for s in trained if s >= 4]
    assert again.controller.summary()["num_slots_trained"] == len(trained)
    again.store.close()


def test_a_quarantined_last_slot_ends_the_stream(store):
    run = Run(store, num_samples=2, window_slots=2, max_attempts=1, max_quarantined=1)
    first, last = run.lease()
    run.commit([first])
    run.controller.fail("w0", last.task.sample_id, 1, "poison")
    assert len(run.poll()) == 1
    assert run.reader.ended


def test_the_stream_ends_with_the_last_dispatch_so_that_an_odd_last_batch_is_not_waited_for(store):
    run = Run(store, num_samples=3)
    run.commit(run.lease())
    assert len(run.poll()) == 3
    assert run.reader.ended


def test_finishing_early_sends_workers_home_and_frees_what_is_resident(store):
    run = Run(store)
    leases = run.lease()
    run.commit(leases[:3])
    run.train(run.poll(2), 1)
    run.controller.finish()
    run.controller.finish()
    assert run.controller.lease("w0", 1, 60.0).finished
    assert run.commit(leases[3:]) == [False]
    assert sorted(run.features.freed) == sorted((lease.task.sample_id, 1) for lease in leases)
    summary = run.controller.summary()
    assert (summary["state"], summary["resident_bytes"], summary["num_leased"]) == ("finished", 0, 0)


def test_a_failed_run_sends_everybody_home_with_the_first_reason(store):
    run = Run(store)
    leases = run.lease()
    run.controller.fail_run("the disk is full")
    run.controller.fail_run("a later reason")
    with pytest.raises(ProducerFailed, match="the disk is full"):
        run.reader.poll(1)
    assert run.commit(leases) == [False] * len(leases)
    assert run.controller.lease("w0", 1, 60.0).finished


def test_a_failure_after_the_last_dispatch_lets_the_trainer_finish(store):
    run = Run(store, num_samples=2, window_slots=2)
    run.commit(run.lease())
    run.controller.fail_run("the worker died while leaving")
    assert len(run.poll()) == 2
    assert run.reader.ended


@pytest.mark.parametrize("what", ["ack", "expiry", "finish", "fail_run", "wake"])
def test_a_blocked_lease_ends_at_once(memory, what):
    run = Run(memory, lease_s=0.2 if what == "expiry" else 10.0, clock=time.monotonic)
    leases = run.lease()
    if what != "expiry":
        run.commit(leases)
    cancelled = threading.Event()
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(run.controller.lease("w1", 1, 1000.0, "", cancelled.is_set))
    )
    thread.start()
    if what == "ack":
        run.train(run.poll(1), 1)
    elif what == "wake":
        cancelled.set()
        run.controller.wake()
    elif what != "expiry":
        getattr(run.controller, what)(*(["reason"] if what == "fail_run" else []))
    thread.join(20)
    assert not thread.is_alive()
    (reply,) = replies
    assert len(reply.leases) == (1 if what in {"ack", "expiry"} else 0)
    assert reply.finished == (what in {"finish", "fail_run"})


def test_resuming_goes_back_to_the_checkpoint(store):
    run = Run(store, epochs=2)
    run.commit(run.lease())
    refs = run.poll()
    run.train(refs[:2], 1)
    run.controller.checkpointed(1)
    run.train(refs[2:4], 2)
    before = {lease.task.sample_id: lease.generation for lease in run.lease()}

    again = Run(store, epochs=2)
    again.controller.resume(Position(2, 1))
    leases = again.lease()
    assert [lease.task.index for lease in leases] == again.indices(range(2, 6))
    assert all(lease.generation > before.get(lease.task.sample_id, 0) for lease in leases)
    again.commit(leases)
    assert again.run_to_end(step=2) == list(range(2, 12))
    assert again.controller.summary()["num_slots_trained"] == 12


def test_resuming_goes_forward_to_a_checkpoint_that_the_ledger_has_not_heard_of(store):
    run = Run(store)
    run.controller.resume(Position(4, 2))
    summary = run.controller.summary()
    assert (summary["num_slots_trained"], summary["num_slots_durable"]) == (4, 4)
    assert run.run_to_end(step=3) == [4, 5]
    assert run.controller.account()["num_unique_samples_trained"] == NUM_SAMPLES


def test_a_ledger_without_a_checkpoint_starts_again(store):
    first = Run(store)
    first.commit(first.lease())
    first.train(first.poll(2), 1)
    again = Run(store)
    assert again.run_to_end() == list(range(NUM_SAMPLES))


def test_resuming_a_finished_run_ends_at_once(store):
    run = Run(store)
    run.controller.resume(Position(NUM_SAMPLES, 3))
    assert run.reader.ended
    assert run.controller.lease("w0", 1, 60.0).finished


def test_resuming_is_refused_after_the_start_and_beyond_the_run(memory):
    run = Run(memory)
    with pytest.raises(DataError, match="covers 7 slots"):
        run.controller.resume(Position(7, 1))
    run.lease()
    with pytest.raises(InvalidTransition):
        run.controller.resume(Position(0, 0))


def test_other_prompts_or_another_seed_than_the_ledger_has_are_refused(memory):
    Run(memory)
    with pytest.raises(ConfigError, match="seed=1"):
        Run(memory, seed=2)
    with pytest.raises(DataError, match="expected as many prompts"):
        Run(memory, num_samples=5)


def test_an_ack_of_a_slot_that_was_not_dispatched_is_refused(store):
    run = Run(store)
    run.commit(run.lease(2))
    refs = run.poll()
    run.train(refs[:1], 1)
    with pytest.raises(InvalidTransition):
        run.controller.ack([refs[1].slot, run.order.slot(3)], 1)
    run.train(refs[1:], 1)


def test_repeating_an_ack_changes_nothing_and_another_step_is_refused(memory):
    run = Run(memory)
    run.commit(run.lease(2))
    refs = run.poll()
    run.train(refs, 1)
    before = run.controller.account()
    run.train(refs, 1)
    assert run.controller.account() == before
    assert len(run.features.freed) == 2
    with pytest.raises(InvalidTransition, match="one ack a slot"):
        run.train(refs, 2)


def test_repeating_a_lease_call_gives_what_is_left_of_its_leases(store):
    run = Run(store)
    first = run.lease(3, key="call-1")
    run.commit(first[:1])
    assert run.lease(3, key="call-1") == first[1:]
    assert [lease.task.index for lease in run.lease(3, key="call-2")] == run.indices([3])


def test_features_that_do_not_fit_the_prompt_or_hold_a_tensor_are_refused(memory):
    run = Run(memory)
    (lease,) = run.lease(1)
    other = make_ref(make_task(lease.task.index, num_tokens=5), 1)
    with pytest.raises(ContractError, match="8 tokens"):
        run.controller.commit([other])
    assert run.commit([lease]) == [True]


@pytest.mark.parametrize("mode", list(DeploymentMode))
def test_modes_decide_the_ledger_and_whether_acks_are_durable(mode, tmp_path):
    writer, _ = memory_channel()
    order = SampleOrder(2, 1, seed=0)
    tasks = [make_task(i) for i in range(2)]
    path = tmp_path / "ledger.sqlite"
    settings = ControllerSettings(window_slots=2)
    controller, durable_ack = resolve_control_plane(
        Deployment(mode, path), order, ListedTasks(tasks), writer, settings, NamedFeatures()
    )
    assert durable_ack == path.exists() == (mode is DeploymentMode.DISAGGREGATED)
    assert len(controller.lease("w0", 5, 0.0).leases) == 2
    controller.close()


def test_a_disaggregated_run_without_a_ledger_path_is_refused():
    writer, _ = memory_channel()
    with pytest.raises(ConfigError, match="got none; give the path"):
        resolve_control_plane(
            Deployment(DeploymentMode.DISAGGREGATED),
            SampleOrder(1, 1, 0),
            ListedTasks([make_task(0)]),
            writer,
            ControllerSettings(window_slots=1),
            NamedFeatures(),
        )


class RefusingStore(InMemoryMetadataStore):
    """A ledger on a full disk."""

    def requeue(self, attempts):
        if attempts:
            raise ControlPlaneError("no space left")


def test_a_ledger_that_refuses_at_the_end_leaves_nobody_waiting_for_the_stream():
    run = Run(RefusingStore())
    run.lease(1)
    with pytest.raises(ControlPlaneError, match="no space left"):
        run.controller.finish()
    assert run.reader.ended
    assert run.controller.lease("w0", 1, 60.0).finished
