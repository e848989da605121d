"""Conformance suite of ``MetadataStore``: inherit, give ``make_store``, and the store is done when all of it passes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from specforge.contracts.features import layout
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import (
    Attempt,
    Dispatch,
    LiveAttempt,
    MetadataStore,
    Position,
    Quarantine,
    SampleState,
    SlotState,
)
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import ConfigError, DataError, InvalidTransition


def make_task(index: int, num_tokens: int = 8) -> PromptTask:
    """A prompt with made-up tokens; sample id ``s<index>``."""
    return PromptTask(f"s{index}", index, tuple(range(index, index + num_tokens)), ((num_tokens // 2, num_tokens),))


def make_ref(task: PromptTask, generation: int, num_bytes: int | None = None) -> SampleRef:
    """A ref as a rollout worker would commit it for ``task``."""
    features, size = layout([("input_ids", "int32", (task.num_tokens,)), ("last", "float32", (task.num_tokens, 4))])
    return SampleRef(
        sample_id=task.sample_id,
        generation=generation,
        num_tokens=task.num_tokens,
        loss_spans=task.loss_spans,
        store="local",
        key=f"{task.sample_id}/{generation}",
        num_bytes=size if num_bytes is None else num_bytes,
        features=features,
        target_revision="revision",
        capture_fingerprint="fingerprint",
        worker_id="w0",
    )


def read_counts(where: str | Path, name: str = "specforge") -> dict[str, int]:
    """The counts of a ledger, as another process reads them beside its writer."""
    store = SqlMetadataStore(where, name=name, read_only=True)
    try:
        return asdict(store.counts())
    finally:
        store.close()


class MetadataStoreSuite:
    """What a store promises whatever it is made of; ``make_store`` gives an empty one."""

    num_tasks = 6

    def make_store(self) -> MetadataStore:
        raise NotImplementedError

    @pytest.fixture
    def store(self) -> MetadataStore:
        store = self.make_store()
        store.register([make_task(i) for i in range(self.num_tasks)])
        return store

    def commit(self, store: MetadataStore, *indices: int) -> list[Attempt]:
        """Lease and commit samples."""
        generations = store.lease(indices, "w0")
        attempts = [Attempt(i, generation) for i, generation in zip(indices, generations, strict=True)]
        refs = [(i, make_ref(make_task(i), generation)) for i, generation in attempts]
        assert store.commit(refs) == [True] * len(refs)
        return attempts

    def train(self, store: MetadataStore, slot: int, index: int, step: int) -> Attempt:
        """The whole life of one slot up to its ack, features still live."""
        (attempt,) = self.commit(store, index)
        store.dispatch([Dispatch(slot, *attempt)])
        store.ack([slot], step)
        return attempt

    def index_at(self, slot: int) -> int:
        """The sample of a slot, in an order that is not shuffled."""
        return slot % self.num_tasks

    # The run

    def test_registering_again_changes_nothing(self, store: MetadataStore) -> None:
        store.register([make_task(i) for i in range(self.num_tasks)])
        store.register([make_task(i) for i in range(4, self.num_tasks + 2)])
        assert store.num_tasks() == self.num_tasks + 2
        if not store.keeps_history:
            assert list(store.tasks()) == []
            assert store.find("s3") is None
            return
        assert list(store.tasks()) == [make_task(i) for i in range(self.num_tasks + 2)]
        assert store.tasks_at([5, 0, 5]) == [make_task(5), make_task(0), make_task(5)]
        assert store.find("s3") == 3
        assert store.find("unknown") is None
        with pytest.raises(InvalidTransition, match="not registered"):
            store.tasks_at([0, self.num_tasks + 2])

    def test_many_prompts_are_registered_and_read_in_parts(self) -> None:
        store = self.make_store()
        tasks = [make_task(i, num_tokens=2) for i in range(2500)]
        store.register(tasks[:1200])
        store.register(tasks)
        assert store.num_tasks() == len(tasks)
        if store.keeps_history:
            assert list(store.tasks()) == tasks
            assert store.tasks_at(range(2499, -1, -1)) == tasks[::-1]

    def test_other_prompts_are_refused_and_change_nothing(self, store: MetadataStore) -> None:
        with pytest.raises(DataError, match="expected prompt index"):
            store.register([make_task(self.num_tasks + 1)])
        if store.keeps_history:
            with pytest.raises(DataError, match="differs from the one recorded"):
                store.register([make_task(self.num_tasks), replace(make_task(2), input_ids=(1, 2, 3))])
            with pytest.raises(DataError, match="used twice"):
                store.register([replace(make_task(self.num_tasks), sample_id="s0")])
        assert store.num_tasks() == self.num_tasks

    def test_another_sample_order_is_refused(self, store: MetadataStore) -> None:
        store.bind("seed=1")
        store.bind("seed=1")
        with pytest.raises(ConfigError, match=r"seed=1.*seed=2"):
            store.bind("seed=2")

    # Responses

    def test_a_response_is_recorded_once_and_the_first_one_stays(self, store: MetadataStore) -> None:
        assert store.record(2, [7, 8, 9]) == (7, 8, 9)
        assert store.record(2, [1]) == (7, 8, 9)
        assert store.record(0, ()) == ()
        assert store.record(0, [5]) == ()
        assert store.responses_at([0, 1, 2, 2]) == {0: (), 2: (7, 8, 9)}
        assert store.responses_at([]) == {}
        assert list(store.response_lengths()) == [(0, 0), (2, 3)]
        with pytest.raises(InvalidTransition, match="not registered"):
            store.record(self.num_tasks, [1])

    def test_responses_outlive_attempts_and_rewinds(self, store: MetadataStore) -> None:
        (attempt,) = [Attempt(1, generation) for generation in store.lease([1], "w0")]
        store.record(1, [4, 5])
        store.crash([attempt])
        self.train(store, 0, 0, step=1)
        store.record(0, [6])
        store.rewind(Position(0, 0), self.index_at, [])
        assert store.responses_at([0, 1]) == {0: (6,), 1: (4, 5)}
        assert store.sample(1).state is SampleState.PENDING

    def test_many_responses_are_read_in_parts(self) -> None:
        store = self.make_store()
        store.register([make_task(i, num_tokens=2) for i in range(2500)])

        def work() -> None:
            for index in range(2500):
                store.record(index, [index] * (index % 3))

        store.transact(work)
        assert list(store.response_lengths()) == [(index, index % 3) for index in range(2500)]
        assert store.responses_at(range(2500))[2498] == (2498,) * 2

    # Transactions

    def test_a_unit_of_work_gives_its_result_and_may_be_nested(self, store: MetadataStore) -> None:
        def inner() -> list[int]:
            return store.lease([1], "w0")

        def outer() -> list[int]:
            return store.lease([0], "w0") + store.transact(inner)

        assert store.transact(outer) == [1, 1]
        assert store.counts().num_leased == 2

    def test_a_unit_of_work_that_fails_leaves_a_durable_store_as_it_was(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)

        def work() -> None:
            store.dispatch([Dispatch(0, *attempt)])
            store.lease([1], "w0")
            store.ack([0, 1], 1)

        before = store.counts()
        with pytest.raises(InvalidTransition):
            store.transact(work)
        if store.durable:
            assert store.counts() == before
        assert store.slot_step(0) is None
        assert store.lease([2], "w0") == [1]

    def test_an_error_of_the_work_itself_is_raised_as_it_is(self, store: MetadataStore) -> None:
        def work() -> None:
            store.lease([0], "w0")
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            store.transact(work)
        if store.durable:
            assert store.sample(0).state is SampleState.PENDING

    def test_a_refusal_that_the_work_swallows_still_undoes_it_where_durable(self, store: MetadataStore) -> None:
        def work() -> None:
            store.lease([0], "w0")
            with contextlib.suppress(InvalidTransition):
                store.ack([0], 1)

        if store.durable:
            with pytest.raises(InvalidTransition):
                store.transact(work)
            assert store.sample(0).state is SampleState.PENDING
        else:
            store.transact(work)
            assert store.sample(0).state is SampleState.LEASED

    def test_threads_take_turns(self, store: MetadataStore) -> None:
        def life(index: int) -> None:
            for _ in range(5):
                (attempt,) = store.transact(lambda: self.commit(store, index))
                store.release([attempt])

        with ThreadPoolExecutor(self.num_tasks) as pool:
            list(pool.map(life, range(self.num_tasks)))
        assert [store.sample(i).generation for i in range(self.num_tasks)] == [5] * self.num_tasks

    # Attempts

    def test_generations_count_attempts_from_one_and_only_grow(self, store: MetadataStore) -> None:
        assert store.lease([0, 1], "w0") == [1, 1]
        store.requeue([Attempt(0, 1)])
        assert store.lease([0], "w1") == [2]
        assert store.fail(Attempt(0, 2), "odd prompt") == 1
        (attempt,) = self.commit(store, 0)
        assert attempt.generation == 3
        store.release([attempt])
        assert store.lease([0], "w0") == [4]
        store.rewind(Position(0, 0), self.index_at, [])
        store.requeue([Attempt(0, 4)])
        (attempt,) = self.commit(store, 0)
        store.lose([attempt])
        assert store.lease([0], "w0") == [6]

    def test_a_lease_needs_a_pending_or_released_sample_and_is_all_or_nothing(self, store: MetadataStore) -> None:
        store.lease([1], "w0")
        self.commit(store, 3)
        for wrong in ([0, 1], [0, 3], [2, 2], [0, self.num_tasks]):
            with pytest.raises(InvalidTransition):
                store.lease(wrong, "w1")
        assert store.lease([2, 0], "w1") == [1, 1]

    def test_only_the_live_attempt_ends_and_all_of_a_call_or_none(self, store: MetadataStore) -> None:
        store.lease([0, 1], "w0")
        self.commit(store, 2)
        for end in (store.requeue, store.crash):
            for wrong in (Attempt(1, 2), Attempt(2, 1), Attempt(3, 0), Attempt(0, 1)):
                with pytest.raises(InvalidTransition):
                    end([Attempt(0, 1), wrong])
        for wrong in (Attempt(1, 2), Attempt(2, 1), Attempt(3, 0)):
            with pytest.raises(InvalidTransition):
                store.fail(wrong, "late")
        assert [store.sample(i).state for i in range(2)] == [SampleState.LEASED] * 2
        assert (store.sample(0).num_crashes, store.sample(1).num_failures) == (0, 0)

    def test_late_commits_are_refused_and_repeated_ones_accepted(self, store: MetadataStore) -> None:
        store.lease([0, 1], "w0")
        store.requeue([Attempt(0, 1)])
        late, good, live = make_ref(make_task(0), 1), make_ref(make_task(1), 1), make_ref(make_task(0), 2)
        assert store.commit([(0, late)]) == [False]
        store.lease([0], "w1")
        assert store.commit([(0, late), (1, good)]) == [False, True]
        assert store.sample(0).state is SampleState.LEASED
        assert store.commit([(0, live), (1, good), (0, live)]) == [True, True, True]
        assert store.sample(0).ref == live
        assert store.commit([(2, make_ref(make_task(2), 1)), (2, make_ref(make_task(2), 0))]) == [False, False]
        store.release([Attempt(1, 1)])
        assert store.commit([(1, good)]) == [True]
        assert store.sample(1).state is SampleState.RELEASED
        store.lose([Attempt(0, 2)])
        assert store.commit([(0, live)]) == [False]

    def test_a_commit_of_an_unknown_sample_changes_nothing(self, store: MetadataStore) -> None:
        store.lease([0], "w0")
        with pytest.raises(InvalidTransition, match="not registered"):
            store.commit([(0, make_ref(make_task(0), 1)), (self.num_tasks, make_ref(make_task(9), 1))])
        assert store.sample(0).state is SampleState.LEASED

    def test_failures_count_and_keep_their_reason(self, store: MetadataStore) -> None:
        store.lease([0], "w0")
        assert store.fail(Attempt(0, 1), "first") == 1
        with pytest.raises(InvalidTransition):
            store.fail(Attempt(0, 1), "again")
        store.lease([0], "w0")
        assert store.fail(Attempt(0, 2), "second") == 2
        record = store.sample(0)
        assert (record.state, record.num_failures, record.reason) == (SampleState.PENDING, 2, "second")
        assert record.num_crashes == 0

    def test_crashes_count_apart_from_failures(self, store: MetadataStore) -> None:
        store.lease([2, 0], "w0")
        assert store.crash([Attempt(2, 1), Attempt(0, 1)]) == [1, 1]
        store.lease([2], "w1")
        assert store.crash([Attempt(2, 2)]) == [2]
        store.lease([2], "w1")
        store.requeue([Attempt(2, 3)])
        assert store.crashed(1) == {0: 1, 2: 2}
        assert store.crashed(2) == {2: 2}
        assert store.crashed(3) == {}
        assert store.sample(2).num_failures == 0
        (attempt,) = self.commit(store, 2)
        store.release([attempt])
        assert store.crashed(2) == {2: 2}
        store.quarantine(0, 4, "kills its worker")
        assert store.crashed(1) == {2: 2}

    def test_a_release_or_a_loss_needs_committed_features(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.lease([1], "w0")
        for end in (store.release, store.lose):
            for wrong in (Attempt(1, 1), Attempt(0, 2), Attempt(2, 0)):
                with pytest.raises(InvalidTransition):
                    end([attempt, wrong])
        assert store.sample(0).state is SampleState.COMMITTED
        store.release([attempt])
        for end in (store.release, store.lose):
            with pytest.raises(InvalidTransition):
                end([attempt])
        (attempt,) = self.commit(store, 0)
        store.lose([attempt])
        assert store.sample(0).state is SampleState.PENDING
        assert store.sample(0).ref is None

    def test_what_is_in_flight_is_known_with_its_worker_or_its_ref(self, store: MetadataStore) -> None:
        assert store.in_flight() == []
        store.lease([4, 1], "w7")
        (done,) = self.commit(store, 3)
        (gone,) = self.commit(store, 0)
        store.release([gone])
        assert store.in_flight() == [
            LiveAttempt(Attempt(1, 1), "w7", None),
            LiveAttempt(done, None, make_ref(make_task(3), 1)),
            LiveAttempt(Attempt(4, 1), "w7", None),
        ]

    # Quarantines

    def test_a_quarantined_sample_is_never_leased_again(self, store: MetadataStore) -> None:
        store.lease([0], "w0")
        with pytest.raises(InvalidTransition):
            store.quarantine(0, 7, "leased now")
        store.requeue([Attempt(0, 1)])
        store.quarantine(0, 7, "poison")
        for move in (lambda: store.lease([0], "w0"), lambda: store.quarantine(0, 9, "again")):
            with pytest.raises(InvalidTransition):
                move()
        store.rewind(Position(8, 2), self.index_at, [])
        assert store.quarantines() == [Quarantine(0, 7, None, "poison")]
        assert store.sample(0).state is SampleState.QUARANTINED
        assert store.sample(0).reason == "poison"
        assert store.counts().num_quarantined == 1

    def test_a_retried_sample_starts_over_and_its_skipped_slots_stay_skipped(self, store: MetadataStore) -> None:
        store.lease([0], "w0")
        store.fail(Attempt(0, 1), "odd")
        store.lease([0], "w0")
        store.crash([Attempt(0, 2)])
        with pytest.raises(InvalidTransition):
            store.retry(0, 9)
        store.quarantine(0, 6, "poison")
        store.retry(0, 12)
        with pytest.raises(InvalidTransition):
            store.retry(0, 12)
        record = store.sample(0)
        assert (record.state, record.num_failures, record.num_crashes) == (SampleState.PENDING, 0, 0)
        assert store.lease([0], "w0") == [3]
        assert store.quarantines() == [Quarantine(0, 6, 12, "poison")]
        store.requeue([Attempt(0, 3)])
        store.quarantine(0, 18, "again")
        store.quarantine(1, 7, "too")
        assert [(item.index, item.from_slot, item.to_slot) for item in store.quarantines()] == [
            (0, 6, 12),
            (1, 7, None),
            (0, 18, None),
        ]
        assert store.counts().num_quarantined == 2

    def test_a_quarantine_that_ends_before_it_began_skips_nothing(self, store: MetadataStore) -> None:
        store.quarantine(0, 6, "poison")
        store.retry(0, 3)
        (ended,) = store.quarantines()
        assert not any(ended.covers(slot) for slot in range(20))
        store.quarantine(0, 6, "again")
        assert store.quarantines() == [Quarantine(0, 6, None, "again")]

    # Slots

    def test_a_slot_is_dispatched_once_and_only_with_live_features(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.lease([2], "w0")
        for wrong in (Dispatch(1, 0, attempt.generation + 1), Dispatch(1, 1, 0), Dispatch(1, 2, 1)):
            with pytest.raises(InvalidTransition):
                store.dispatch([Dispatch(0, *attempt), wrong])
        with pytest.raises(InvalidTransition):
            store.dispatch([Dispatch(0, *attempt), Dispatch(0, *attempt)])
        assert store.slot_state(0) is SlotState.OPEN
        store.dispatch([Dispatch(0, *attempt), Dispatch(2**40, *attempt)])
        with pytest.raises(InvalidTransition):
            store.dispatch([Dispatch(0, *attempt)])
        assert store.slot_state(2**40) is SlotState.DISPATCHED
        assert store.counts().num_slots_dispatched == 2

    def test_a_slot_is_acked_once_with_a_step_and_only_after_its_dispatch(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.dispatch([Dispatch(0, *attempt), Dispatch(1, *attempt)])
        for slots, step in (([0, 2], 1), ([0, 0], 1), ([0], 0)):
            with pytest.raises(InvalidTransition):
                store.ack(slots, step)
        assert store.slot_state(0) is SlotState.DISPATCHED
        store.ack([0], 1)
        with pytest.raises(InvalidTransition):
            store.ack([1, 0], 2)
        assert store.slot_state(1) is SlotState.DISPATCHED
        assert store.counts().num_slots_trained == 1

    def test_a_checkpoint_makes_earlier_steps_durable(self, store: MetadataStore) -> None:
        for slot in range(3):
            self.train(store, slot, slot, step=slot + 1)
        store.checkpointed(2)
        store.checkpointed(1)
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_durable) == (3, 2)
        assert (counts.last_step, counts.durable_step) == (3, 2)
        if store.keeps_history:
            assert [store.slot_state(slot) for slot in range(3)] == [SlotState.DURABLE] * 2 + [SlotState.TRAINED]
            assert [store.slot_step(slot) for slot in range(4)] == [1, 2, 3, None]
        store.checkpointed(10)
        assert store.counts().num_slots_durable == 3

    def test_one_sample_serves_the_slots_of_several_epochs(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.dispatch([Dispatch(0, *attempt), Dispatch(self.num_tasks, *attempt)])
        store.ack([0], 1)
        store.ack([self.num_tasks], 2)
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_unique_samples_trained) == (2, 1)

    def test_trained_slots_are_found_and_the_first_that_is_not(self, store: MetadataStore) -> None:
        assert store.trained_from(0) == []
        assert store.first_untrained(self.index_at) == 0
        for slot in (0, 3, 1, 5):
            self.train(store, slot, slot, step=1)
        assert store.trained_from(0) == [0, 1, 3, 5]
        assert store.trained_from(1) == [1, 3, 5]
        assert store.trained_from(4) == [5]
        assert store.first_untrained(self.index_at) == 2
        store.quarantine(2, 2, "poison")
        assert store.first_untrained(self.index_at) == 4
        self.train(store, 4, 4, step=2)
        assert store.first_untrained(self.index_at) == 6
        store.retry(2, 8)
        assert store.trained_from(2) == [3, 4, 5]
        for slot in (6, 7):
            (attempt,) = [item.attempt for item in store.in_flight() if item.attempt.sample == slot - 6]
            store.dispatch([Dispatch(slot, *attempt)])
            store.ack([slot], 3)
        assert store.first_untrained(self.index_at) == 8

    def test_with_every_sample_quarantined_there_is_still_a_first_slot(self, store: MetadataStore) -> None:
        self.train(store, 0, 0, step=1)
        store.lose([Attempt(0, 1)])
        for index in range(self.num_tasks):
            store.quarantine(index, 1, "poison")
        assert store.first_untrained(self.index_at) == 2

    # Rewind

    def test_the_ledger_goes_back_to_an_earlier_checkpoint(self, store: MetadataStore) -> None:
        for slot in range(3):
            self.train(store, slot, slot, step=slot + 1)
        store.lease([3], "w0")
        (attempt,) = self.commit(store, 4)
        store.dispatch([Dispatch(4, *attempt)])
        in_flight = store.in_flight()
        store.rewind(Position(2, 2), self.index_at, [])
        assert [store.slot_state(slot) for slot in (2, 3, 4)] == [SlotState.OPEN] * 3
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_durable, counts.num_slots_dispatched) == (2, 2, 0)
        assert (counts.durable_step, counts.last_step, counts.num_unique_samples_trained) == (2, 2, 2)
        assert store.trained_from(0) == [0, 1]
        assert store.first_untrained(self.index_at) == 2
        assert store.in_flight() == in_flight
        store.dispatch([Dispatch(2, 2, 1), Dispatch(4, *attempt)])
        store.ack([2, 4], 3)
        assert store.counts().num_slots_trained == 4

    def test_the_ledger_goes_forward_to_a_later_checkpoint(self, store: MetadataStore) -> None:
        self.train(store, 0, 0, step=1)
        (attempt,) = self.commit(store, 1)
        store.dispatch([Dispatch(1, *attempt)])
        store.rewind(Position(4, 2), self.index_at, [])
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_durable, counts.num_unique_samples_trained) == (4, 4, 4)
        assert (counts.num_slots_dispatched, counts.durable_step) == (0, 2)
        assert store.trained_from(0) == [0, 1, 2, 3]
        if store.keeps_history:
            assert [store.slot_step(slot) for slot in range(5)] == [1, 2, 2, 2, None]

    def test_an_older_checkpoint_lowers_the_steps_of_what_it_covers(self, store: MetadataStore) -> None:
        for slot in range(3):
            self.train(store, slot, slot, step=slot + 1)
        store.checkpointed(3)
        store.rewind(Position(3, 2), self.index_at, [])
        assert (store.counts().last_step, store.counts().durable_step) == (2, 2)
        assert store.counts().num_slots_durable == 3

    def test_a_rewind_to_the_start_opens_every_slot(self, store: MetadataStore) -> None:
        for slot in range(3):
            self.train(store, slot, slot, step=1)
        store.checkpointed(1)
        store.rewind(Position(0, 0), self.index_at, [])
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_dispatched, counts.durable_step) == (0, 0, 0)
        assert counts.num_committed == 3

    def test_rewinding_leaves_out_the_slots_of_quarantined_samples(self, store: MetadataStore) -> None:
        store.quarantine(1, 1, "poison")
        store.retry(1, 8)
        store.quarantine(2, 8, "later")
        store.rewind(Position(15, 2), self.index_at, [])
        skipped = {1, 7, 8, 14}
        assert store.trained_from(0) == [slot for slot in range(15) if slot not in skipped]
        assert store.slot_state(1) is SlotState.OPEN
        assert store.first_untrained(self.index_at) == 15

    def test_the_quarantines_of_a_checkpoint_are_entered(self, store: MetadataStore) -> None:
        store.lease([1], "w0")
        self.commit(store, 2)
        store.quarantine(3, 3, "here")
        given = [
            Quarantine(0, 0, 6, "ended"),
            Quarantine(1, 1, None, "leased here"),
            Quarantine(2, 8, None, "committed here"),
            Quarantine(3, 3, None, "there"),
        ]
        store.rewind(Position(12, 3), self.index_at, given)
        assert store.quarantines() == [*given[:2], Quarantine(3, 3, None, "here"), given[2]]
        quarantined, pending = SampleState.QUARANTINED, SampleState.PENDING
        assert [store.sample(i).state for i in range(4)] == [pending, quarantined, quarantined, quarantined]
        assert store.sample(1).reason == "leased here"
        assert store.in_flight() == []
        assert store.trained_from(0) == [slot for slot in range(12) if slot not in {0, 1, 3, 7, 8, 9}]
        store.rewind(Position(12, 3), self.index_at, given)
        assert store.counts().num_quarantined == 3
        store.retry(1, 13)
        assert store.lease([1, 0], "w0") == [2, 1]

    def test_a_sample_has_one_open_quarantine_whatever_the_checkpoint_says(self, store: MetadataStore) -> None:
        store.quarantine(0, 6, "here")
        store.quarantine(1, 7, "here")
        store.rewind(Position(0, 0), self.index_at, [Quarantine(0, 0, None, "there"), Quarantine(1, 13, None, "there")])
        assert store.quarantines() == [
            Quarantine(0, 0, 6, "there"),
            Quarantine(0, 6, None, "here"),
            Quarantine(1, 7, None, "here"),
        ]

    def test_in_arrival_order_a_checkpoint_covers_what_was_acked_by_then(self, store: MetadataStore) -> None:
        for slot, step in ((3, 1), (0, 1), (4, 2), (1, 3)):
            self.train(store, slot, slot, step)
        (attempt,) = self.commit(store, 5)
        store.dispatch([Dispatch(5, *attempt)])
        if not store.keeps_history:
            with pytest.raises(DataError, match="arrival order"):
                store.rewind(Position(3, 2, prefix=False), self.index_at, [])
            store.rewind(Position(0, 0, prefix=False), self.index_at, [])
            assert store.trained_from(0) == []
            return
        before = store.counts()
        with pytest.raises(DataError, match="the ledger knows 3"):
            store.rewind(Position(4, 2, prefix=False), self.index_at, [Quarantine(2, 2, None, "poison")])
        assert store.counts() == before
        store.rewind(Position(3, 2, prefix=False), self.index_at, [Quarantine(2, 2, None, "poison")])
        assert store.trained_from(0) == [0, 3, 4]
        assert [store.slot_state(slot) for slot in (1, 5)] == [SlotState.OPEN] * 2
        assert store.slot_state(3) is SlotState.DURABLE
        assert store.first_untrained(self.index_at) == 1
        assert (store.counts().num_slots_durable, store.counts().durable_step) == (3, 2)
        store.dispatch([Dispatch(1, 1, 1), Dispatch(5, *attempt)])

    # All of it

    def test_empty_batches_change_nothing(self, store: MetadataStore) -> None:
        before = store.counts()
        assert store.lease([], "w0") == []
        assert store.commit([]) == []
        assert store.crash([]) == []
        assert store.transact(lambda: None) is None
        store.register([])
        for end in (store.requeue, store.release, store.lose):
            end([])
        store.dispatch([])
        store.ack([], 1)
        assert store.counts() == before

    @pytest.mark.parametrize("seed", range(3))
    def test_any_history_of_moves_only_grows_and_is_that_of_the_store_in_memory(
        self, store: MetadataStore, seed: int
    ) -> None:
        """Random moves, most of them illegal: both stores refuse the same ones, and say the same of every sample."""
        model = InMemoryMetadataStore()
        model.register([make_task(i) for i in range(self.num_tasks)])
        rng, generations = random.Random(seed), [0] * self.num_tasks  # noqa: S311
        num_done = 0
        for number in range(150):
            move = _random_move(rng, number, generations)
            outcome = _try(model, move)
            assert _try(store, move) == outcome, number
            num_done += not isinstance(outcome, type)
            records = [store.sample(i) for i in range(self.num_tasks)]
            assert records == [model.sample(i) for i in range(self.num_tasks)], number
            assert all(old <= new.generation for old, new in zip(generations, records, strict=True))
            generations = [record.generation for record in records]
        assert num_done > 30
        assert store.quarantines() == model.quarantines()
        assert store.in_flight() == model.in_flight()
        assert store.crashed(1) == model.crashed(1)
        assert store.trained_from(0) == model.trained_from(0)
        assert store.first_untrained(self.index_at) == model.first_untrained(self.index_at)
        assert store.counts() == model.counts()


def _random_move(rng: random.Random, number: int, generations: list[int]) -> Callable[[MetadataStore], object]:
    """Mostly of the last attempt of one sample, sometimes of an older one."""
    index = rng.randrange(len(generations))
    attempt = Attempt(index, generations[index] - (rng.random() < 0.1))
    slot = rng.randrange(40) * len(generations) + index
    moves: list[Callable[[MetadataStore], object]] = [
        lambda store: store.lease([index], f"w{number}"),
        lambda store: store.commit([(index, make_ref(make_task(index), attempt.generation))]),
        lambda store: store.transact(lambda: store.dispatch([Dispatch(slot, *attempt)])),
        lambda store: store.transact(lambda: store.ack([slot], number + 1)),
        lambda store: store.release([attempt]),
        lambda store: store.requeue([attempt]),
        lambda store: store.crash([attempt]),
        lambda store: store.fail(attempt, f"reason {number}"),
        lambda store: store.lose([attempt]),
        lambda store: store.quarantine(index, 6 * number + index, f"reason {number}"),
        lambda store: store.retry(index, 6 * number + index),
        lambda store: store.checkpointed(number),
    ]
    return rng.choices(moves, weights=[9, 9, 6, 6, 3, 1, 1, 1, 1, 1, 3, 1])[0]


def _try(store: MetadataStore, move: Callable[[MetadataStore], object]) -> object:
    """What the move answered, or the type of its refusal."""
    try:
        return move(store)
    except InvalidTransition as error:
        return type(error)
