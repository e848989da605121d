"""Features that are put aside between epochs: the target runs again only for what did not fit."""

import pytest
from controlled_run import NUM_SAMPLES, Run

from specforge.control_plane.metadata.base import Position
from specforge.control_plane.metadata.memory import InMemoryMetadataStore
from specforge.control_plane.metadata.noop import NoOpMetadataStore
from specforge.testing.features import NamedFeatures

EPOCHS = 3


@pytest.fixture(params=[InMemoryMetadataStore, NoOpMetadataStore])
def store(request):
    return request.param()


def run_with_room(store, room, **settings):
    return Run(store, epochs=EPOCHS, features=NamedFeatures(room), retain=True, **settings)


@pytest.mark.parametrize("room", [0, 2, NUM_SAMPLES])
@pytest.mark.parametrize("release", ["at_step", "at_checkpoint"])
def test_only_what_did_not_fit_is_captured_again(store, room, release):
    run = run_with_room(store, room, release=release)
    trained, step = [], 0
    while not run.reader.ended:
        run.commit(run.lease(3))
        while refs := run.poll(2):
            step += 1
            run.train(refs, step)
            trained += run.numbers(refs)
            run.controller.checkpointed(step)
    assert trained == list(range(NUM_SAMPLES * EPOCHS))
    num_commits = run.controller.summary()["num_commits"]
    # A slot of the next epoch that opens before its sample was trained shares its features: fewer captures still.
    assert num_commits <= NUM_SAMPLES + (NUM_SAMPLES - room) * (EPOCHS - 1)
    assert num_commits == NUM_SAMPLES if room == NUM_SAMPLES else num_commits > NUM_SAMPLES
    assert run.features.stored() == []
    assert run.controller.summary()["num_retained"] == run.controller.summary()["resident_bytes"] == 0


def test_what_is_put_aside_uses_no_credit(store):
    run = run_with_room(store, NUM_SAMPLES, max_resident_bytes=1, bytes_per_token=1)
    assert run.run_to_end() == list(range(NUM_SAMPLES * EPOCHS))
    assert run.controller.summary()["num_commits"] == NUM_SAMPLES


def test_a_restarted_run_finds_what_was_put_aside_and_captures_what_was_lost():
    store = InMemoryMetadataStore()
    first = run_with_room(store, NUM_SAMPLES)
    step = 0
    while step < 3:
        first.commit(first.lease(2))
        step += 1
        first.train(first.poll(2), step)
    first.controller.checkpointed(step)
    put_aside = first.controller.summary()["num_retained"]
    assert put_aside > 0
    lost = first.features.stored()[0]
    first.features.abort([lost])
    second = Run(store, epochs=EPOCHS, features=first.features, retain=True)
    second.controller.resume(Position(6, step))
    assert second.controller.summary()["num_retained"] + second.controller.summary()["num_resident"] >= put_aside - 1
    assert second.run_to_end(step + 1) == list(range(6, NUM_SAMPLES * EPOCHS))
    assert 1 <= second.controller.summary()["num_commits"] <= 2


def test_the_end_of_a_run_frees_what_was_put_aside(store):
    run = run_with_room(store, NUM_SAMPLES)
    run.commit(run.lease(2))
    run.train(run.poll(2), 1)
    assert run.features.stored() != []
    run.controller.finish()
    assert run.features.stored() == []


def test_what_was_put_aside_and_no_slot_wants_is_freed_at_a_restart():
    """Killed between the checkpoint of a sample's last slot and the news of it."""

    class ClaimedAtOnce(NamedFeatures):
        def stored(self):
            return []  # what was asked for with a ref is not listed any more

    store = InMemoryMetadataStore()
    features = ClaimedAtOnce(NUM_SAMPLES)
    run = Run(store, epochs=1, features=features, retain=True, release="at_checkpoint", window_slots=6)
    run.commit(run.lease(6))
    run.train(run.poll(2), 1)
    features.retain([ref.ref for ref in run.poll(100)])
    first = list(features._pairs)
    features.put(first)
    features._put_aside |= set(first)
    again = Run(store, epochs=1, features=features, retain=True, release="at_checkpoint", window_slots=6)
    again.controller.resume(Position(2, 1))
    trained = {f"s{index}" for index in again.indices([0, 1])}
    assert not {sample_id for sample_id, _ in features._pairs} & trained
