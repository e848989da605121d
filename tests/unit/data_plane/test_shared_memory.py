import contextlib
import dataclasses
import os
import shutil
import stat
import tempfile
import uuid
from pathlib import Path

import pytest
import torch

from specforge.data_plane import arena, arena_writer
from specforge.data_plane.arena import MAX_ID_BYTES, NUM_LANES, Arena, ArenaName
from specforge.data_plane.arena_reader import digest
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.processes import ProcessIdentity
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore, collect_orphans
from specforge.errors import ConfigError, FeatureNotFound, FeatureStoreError, FeatureStoreFull
from specforge.testing.feature_store import CAPACITY, LARGEST, FeatureStoreSuite, assert_same_bits, filled, put_one

RUN = "run"


@pytest.fixture
def directory():
    """A directory of this test's own in shared memory, which the test must leave empty."""
    with tempfile.TemporaryDirectory(prefix="specforge-test-", dir=SHARED_MEMORY) as name:
        yield Path(name)
        assert list(Path(name).iterdir()) == []


@pytest.fixture
def attach(directory):
    return lambda: SharedMemoryFeatureStore.attach(RUN, directory)


@pytest.fixture
def create(directory):
    return lambda max_samples=4096: SharedMemoryFeatureStore.create(RUN, CAPACITY, max_samples, directory)


@pytest.fixture
def store(create):
    store = create(max_samples=64)
    yield store
    store.close()


class TestSharedMemoryFeatureStore(FeatureStoreSuite):
    @pytest.fixture(autouse=True)
    def _run(self, directory, monkeypatch):
        self.directory, self.monkeypatch = directory, monkeypatch

    def make_store(self, capacity_bytes: int) -> FeatureStore:
        return SharedMemoryFeatureStore.create(RUN, capacity_bytes, 2048, self.directory)

    def make_large_store(self, num_bytes: int) -> FeatureStore:
        # Its pages are not reserved: a sample takes 1/64 of an arena at most, and this one needs no more of it.
        self.monkeypatch.setattr(arena, "_reserve", lambda file, _, shape: os.truncate(file, shape.file_bytes))
        return self.make_store(65 * num_bytes)

    def make_reader(self, store: FeatureStore) -> FeatureStore:
        return SharedMemoryFeatureStore.attach(RUN, self.directory)

    def make_writer(self, store: FeatureStore) -> FeatureStore:
        return SharedMemoryFeatureStore.create(RUN, CAPACITY, 2048, self.directory)

    def leftovers(self, store: FeatureStore) -> list[str]:
        """Files that belong to no arena of a live writer."""
        arenas = {path.name for path in self.directory.iterdir() if ".lane-" not in path.name}
        return [path.name for path in self.directory.iterdir() if path.name.partition(".lane-")[0] not in arenas]

    def room(self, num_bytes: int) -> int:
        return min(num_bytes, shutil.disk_usage(SHARED_MEMORY).free)


def test_arenas_lie_in_posix_shared_memory():
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    store, reader = SharedMemoryFeatureStore.create(run_id, CAPACITY), SharedMemoryFeatureStore.attach(run_id)
    assert reader.live([put_one(store, "a", filled(64, 1))]) == [True]
    assert [path.parent for path in Path("/dev/shm").glob(f"*{run_id}*")] == [Path("/dev/shm")] * 3
    store.close()
    reader.close()
    assert list(SHARED_MEMORY.glob(f"*{run_id}*")) == []


def test_get_is_a_view_of_the_arena_aligned_for_kernels(store, attach):
    reader = attach()
    ref = put_one(store, "a", {"x": torch.ones(3), "y": torch.ones(3)})
    [(first, _)], [(second, _)] = reader.get([ref]), reader.get([ref])
    assert first["x"].data_ptr() == second["x"].data_ptr()
    assert first["x"].untyped_storage().data_ptr() == first["y"].untyped_storage().data_ptr()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in first.values())
    reader.close()


def test_tensors_outlive_the_store_and_its_file(attach, create):
    store = create()
    reader = attach()
    [(tensors, _)] = reader.get([put_one(store, "a", filled(1000, 3))])
    store.close()
    reader.close()
    del store, reader
    assert_same_bits(tensors, filled(1000, 3))


def test_mapped_reader_reads_on_after_the_writer_left_and_others_find_nothing(attach, create):
    store = create()
    reader, late = (attach() for _ in range(2))
    first, second = (put_one(store, name, filled(64, 1)) for name in "ab")
    reader.get([first])
    store.close()
    reader.get([second])
    with pytest.raises(FeatureNotFound, match="'b'"):
        late.get([second])
    reader.close()
    late.close()


def test_arena_is_private_and_its_pages_are_reserved(store, directory):
    [path] = [path for path in directory.iterdir() if ".lane-" not in path.name]
    facts = path.stat()
    assert stat.S_IMODE(facts.st_mode) == 0o600
    assert facts.st_blocks * 512 >= facts.st_size >= CAPACITY


def test_too_little_shared_memory_is_said_with_the_fix(directory):
    with pytest.raises(ConfigError, match=r"has [\d,]+ free: lower the store's capacity"):
        SharedMemoryFeatureStore.create(RUN, 1 << 50, directory=directory)


@pytest.mark.parametrize("capacity_bytes", [0, 4000])
def test_arena_without_room_for_a_sample_is_refused(directory, capacity_bytes):
    with pytest.raises(ConfigError, match="at least 4096 bytes"):
        SharedMemoryFeatureStore.create(RUN, capacity_bytes, directory=directory)


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "x" * 65])
def test_run_id_that_is_no_file_name_is_refused(name):
    with pytest.raises(ConfigError, match="run id"):
        SharedMemoryFeatureStore.attach(name)


def test_reader_cannot_put(attach):
    reader = attach()
    with pytest.raises(FeatureStoreError, match="only a writer"):
        put_one(reader, "a", filled(64, 1))
    reader.close()


def test_more_samples_than_entries_is_back_pressure(store, attach):
    reader = attach()
    for index in range(64):
        put_one(store, str(index), filled(64, index))
    with pytest.raises(FeatureStoreFull, match="64 of 64 samples"):
        put_one(store, "more", filled(64, 1))
    reader.abort([("7", 1)])
    put_one(store, "more", filled(64, 1))
    reader.close()


def test_compaction_opens_a_gap_and_leaves_every_sample_whole(attach, create):
    store = create(max_samples=512)
    reader = attach()
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


def test_reader_that_left_while_it_held_a_sample_is_cleared_away(store, attach):
    reader = attach()
    reader.get([put_one(store, "a", filled(640, 1))])
    store.abort([("a", 1)])
    assert store.health().live_bytes == 640
    reader.close()
    assert store.gc() + store.gc() <= 1
    assert store.health().live_bytes == 0


def test_lanes_are_used_again(store, attach):
    ref = put_one(store, "a", filled(64, 1))
    for _ in range(3):
        readers = [attach() for _ in range(NUM_LANES - 1)]
        for reader in readers:
            reader.get([ref])
        extra = attach()
        with pytest.raises(FeatureStoreError, match="lanes"):
            extra.get([ref])
        extra.close()
        for reader in readers:
            reader.close()
        store.gc()
    assert store.health().num_handles == 0


def test_key_of_a_foreign_path_is_never_opened(store, attach):
    reader = attach()
    ref = put_one(store, "a", filled(64, 1))
    for key in ("../../etc/passwd:0:1", "", "x:y", ref.key.replace(RUN, "other"), ref.key.rpartition(":")[0]):
        with pytest.raises(FeatureNotFound):
            reader.get([type(ref)(**{field: getattr(ref, field) for field in ref.__slots__} | {"key": key})])
    reader.close()


def test_incomplete_arena_is_not_mapped(tmp_path):
    arena = Arena.create(tmp_path, RUN, CAPACITY, 16)
    arena.header[3] = 0
    assert Arena.open(tmp_path, arena.name) is None
    arena.path.write_bytes(b"")
    assert Arena.open(tmp_path, arena.name) is None
    arena.close()


def test_arena_of_a_live_writer_is_no_orphan(store, attach, directory):
    ref = put_one(store, "a", filled(64, 1))
    assert collect_orphans(RUN, directory) == 0
    reader = attach()
    reader.get([ref])
    reader.close()


def fill_lanes(directory, owner):
    """Claim every lane that is left, as ``owner``."""
    [arena] = [path for path in directory.iterdir() if ".lane-" not in path.name]
    for lane in range(NUM_LANES):
        with contextlib.suppress(FileExistsError):
            (directory / f"{arena.name}.lane-{lane}").symlink_to(str(owner))


def test_lanes_of_dead_readers_are_free_to_claim_although_the_writer_clears_none(store, attach, directory):
    ref = put_one(store, "a", filled(64, 1))
    me = ProcessIdentity.current()
    fill_lanes(directory, dataclasses.replace(me, start_ticks=me.start_ticks + 1))
    reader = attach()
    assert reader.live([ref]) == [True]
    assert len(list(directory.iterdir())) == 1 + 2
    fill_lanes(directory, me)
    with pytest.raises(FeatureStoreError, match="lanes"):
        attach().get([ref])
    reader.close()


def test_request_of_a_reader_that_left_holds_after_its_lane_was_given_to_another(store, attach):
    put_one(store, "a", filled(64, 1))
    ref = put_one(store, "b", filled(64, 1))
    for _ in range(2 * NUM_LANES):
        reader = attach()
        reader.abort([("a", 1)])
        reader.get([ref])
        reader.close()
    [pair] = attach().stored()
    assert pair == ("b", 1)
    assert store.gc() == 1
    assert store.health().num_handles == 0


def test_sample_id_that_does_not_fit_is_refused(store):
    put_one(store, "x" * MAX_ID_BYTES, filled(64, 1))
    with pytest.raises(FeatureStoreError, match="255 bytes in UTF-8"):
        store.put([PutRequest("a", 1, filled(64, 1)), PutRequest("ü" * 128, 1, filled(64, 1))])
    assert store.stored() == [("x" * MAX_ID_BYTES, 1)]


def test_interrupted_put_can_be_aborted_and_is_never_readable(store, attach, monkeypatch):
    def interrupted(sample_id):
        if sample_id == "b":
            raise KeyboardInterrupt
        return digest(sample_id)

    monkeypatch.setattr(arena_writer, "digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put([PutRequest(name, 1, filled(64, 1)) for name in "ab"])
    reader = attach()
    assert reader.stored() == store.stored() == []
    store.abort([("a", 1), ("b", 1)])
    monkeypatch.undo()
    put_one(store, "c", filled(64, 1))
    assert reader.stored() == [("c", 1)]
    assert store.health().live_bytes == 64
    reader.close()


def test_writer_that_leaves_keeps_what_is_readable_for_those_that_come(create, attach, directory):
    store = create()
    refs = [put_one(store, name, filled(64, 7)) for name in "ab"]
    store.abort([("a", 1)])
    store.leave()
    with pytest.raises(FeatureStoreError, match="closed"):
        store.stored()
    late = attach()
    assert late.live(refs) == [False, True]
    assert_same_bits(late.get(refs[1:])[0][0], filled(64, 7))
    late.close()
    for path in directory.iterdir():
        path.unlink()


def test_writer_that_leaves_nothing_readable_takes_its_arena_along(create, directory):
    store = create()
    put_one(store, "a", filled(64, 7))
    store.abort([("a", 1)])
    store.leave()
    store.close()
    assert list(directory.iterdir()) == []


def test_arena_of_another_pid_namespace_is_neither_live_nor_collected(create, attach, directory):
    store = create()
    ref = put_one(store, "a", filled(64, 1))
    name = ArenaName.parse(ref.key.partition(":")[0])
    elsewhere = dataclasses.replace(name.writer, namespace=name.writer.namespace + 1)
    foreign = dataclasses.replace(name, writer=elsewhere)
    (directory / str(foreign)).write_bytes((directory / str(name)).read_bytes())
    store.close()
    lost = dataclasses.replace(ref, key=ref.key.replace(str(name), str(foreign)))
    reader = attach()
    assert reader.live([ref, lost]) == [False, False]
    assert reader.stored() == []
    assert reader.gc() == 0
    with pytest.raises(FeatureStoreError, match="one PID namespace"):
        reader.get([lost])
    reader.close()
    (directory / str(foreign)).unlink()
