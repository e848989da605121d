"""Very many lives through one arena; what is refused when it is nearly full; aborts that race with other processes."""

import random
import tempfile
from pathlib import Path

import arena_cycles
import pytest

from specforge.data_plane import arena_reader
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore
from specforge.errors import FeatureStoreFull
from specforge.testing.feature_store import filled, put_one

RUN = "run"
CAPACITY = 1 << 20
LARGEST = CAPACITY // 64


@pytest.fixture
def directory():
    """A directory of this test's own in shared memory, which the test must leave empty."""
    with tempfile.TemporaryDirectory(prefix="specforge-test-", dir=SHARED_MEMORY) as name:
        yield Path(name)
        assert list(Path(name).iterdir()) == []


@pytest.fixture
def attach(directory):
    return lambda: SharedMemoryFeatureStore.attach(RUN, directory)


def test_lives_through_an_arena_that_is_three_quarters_full_leave_nothing_behind():
    report = arena_cycles.cycles(12_000, seed=1)
    assert report["moves"] > 0
    assert 70 < report["fullest_percent"] <= 75


@pytest.mark.full
@pytest.mark.timeout(900)
def test_very_many_lives_are_not_refused_and_memory_stays_flat():
    report = arena_cycles.cycles(160_000, seed=2)
    assert report["moves"] > 0
    assert {"writer_rss_growth_mb", "reader_rss_growth_mb"} < set(report)


def test_what_a_nearly_full_arena_refuses_fits_after_frees(directory, attach):
    store = SharedMemoryFeatureStore.create(RUN, CAPACITY, directory=directory)
    reader, numbers = attach(), random.Random(1)
    held, live, refused, index = {}, {}, [], 0
    for _ in range(2_000):
        name, size = f"s{index}", 64 * numbers.randint(1, LARGEST // 64)
        index += 1
        while sum(live.values()) + size > 0.95 * CAPACITY:
            victim = numbers.choice(list(live))
            store.abort([(victim, 1)])
            store.release(held.pop(victim, []))
            del live[victim]
        try:
            ref = put_one(store, name, filled(size, index))
        except FeatureStoreFull:
            refused.append((name, size))
            continue
        live[name] = size
        # Every third is held by a reader, so it cannot be moved out of the way.
        if index % 3 == 0:
            held[name] = [handle for _, handle in store.get([ref])]
    assert len(refused) > 10
    for name in list(live)[: len(live) // 2]:
        store.abort([(name, 1)])
        store.release(held.pop(name, []))
    for name, size in refused:
        # The name of a put that was refused is free: nothing of it was stored.
        [(tensors, handle)] = reader.get([put_one(store, name, filled(size, 7))])
        assert bool((tensors["x"] == 7).all())
        store.abort([(name, 1)])
        reader.release([handle])
    reader.close()
    store.close()


@pytest.mark.parametrize("moment", ["when it has found the entry", "when it has read the serial", "before it compares"])
def test_abort_does_not_hit_the_sample_that_takes_over_the_entry_meanwhile(directory, attach, monkeypatch, moment):
    store = SharedMemoryFeatureStore.create(RUN, CAPACITY, 1, directory)
    reader, other = attach(), attach()
    first = put_one(store, "first", filled(64, 1))
    assert reader.live([first]) == [True]
    taken = []

    def take_over(*_):
        # The only entry of the arena is freed and used again by another sample, once.
        if not taken:
            taken.append(True)
            store.abort([("first", 1)])
            taken.append(put_one(store, "second", filled(64, 2)))

    [lane] = reader._readers.values()
    fence, calls = lane.arena.fence, []
    if moment == "when it has found the entry":
        flatnonzero = arena_reader.np.flatnonzero

        def found(values):
            result = flatnonzero(values)
            take_over()
            return result

        monkeypatch.setattr(arena_reader.np, "flatnonzero", found)
    else:

        def fenced():
            fence()
            calls.append(moment)
            if len(calls) == (1 if moment == "when it has read the serial" else 2):
                take_over()

        monkeypatch.setattr(lane.arena, "fence", fenced)
    reader.abort([("first", 1)])
    monkeypatch.undo()
    [_, second] = taken
    store.gc()
    assert other.live([first, second]) == [False, True]
    for one in (reader, other, store):
        one.close()
