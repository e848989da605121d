import stat
import uuid

import pytest
import torch

from specforge.data_plane.arena import NUM_LANES, Arena
from specforge.data_plane.base import FeatureStore
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore, collect_orphans
from specforge.errors import ConfigError, FeatureNotFound, FeatureStoreError, FeatureStoreFull
from specforge.testing.feature_store import CAPACITY, LARGEST, FeatureStoreSuite, assert_same_bits, filled, put_one


@pytest.fixture
def run_id():
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    yield run_id
    assert list(SHARED_MEMORY.glob(f"*{run_id}*")) == []


@pytest.fixture
def store(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY, max_samples=64)
    yield store
    store.close()


class TestSharedMemoryFeatureStore(FeatureStoreSuite):
    @pytest.fixture(autouse=True)
    def _run(self, run_id):
        self.run_id = run_id

    def make_store(self, capacity_bytes: int) -> FeatureStore:
        return SharedMemoryFeatureStore.create(self.run_id, capacity_bytes, max_samples=2048)

    def make_reader(self, store: FeatureStore) -> FeatureStore:
        return SharedMemoryFeatureStore.attach(self.run_id)


def test_get_is_a_view_of_the_arena_aligned_for_kernels(run_id, store):
    reader = SharedMemoryFeatureStore.attach(run_id)
    ref = put_one(store, "a", {"x": torch.ones(3), "y": torch.ones(3)})
    [(first, _)], [(second, _)] = reader.get([ref]), reader.get([ref])
    assert first["x"].data_ptr() == second["x"].data_ptr()
    assert first["x"].untyped_storage().data_ptr() == first["y"].untyped_storage().data_ptr()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in first.values())
    reader.close()


def test_tensors_outlive_the_store_and_its_file(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    reader = SharedMemoryFeatureStore.attach(run_id)
    [(tensors, _)] = reader.get([put_one(store, "a", filled(1000, 3))])
    store.close()
    reader.close()
    del store, reader
    assert_same_bits(tensors, filled(1000, 3))


def test_mapped_reader_reads_on_after_the_writer_left_and_others_find_nothing(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    reader, late = (SharedMemoryFeatureStore.attach(run_id) for _ in range(2))
    first, second = (put_one(store, name, filled(64, 1)) for name in "ab")
    reader.get([first])
    store.close()
    reader.get([second])
    with pytest.raises(FeatureNotFound, match="'b'"):
        late.get([second])
    reader.close()
    late.close()


def test_arena_is_private_and_its_pages_are_reserved(run_id, store):
    [path] = [path for path in SHARED_MEMORY.iterdir() if run_id in path.name and ".lane-" not in path.name]
    facts = path.stat()
    assert stat.S_IMODE(facts.st_mode) == 0o600
    assert facts.st_blocks * 512 >= facts.st_size >= CAPACITY


def test_too_little_shared_memory_is_said_with_the_fix(run_id):
    with pytest.raises(ConfigError, match=r"has [\d,]+ free: lower the store's capacity"):
        SharedMemoryFeatureStore.create(run_id, 1 << 50)


@pytest.mark.parametrize("capacity_bytes", [0, 4000])
def test_arena_without_room_for_a_sample_is_refused(run_id, capacity_bytes):
    with pytest.raises(ConfigError, match="at least 4096 bytes"):
        SharedMemoryFeatureStore.create(run_id, capacity_bytes)


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "x" * 65])
def test_run_id_that_is_no_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="run id"):
        SharedMemoryFeatureStore.attach(name)


def test_reader_cannot_put(run_id):
    reader = SharedMemoryFeatureStore.attach(run_id)
    with pytest.raises(FeatureStoreError, match="only a writer"):
        put_one(reader, "a", filled(64, 1))
    reader.close()


def test_more_samples_than_entries_is_back_pressure(run_id, store):
    reader = SharedMemoryFeatureStore.attach(run_id)
    for index in range(64):
        put_one(store, str(index), filled(64, index))
    with pytest.raises(FeatureStoreFull, match="64 of 64 samples"):
        put_one(store, "more", filled(64, 1))
    reader.abort([("7", 1)])
    put_one(store, "more", filled(64, 1))
    reader.close()


def test_compaction_opens_a_gap_and_leaves_every_sample_whole(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY, max_samples=512)
    reader = SharedMemoryFeatureStore.attach(run_id)
    size = LARGEST // 4
    refs = {index: put_one(store, f"s{index}", filled(size, index)) for index in range(256)}
    lent = reader.get([refs[index] for index in range(1, 256, 64)])
    # Every other buffer goes: half the arena is free, in gaps of a quarter of the largest sample.
    store.abort([(f"s{index}", 1) for index in range(0, 256, 2)])
    for index in range(1000, 1016):
        refs[index] = put_one(store, f"s{index}", filled(LARGEST, index))
    for tensors, value in zip((tensors for tensors, _ in lent), range(1, 256, 64), strict=True):
        assert_same_bits(tensors, filled(size, value))
    for index, ref in refs.items():
        if index >= 1000 or index % 2:
            [(tensors, handle)] = reader.get([ref])
            assert_same_bits(tensors, filled(ref.num_bytes, index))
            reader.release([handle])
    reader.close()
    store.close()


def test_reader_that_left_while_it_held_a_sample_is_cleared_away(run_id, store):
    reader = SharedMemoryFeatureStore.attach(run_id)
    reader.get([put_one(store, "a", filled(640, 1))])
    store.abort([("a", 1)])
    assert store.health().live_bytes == 640
    reader.close()
    assert store.gc() + store.gc() <= 1
    assert store.health().live_bytes == 0


def test_lanes_are_used_again(run_id, store):
    ref = put_one(store, "a", filled(64, 1))
    for _ in range(3):
        readers = [SharedMemoryFeatureStore.attach(run_id) for _ in range(NUM_LANES - 1)]
        for reader in readers:
            reader.get([ref])
        extra = SharedMemoryFeatureStore.attach(run_id)
        with pytest.raises(FeatureStoreError, match="lanes"):
            extra.get([ref])
        extra.close()
        for reader in readers:
            reader.close()
        store.gc()
    assert store.health().num_handles == 0


def test_key_of_a_foreign_path_is_never_opened(run_id, store):
    reader = SharedMemoryFeatureStore.attach(run_id)
    ref = put_one(store, "a", filled(64, 1))
    for key in ("../../etc/passwd:0:1", "", "x:y", ref.key.replace(run_id, "other"), ref.key.rpartition(":")[0]):
        with pytest.raises(FeatureNotFound):
            reader.get([type(ref)(**{field: getattr(ref, field) for field in ref.__slots__} | {"key": key})])
    reader.close()


def test_incomplete_arena_is_not_mapped(run_id, tmp_path):
    arena = Arena.create(tmp_path, run_id, CAPACITY, 16)
    arena.header[3] = 0
    assert Arena.open(tmp_path, arena.name) is None
    arena.path.write_bytes(b"")
    assert Arena.open(tmp_path, arena.name) is None
    arena.close()


def test_arena_of_a_live_writer_is_no_orphan(run_id, store):
    ref = put_one(store, "a", filled(64, 1))
    assert collect_orphans(run_id) == 0
    reader = SharedMemoryFeatureStore.attach(run_id)
    reader.get([ref])
    reader.close()
