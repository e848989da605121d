"""What the controller does about deaths: leases, suspects, adoption, roll-backs, and the two ways to release."""

import pytest
from controlled_run import NUM_SAMPLES, Run

from specforge.control_plane.metadata.base import Position
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import ConfigError, DataError, ProducerFailed


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path):
    store = InMemoryMetadataStore() if request.param == "memory" else SqlMetadataStore(tmp_path / "ledger.sqlite")
    yield store
    store.close()


# Deaths of workers


def test_the_leases_of_a_dead_worker_are_given_to_others_at_once(store):
    run = Run(store)
    dead, alive = run.lease(2, "w0"), run.lease(1, "w1")
    run.features.put([(dead[0].task.sample_id, 1)])
    run.controller.leave("w0", "killed by SIGKILL")
    again = run.lease(2, "w1")
    assert [(lease.task, lease.generation) for lease in again] == [(lease.task, 2) for lease in dead]
    assert run.commit(dead) == [False, False]
    assert run.commit([*alive, *again]) == [True] * 3
    assert (dead[0].task.sample_id, 1) in run.features.freed, "what it had stored is freed"


def test_a_worker_that_leaves_in_good_order_is_no_crash(store):
    run = Run(store)
    leases = run.lease(2)
    run.controller.leave("w0", None)
    run.controller.leave("w0", None)
    assert [lease.generation for lease in run.lease(2)] == [2, 2]
    assert store.sample(leases[0].task.index).num_crashes == 0


def test_a_sample_that_two_workers_died_of_is_leased_alone(store):
    run = Run(store)
    for worker in ("w0", "w1"):
        run.lease(2, worker)
        run.controller.leave(worker, "killed")
    (alone,) = run.lease(4, "w2")
    assert run.lease(4, "w2") == [], "a worker that holds a suspect gets nothing else"
    (other,) = run.lease(1, "w3")
    assert [alone.task.index, other.task.index] == run.indices([0, 1])
    busy = run.lease(4, "w4")
    assert [lease.task.index for lease in busy] == run.indices([2, 3])
    run.controller.leave("w3", "killed")
    assert run.lease(4, "w4") == [], "a worker that holds others does not get a suspect"
    run.commit([alone, *busy])
    (suspect,) = run.lease(4, "w4")
    assert suspect.task == other.task


def test_only_deaths_while_alone_quarantine_a_sample(store):
    run = Run(store, max_crash_attempts=2, max_quarantined=1)
    poison = run.indices([0])[0]
    for n in range(4):
        worker = f"dead{n}"
        leases = run.lease(4, worker)
        assert leases[0].task.index == poison
        if n >= 2:
            assert len(leases) == 1
        run.commit(leases[1:])
        run.controller.leave(worker, "killed by SIGSEGV")
    assert 0 not in run.run_to_end()
    (quarantine,) = store.quarantines()
    assert (quarantine.index, quarantine.from_slot, quarantine.to_slot) == (poison, 0, None)
    assert "2 of them while they held nothing else" in quarantine.reason
    assert "SIGSEGV" in quarantine.reason


def test_silence_counts_as_a_crash_and_frees_what_was_stored(store):
    run = Run(store)
    (lease,) = run.lease(1)
    run.features.put([(lease.task.sample_id, 1)])
    run.now = 10.0
    assert run.lease(1, "w1")[0].generation == 2
    assert store.sample(lease.task.index).num_crashes == 1
    assert run.features.freed == [(lease.task.sample_id, 1)]


def test_a_crash_does_not_count_as_a_failure_of_the_prompt(store):
    run = Run(store, max_attempts=1)
    run.lease(1, "dead")
    run.controller.leave("dead", "killed")
    assert run.run_to_end() == list(range(NUM_SAMPLES))


def test_the_failure_budget_names_the_last_one(store):
    run = Run(store, max_attempts=1, max_quarantined=1)
    leases = run.lease(2)
    for lease in leases:
        run.controller.fail("w0", lease.task.sample_id, 1, "ValueError: odd token")
    with pytest.raises(ProducerFailed, match=r"2 prompts are quarantined, more than max_quarantined = 1.*odd token"):
        run.reader.poll(1)


# Restarts


def test_leases_of_a_worker_that_died_with_its_controller_are_crashes_wherever_their_slots_are(store):
    run = Run(store)
    dead, other = run.lease(2, "w0"), run.lease(1, "w1")
    again = Run(store, window_slots=1, step_slots=1)
    again.controller.resume(Position(0, 0), crashed={"w0": "killed by SIGKILL"})
    assert [store.sample(lease.task.index).num_crashes for lease in [*dead, *other]] == [1, 1, 0]
    assert again.controller.summary()["num_crashes"] == 1
    assert again.run_to_end() == list(range(NUM_SAMPLES)), "the workers of the same name go on"


def test_a_prompt_that_kills_its_process_is_quarantined_though_each_time_the_controller_dies_too(store):
    """Slot 4 is beyond the window of the checkpoint, at slot 0, to which every death returns."""
    limits = {"window_slots": 2, "max_crash_attempts": 2, "max_quarantined": 1}
    poison = Run(store).indices([4])[0]
    crashed: dict[str, str] = {}
    num_deaths = 0
    while True:
        run = Run(store, **limits)
        run.controller.resume(Position(0, 0), crashed=crashed)
        if store.quarantines() or num_deaths == 9:
            break
        step = 0
        while (lease := run.lease(1, "w0")[0]).task.index != poison:
            run.commit([lease])
            step += 1
            run.train(run.poll(1), step)
        num_deaths += 1
        crashed = {"w0": "killed by SIGSEGV"}
    (quarantine,) = store.quarantines()
    assert (num_deaths, quarantine.index, quarantine.from_slot) == (4, poison, 0)
    assert (
        "4 workers died while they held it, 2 of them while they held nothing else; the last was" in quarantine.reason
    )
    assert run.run_to_end() == [slot for slot in range(NUM_SAMPLES) if slot != 4]
    again = Run(store, **limits)
    again.controller.resume(Position(0, 0), crashed=crashed)
    assert store.quarantines() == [quarantine], "also after another return to the checkpoint"


def test_the_failure_budget_holds_for_prompts_that_are_condemned_at_a_restart(store):
    for crashed in ({}, *[{"w0": "killed by SIGSEGV"}] * 3):
        run = Run(store, max_crash_attempts=1)
        run.controller.resume(Position(0, 0), crashed=crashed)
        run.lease(1, "w0")
    with pytest.raises(ProducerFailed, match=r"more than max_quarantined = 0.*worker w0: killed by SIGSEGV"):
        run.reader.poll(1)


def test_features_that_can_still_be_read_are_adopted(store):
    run = Run(store, epochs=2)
    run.commit(run.lease())
    refs = run.poll()
    run.train(refs[:2], 1)
    run.controller.checkpointed(1)
    again = Run(store, epochs=2, features=run.features)
    again.controller.resume(Position(2, 1))
    adopted = again.poll()
    assert [(ref.slot, ref.ref) for ref in adopted] == [(ref.slot, ref.ref) for ref in refs[2:]]
    again.train(adopted, 2)
    assert again.run_to_end(step=3) == list(range(4, 12))
    assert run.features.stored() == []


def test_features_that_are_gone_are_captured_again(store):
    run = Run(store)
    run.commit(run.lease())
    refs = run.poll()
    run.train(refs[:2], 1)
    run.controller.checkpointed(1)
    run.features.abort([(refs[2].ref.sample_id, 1)])
    again = Run(store, features=run.features)
    again.controller.resume(Position(2, 1))
    assert again.poll() == []
    (lease, *_) = again.lease(1)
    assert (lease.task.sample_id, lease.generation) == (refs[2].ref.sample_id, 2)
    again.commit([lease])
    assert again.numbers(again.poll()) == [2, 3]


def test_leases_of_living_workers_stay_and_those_of_others_do_not(store):
    run = Run(store)
    living, dead = run.lease(2, "w0"), run.lease(2, "w1")
    again = Run(store, features=run.features)
    again.controller.resume(Position(0, 0), live_workers={"w0"})
    assert again.commit(living) == [True, True]
    assert again.commit(dead) == [False, False]
    assert [lease.generation for lease in again.lease(2, "w0")] == [2, 2]
    assert store.sample(dead[0].task.index).num_crashes == 0


def test_leases_whose_answer_was_lost_with_the_controller_are_given_again(store):
    run = Run(store)
    lost = run.lease(2, "w0")
    again = Run(store, features=run.features)
    again.controller.resume(Position(0, 0), live_workers={"w0"})
    leases = again.lease(3, "w0")
    assert [lease.task.index for lease in leases] == again.indices([0, 1, 2])
    assert [lease.generation for lease in leases] == [2, 2, 1]
    assert again.commit(lost) == [False, False]
    assert again.commit(leases) == [True] * 3
    assert store.sample(lost[0].task.index).num_crashes == 0


def test_a_sample_that_was_quarantined_later_is_trained_in_the_slots_before_that_again(store):
    options = {"epochs": 2, "max_attempts": 1, "max_quarantined": 1}
    run = Run(store, **options)
    trained, step = [], 0
    while len(trained) < NUM_SAMPLES:
        run.commit(run.lease())
        refs = run.poll(2)
        step += 1
        run.train(refs, step)
        trained += run.numbers(refs)
        if step == 1:
            run.controller.checkpointed(1)
    # in flight in epoch 1, trained in epoch 0 behind the checkpoint
    first_slot = {index: slot for slot, index in enumerate(run.indices(range(NUM_SAMPLES)))}
    bad = next(lease for lease in run.lease() if first_slot[lease.task.index] >= 2)
    run.controller.fail("w0", bad.task.sample_id, bad.generation, "no memory")
    (quarantine,) = store.quarantines()
    again = Run(store, features=run.features, **options)
    again.controller.resume(Position(2, 1), run.controller.checkpoint_state())
    assert again.run_to_end(step=2) == [slot for slot in range(2, 12) if slot != quarantine.from_slot]
    assert store.quarantines() == [quarantine]


def test_a_quarantined_slot_in_the_next_step_does_not_block_a_resumed_run(store):
    options = {"num_samples": 16, "max_attempts": 1, "max_quarantined": 1, "window_slots": 6}
    run = Run(store, **options)
    leases = run.lease()
    run.controller.fail("w0", leases[1].task.sample_id, 1, "poison")
    run.commit([leases[0], *leases[2:]])
    for step in (1, 2):
        run.commit(run.lease())
        run.train(run.poll(2), step)
    run.commit(run.lease())
    again = Run(store, features=run.features, **options)
    again.controller.resume(Position(0, 0))
    assert again.run_to_end() == [0, *range(2, 16)]


def test_a_failure_of_a_lease_beyond_the_window_is_decided_when_its_slot_opens(store):
    options = {"num_samples": 8, "max_attempts": 1, "max_quarantined": 1}
    run = Run(store, **options)
    run.commit(run.lease())
    run.train(run.poll(2), 1)
    held = run.lease()
    again = Run(store, features=run.features, **options)
    again.controller.resume(Position(0, 0), live_workers={"w0"})
    again.controller.fail("w0", held[0].task.sample_id, held[0].generation, "bad prompt")
    assert again.run_to_end() == list(range(8))


def test_a_dead_workers_last_request_gets_nothing(store):
    run = Run(store)
    run.controller.leave("w0.1", "killed")
    assert run.controller.lease("w0.1", 4, 60.0).finished
    assert len(run.lease(4, "w0.2")) == 4


def test_a_worker_that_lives_through_a_capture_clears_the_sample(store):
    run = Run(store, epochs=2, max_crash_attempts=1)
    for n in range(2):
        run.lease(1, f"w{n}")
        run.controller.leave(f"w{n}", "killed")
    (suspect,) = run.lease(4, "w9")
    assert store.sample(suspect.task.index).num_crashes == 2
    run.commit([suspect])
    assert store.sample(suspect.task.index).num_crashes == 0
    assert len(run.lease(4, "w9")) == 3


def test_what_the_ledger_does_not_want_is_freed_at_a_restart(store):
    run = Run(store)
    run.commit(run.lease())
    refs = run.poll()
    run.features.put([("s0", 7), (refs[0].ref.sample_id, 99)])
    again = Run(store, features=run.features)
    again.controller.resume(Position(2, 1))
    assert sorted(again.features.stored()) == sorted((ref.ref.sample_id, 1) for ref in refs[2:])


def test_a_checkpoint_carries_the_quarantines_of_a_run_without_a_ledger():
    run = Run(NoOpMetadataStore(), max_attempts=1, max_quarantined=1, epochs=2)
    leases = run.lease(4)
    run.controller.fail("w0", leases[1].task.sample_id, 1, "poison")
    run.commit([leases[0], *leases[2:]])
    run.train(run.poll(2), 1)
    state = run.controller.checkpoint_state()
    again = Run(NoOpMetadataStore(), max_attempts=1, max_quarantined=1, epochs=2)
    again.controller.resume(Position(3, 1), state)
    assert again.controller.account()["num_slots_trained"] == 2
    skipped = [s for s in range(12) if again.order.index_at(s) == leases[1].task.index]
    assert again.run_to_end(step=2) == [s for s in range(3, 12) if s not in skipped]
    with pytest.raises(DataError, match="quarantines that cannot be read"):
        Run(NoOpMetadataStore()).controller.resume(Position(3, 1), {"quarantines": [{"who": 1}]})


def test_a_retried_prompt_is_trained_in_the_slots_that_were_not_passed(store):
    run = Run(store, max_attempts=1)
    leases = run.lease()
    run.commit(leases[:2])
    run.train(run.poll(), 1)
    run.controller.checkpointed(1)
    run.controller.fail("w0", leases[2].task.sample_id, 1, "no memory")
    with pytest.raises(ProducerFailed):
        run.poll()
    store.retry(leases[2].task.index, 2)
    again = Run(store, max_attempts=1, features=run.features)
    again.controller.resume(Position(2, 1), run.controller.checkpoint_state())
    assert again.run_to_end(step=2) == list(range(2, NUM_SAMPLES))


# Release


def test_released_at_checkpoint_features_stay_until_one_covers_them(store):
    run = Run(store, release="at_checkpoint")
    run.commit(run.lease())
    refs = run.poll()
    run.train(refs[:2], 1)
    run.train(refs[2:], 2)
    assert run.features.freed == []
    run.controller.checkpointed(1)
    assert run.features.freed == [(ref.ref.sample_id, 1) for ref in refs[:2]]


def test_released_at_checkpoint_nothing_is_captured_again_after_a_roll_back(store):
    options = {"release": "at_checkpoint", "epochs": 2, "num_samples": 12}
    run = Run(store, **options)
    for step in range(1, 5):
        run.commit(run.lease())
        run.train(run.poll(2), step)
        if step == 1:
            run.controller.checkpointed(1)
    generations = {i: store.sample(i).generation for i in range(12)}
    again = Run(store, features=run.features, **options)
    again.controller.resume(Position(2, 1))
    for step in (2, 3, 4):
        refs = again.poll(2)
        assert again.numbers(refs) == [2 * step - 2, 2 * step - 1]
        again.train(refs, step)
    assert {i: store.sample(i).generation for i in range(12)} == generations


@pytest.mark.parametrize("release", ["at_step", "at_checkpoint"])
def test_both_ways_to_release_train_every_slot_once_over_a_roll_back(store, release):
    run = Run(store, epochs=2, release=release)
    for step in (1, 2, 3):
        run.commit(run.lease())
        run.train(run.poll(2), step)
        if step == 1:
            run.controller.checkpointed(1)
    again = Run(store, epochs=2, release=release, features=run.features)
    again.controller.resume(Position(2, 1))
    trained = []
    step = 2
    while len(trained) < 10:
        again.commit(again.lease())
        refs = again.poll(2)
        again.train(refs, step)
        trained += again.numbers(refs)
        again.controller.checkpointed(step)
        step += 1
    assert trained == list(range(2, 12))
    assert again.features.stored() == []


# Arrival order


def test_in_arrival_order_nobody_waits_for_a_straggler(store):
    run = Run(store, in_order=False)
    straggler, *others = run.lease()
    run.commit(others)
    refs = run.poll()
    assert run.numbers(refs) == [1, 2, 3]
    run.train(refs, 1)
    run.controller.checkpointed(1)
    assert len(run.lease()) == 2
    run.commit([straggler])
    assert run.numbers(run.poll()) == [0]


def test_in_arrival_order_a_late_straggler_leaves_no_step_short(store):
    run = Run(store, in_order=False, num_samples=16, window_slots=8, step_slots=4)
    first, straggler, *others = run.lease()
    run.commit([first, *others])
    trained, step = [], 0
    while step < 3:
        run.commit(run.lease())
        refs = run.poll(4)
        step += 1
        assert len(refs) == 4
        run.train(refs, step)
        trained += run.numbers(refs)
    run.commit([straggler])
    refs = run.poll(4)
    assert sorted(trained + run.numbers(refs)) == list(range(16))


def test_in_arrival_order_features_of_trained_slots_are_not_adopted(store):
    options = {"num_samples": 12, "in_order": False, "release": "at_checkpoint"}
    run = Run(store, **options)
    leases = run.lease()
    run.commit(leases[1:])
    run.train(run.poll(2), 1)
    again = Run(store, features=run.features, **options)  # the checkpoint is there, the ledger was not told
    again.controller.resume(Position(2, 1, prefix=False), run.controller.checkpoint_state())
    again.run_to_end(step=2)
    again.controller.checkpointed(100)
    assert again.features.stored() == []
    assert again.controller.summary()["resident_bytes"] == 0


def test_in_arrival_order_a_restart_repeats_what_the_checkpoint_does_not_cover(store):
    run = Run(store, in_order=False)
    straggler, *others = run.lease()
    run.commit(others)
    refs = run.poll()
    run.train(refs[:2], 1)
    run.controller.checkpointed(1)
    run.train(refs[2:], 2)
    again = Run(store, in_order=False, features=run.features)
    again.controller.resume(Position(2, 1, prefix=False))
    assert store.first_untrained(again.order.index_at) == 0
    assert sorted(again.run_to_end(step=2)) == [0, 3, 4, 5]
    assert store.counts().num_slots_trained == NUM_SAMPLES
    assert straggler.task.index == run.indices([0])[0]


def test_arrival_order_needs_a_ledger_and_stays_what_it_was(store):
    with pytest.raises(ConfigError, match="strict order"):
        Run(NoOpMetadataStore(), in_order=False)
    Run(store)
    with pytest.raises(ConfigError, match="order=strict"):
        Run(store, in_order=False)
