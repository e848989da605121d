"""RetainingFeatureStore: the contract, with everything put aside or nothing; and what is read is what was captured."""

import pytest
import torch

from specforge.data_plane.base import PutRequest
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.retention import RetainingFeatureStore
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.data_plane.shared_memory import SharedMemoryFeatureStore
from specforge.errors import FeatureNotFound
from specforge.testing.feature_store import FeatureStoreSuite, assert_same_bits, filled, make_ref, put_one

SIZE = 4096


class TestNothingPutAside(FeatureStoreSuite):
    def make_store(self, capacity_bytes):
        return RetainingFeatureStore(LocalFeatureStore(capacity_bytes), [LocalFeatureStore(10 * SIZE)])


@pytest.fixture
def arena(tmp_path):
    store = SharedMemoryFeatureStore.create("retention", 1 << 20, directory=tmp_path)
    yield store
    store.close()


def make_spill(tmp_path, capacity_bytes=4 * SIZE):
    return SharedDirFeatureStore(tmp_path / "retained", "run", capacity_bytes)


@pytest.fixture
def spill(tmp_path):
    store = make_spill(tmp_path)
    yield store
    store.close()


@pytest.fixture
def store(arena, spill):
    store = RetainingFeatureStore(arena, [LocalFeatureStore(2 * SIZE), spill])
    yield store
    store.close()


def read(store, ref):
    [(tensors, handle)] = store.get([ref])
    copy = {name: tensor.clone() for name, tensor in tensors.items()}
    store.release([handle])
    return copy


def test_memory_first_then_files_then_no_room(store, arena, spill):
    refs = [put_one(store, f"s{index}", filled(SIZE, index)) for index in range(8)]
    assert store.retain(refs) == [True] * 2 + [True] * 4 + [False] * 2
    assert spill.health().num_samples == 4
    assert arena.health().num_samples == 2
    for index, ref in enumerate(refs):
        assert_same_bits(read(store, ref), filled(SIZE, index))
    assert store.retained(refs) == [True] * 6 + [False] * 2
    assert store.live(refs) == [True] * 8
    # Repeating it changes nothing.
    assert store.retain(refs[:6]) == [True] * 6
    # A place that was given up is used again.
    store.abort([("s0", 1), ("s5", 1)])
    assert store.live(refs) == [False] + [True] * 4 + [False] + [True] * 2
    assert store.retain(refs[6:]) == [True] * 2
    assert arena.health().live_bytes == 0


def test_one_get_reads_from_every_place_in_the_order_asked(store):
    refs = [put_one(store, f"s{index}", filled(SIZE, index)) for index in range(6)]
    assert store.retain(refs[1:5]) == [True] * 4
    order = [5, 2, 4, 0, 1, 3, 2]
    lent = store.get([refs[index] for index in order])
    for index, (tensors, _) in zip(order, lent, strict=True):
        assert_same_bits(tensors, filled(SIZE, index))
    assert len({handle.token for _, handle in lent}) == len(order)
    store.release([handle for _, handle in lent])
    store.release([handle for _, handle in lent])
    assert store.health().num_handles == 0


def test_a_get_that_fails_in_one_place_keeps_no_handle(store, arena):
    kept, gone = (put_one(store, name, filled(SIZE, 1)) for name in "ab")
    inner = put_one(store, "c", filled(SIZE, 1))
    store.retain([kept])
    store.abort([("b", 1)])
    with pytest.raises(FeatureNotFound, match="'b'"):
        store.get([kept, inner, gone])
    assert arena.health().num_handles == 0


def test_features_under_a_handle_stay_as_they_are_when_they_are_put_aside(store):
    ref = put_one(store, "a", filled(SIZE, 7))
    [(tensors, handle)] = store.get([ref])
    assert store.retain([ref]) == [True]
    put_one(store, "b", filled(SIZE, 8))
    assert_same_bits(tensors, filled(SIZE, 7))
    store.release([handle])
    assert_same_bits(read(store, ref), filled(SIZE, 7))


def test_tensors_of_one_process_are_put_aside_without_a_copy():
    inner = LocalFeatureStore()
    store = RetainingFeatureStore(inner, [LocalFeatureStore(SIZE)], by_reference=True)
    tensor = torch.ones(SIZE, dtype=torch.uint8)
    [stored] = store.put([PutRequest("a", 1, {"x": tensor})])
    ref = make_ref("a", 1, stored)
    assert store.retain([ref]) == [True]
    [(tensors, handle)] = store.get([ref])
    assert tensors["x"].data_ptr() == tensor.data_ptr()
    store.release([handle])
    assert inner.stored() == []


def test_what_is_gone_is_not_put_aside(store):
    ref = put_one(store, "a", filled(SIZE, 1))
    store.abort([("a", 1)])
    assert store.retain([ref]) == [False]
    assert store.retained([ref]) == [False]


def test_files_outlive_the_process_and_orphans_among_them_are_listed(tmp_path, arena):
    first = RetainingFeatureStore(arena, [make_spill(tmp_path)])
    refs = [put_one(first, f"s{index}", filled(SIZE, index)) for index in range(3)]
    assert first.retain(refs) == [True] * 3
    spill = make_spill(tmp_path, 3 * SIZE + 1000)
    spill.adopt()
    second = RetainingFeatureStore(LocalFeatureStore(), [spill])
    assert second.retained(refs[:2]) == second.live(refs[:2]) == [True, True]
    assert second.stored() == [("s2", 1)]
    assert_same_bits(read(second, refs[1]), filled(SIZE, 1))
    # What an earlier process put aside counts.
    more = put_one(second, "more", filled(SIZE, 9))
    assert second.retain([more]) == [False]
    second.abort([("s2", 1)])
    assert second.retain([more]) == [True]
    assert sorted(spill.stored()) == [("more", 1), ("s0", 1), ("s1", 1)]


def test_a_directory_that_cannot_be_written_costs_captures_and_nothing_else(tmp_path, arena, caplog):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    store = RetainingFeatureStore(arena, [SharedDirFeatureStore(blocked, "run")])
    refs = [put_one(store, name, filled(SIZE, 3)) for name in "ab"]
    assert store.retain(refs) == [False, False]
    assert caplog.text.count("not kept in shared_dir any more") == 1
    assert_same_bits(read(store, refs[0]), filled(SIZE, 3))


def test_a_sample_that_lies_in_both_places_after_a_kill_is_freed_in_the_store(tmp_path, arena):
    ref = put_one(arena, "a", filled(SIZE, 4))
    put_one(make_spill(tmp_path), "a", filled(SIZE, 4))
    store = RetainingFeatureStore(arena, [make_spill(tmp_path)])
    assert store.retained([ref]) == [True]
    assert arena.health().num_samples == 0
    assert_same_bits(read(store, ref), filled(SIZE, 4))
