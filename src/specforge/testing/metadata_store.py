"""Conformance suite of ``MetadataStore``: inherit, give ``make_store``, and the store is done when all of it passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specforge.contracts.features import layout
from specforge.contracts.refs import SampleRef
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import Attempt, Dispatch, MetadataStore, SampleState, SlotState
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


class MetadataStoreSuite:
    """``keeps_history`` False: the store forgets what is done (``NoOpMetadataStore``)."""

    keeps_history = True
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

    def test_registering_again_changes_nothing(self, store: MetadataStore) -> None:
        store.register([make_task(i) for i in range(self.num_tasks)])
        store.register([make_task(i) for i in range(4, self.num_tasks + 2)])
        assert store.num_tasks() == self.num_tasks + 2
        if self.keeps_history:
            assert list(store.tasks()) == [make_task(i) for i in range(self.num_tasks + 2)]
            assert store.find("s3") == 3
            assert store.find("unknown") is None

    def test_other_prompts_are_refused_and_change_nothing(self, store: MetadataStore) -> None:
        with pytest.raises(DataError, match="expected prompt index"):
            store.register([make_task(self.num_tasks + 1)])
        if self.keeps_history:
            with pytest.raises(DataError, match="differs from the one recorded"):
                store.register([replace(make_task(2), input_ids=(1, 2, 3))])
            with pytest.raises(DataError, match="used twice"):
                store.register([replace(make_task(self.num_tasks), sample_id="s0")])
        assert store.num_tasks() == self.num_tasks

    def test_another_sample_order_is_refused(self, store: MetadataStore) -> None:
        store.bind("seed=1")
        store.bind("seed=1")
        with pytest.raises(ConfigError, match=r"seed=1.*seed=2"):
            store.bind("seed=2")

    def test_generations_count_attempts_from_one_and_only_grow(self, store: MetadataStore) -> None:
        assert store.lease([0, 1], "w0") == [1, 1]
        store.requeue([Attempt(0, 1)])
        assert store.lease([0], "w1") == [2]
        assert store.fail(Attempt(0, 2), "odd prompt") == 1
        (attempt,) = self.commit(store, 0)
        assert attempt.generation == 3
        store.release([attempt])
        assert store.lease([0], "w0") == [4]
        store.rewind(0, 0, lambda slot: slot)
        assert store.lease([0], "w0") == [5]

    def test_a_lease_needs_a_pending_or_released_sample_and_is_all_or_nothing(self, store: MetadataStore) -> None:
        store.lease([1], "w0")
        with pytest.raises(InvalidTransition):
            store.lease([0, 1], "w1")
        with pytest.raises(InvalidTransition):
            store.lease([2, 2], "w1")
        with pytest.raises(InvalidTransition):
            store.lease([self.num_tasks], "w1")
        assert store.lease([0, 2], "w1") == [1, 1]

    def test_late_commits_are_refused_and_repeated_ones_accepted(self, store: MetadataStore) -> None:
        store.lease([0, 1], "w0")
        store.requeue([Attempt(0, 1)])
        store.lease([0], "w1")
        late, good, live = make_ref(make_task(0), 1), make_ref(make_task(1), 1), make_ref(make_task(0), 2)
        assert store.commit([(0, late), (1, good)]) == [False, True]
        assert store.sample(0).state is SampleState.LEASED
        assert store.commit([(0, live), (1, good)]) == [True, True]
        assert store.sample(0).ref == live
        assert store.commit([(2, make_ref(make_task(2), 1))]) == [False]

    def test_failures_count_and_keep_their_reason(self, store: MetadataStore) -> None:
        store.lease([0], "w0")
        assert store.fail(Attempt(0, 1), "first") == 1
        with pytest.raises(InvalidTransition):
            store.fail(Attempt(0, 1), "again")
        store.lease([0], "w0")
        assert store.fail(Attempt(0, 2), "second") == 2
        record = store.sample(0)
        assert (record.state, record.num_failures, record.reason) == (SampleState.PENDING, 2, "second")

    def test_a_quarantined_sample_is_never_leased_again(self, store: MetadataStore) -> None:
        store.lease([0], "w0")
        with pytest.raises(InvalidTransition):
            store.quarantine(0, 7, "leased now")
        store.requeue([Attempt(0, 1)])
        store.quarantine(0, 7, "poison")
        with pytest.raises(InvalidTransition):
            store.lease([0], "w0")
        store.rewind(0, 0, lambda slot: slot)
        assert store.quarantined() == {0: 7}
        assert store.sample(0).reason == "poison"

    def test_a_slot_is_dispatched_once_and_only_with_live_features(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        for wrong in (Dispatch(1, 0, attempt.generation + 1), Dispatch(1, 1, 0)):
            with pytest.raises(InvalidTransition):
                store.dispatch([Dispatch(0, *attempt), wrong])
        assert store.slot_state(0) is SlotState.OPEN
        store.dispatch([Dispatch(0, *attempt), Dispatch(9, *attempt)])
        with pytest.raises(InvalidTransition):
            store.dispatch([Dispatch(0, *attempt)])
        assert store.counts().num_slots_dispatched == 2

    def test_a_slot_is_acked_once_with_a_step_and_only_after_its_dispatch(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.dispatch([Dispatch(0, *attempt), Dispatch(1, *attempt)])
        with pytest.raises(InvalidTransition):
            store.ack([0, 2], 1)
        with pytest.raises(InvalidTransition):
            store.ack([0, 0], 1)
        with pytest.raises(InvalidTransition):
            store.ack([0], 0)
        assert store.slot_state(0) is SlotState.DISPATCHED
        store.ack([0], 1)
        with pytest.raises(InvalidTransition):
            store.ack([1, 0], 2)
        assert store.slot_state(1) is SlotState.DISPATCHED
        assert store.counts().num_slots_trained == 1

    def test_a_release_needs_committed_features(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.lease([1], "w0")
        with pytest.raises(InvalidTransition):
            store.release([attempt, Attempt(1, 1)])
        assert store.sample(0).state is SampleState.COMMITTED
        store.release([attempt])
        with pytest.raises(InvalidTransition):
            store.release([attempt])

    def test_a_checkpoint_makes_earlier_steps_durable(self, store: MetadataStore) -> None:
        for slot in range(3):
            self.train(store, slot, slot, step=slot + 1)
        store.checkpointed(2)
        store.checkpointed(1)
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_durable) == (3, 2)
        assert (counts.last_step, counts.durable_step) == (3, 2)
        if self.keeps_history:
            assert [store.slot_state(slot) for slot in range(3)] == [SlotState.DURABLE] * 2 + [SlotState.TRAINED]

    def test_the_ledger_goes_back_to_an_earlier_checkpoint(self, store: MetadataStore) -> None:
        for slot in range(3):
            self.train(store, slot, slot, step=slot + 1)
        store.lease([3], "w0")
        store.rewind(2, 2, lambda slot: slot)
        assert [store.slot_state(slot) for slot in (2, 3)] == [SlotState.OPEN] * 2
        assert store.sample(3).state is SampleState.PENDING
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_durable, counts.num_slots_dispatched) == (2, 2, 0)
        assert (counts.num_leased, counts.num_committed, counts.num_unique_samples_trained) == (0, 0, 2)
        assert self.train(store, 2, 2, step=3).generation == 2
        assert store.counts().num_slots_trained == 3

    def test_the_ledger_goes_forward_to_a_later_checkpoint(self, store: MetadataStore) -> None:
        self.train(store, 0, 0, step=1)
        (attempt,) = self.commit(store, 1)
        store.dispatch([Dispatch(1, *attempt)])
        store.rewind(4, 2, lambda slot: slot)
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_slots_durable, counts.num_unique_samples_trained) == (4, 4, 4)
        assert counts.num_slots_dispatched == 0
        if self.keeps_history:
            assert [store.slot_step(slot) for slot in range(5)] == [1, 2, 2, 2, None]

    def test_rewinding_leaves_out_the_slots_of_quarantined_samples(self, store: MetadataStore) -> None:
        store.quarantine(1, 1, "poison")
        store.rewind(3, 2, lambda slot: slot)
        assert store.counts().num_slots_trained == 2
        assert store.slot_state(1) is SlotState.OPEN

    def test_one_sample_serves_the_slots_of_several_epochs(self, store: MetadataStore) -> None:
        (attempt,) = self.commit(store, 0)
        store.dispatch([Dispatch(0, *attempt), Dispatch(self.num_tasks, *attempt)])
        store.ack([0], 1)
        store.ack([self.num_tasks], 2)
        counts = store.counts()
        assert (counts.num_slots_trained, counts.num_unique_samples_trained) == (2, 1)

    def test_empty_batches_change_nothing(self, store: MetadataStore) -> None:
        before = store.counts()
        assert store.lease([], "w0") == []
        assert store.commit([]) == []
        store.requeue([])
        store.release([])
        store.dispatch([])
        store.ack([], 1)
        assert store.counts() == before
