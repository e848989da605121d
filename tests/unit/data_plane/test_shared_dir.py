import dataclasses
import errno
import os
import stat
import threading

import psutil
import pytest
import torch
from safetensors.torch import load_file

from specforge.data_plane import safetensors_file, shared_dir
from specforge.data_plane.base import FeatureStore, PutRequest
from specforge.data_plane.processes import ProcessIdentity
from specforge.data_plane.shared_dir import SharedDirFeatureStore, relative_path
from specforge.errors import ConfigError, CorruptFeature, FeatureNotFound, FeatureStoreError, FeatureStoreFull
from specforge.testing.feature_store import FeatureStoreSuite, assert_same_bits, filled, make_ref, put_one

RUN = "run"


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path):
    return SharedDirFeatureStore(tmp_path, RUN)


@pytest.fixture
def full_disk(monkeypatch):
    """Makes every write of more than a given number of bytes fail as a full disk does."""

    def fill(limit, code=errno.ENOSPC):
        pieces = safetensors_file._pieces

        def until_full(specs, sources):
            num_bytes = 0
            for piece in pieces(specs, sources):
                num_bytes += len(piece)
                if num_bytes > limit:
                    raise OSError(code, os.strerror(code))
                yield piece

        monkeypatch.setattr(safetensors_file, "_pieces", until_full)

    return fill


class TestSharedDirFeatureStore(FeatureStoreSuite):
    handles_hold_bytes = False
    handles_are_shared = False
    num_cycles = 1000

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path):
        self.directory = tmp_path / "features"

    def make_store(self, capacity_bytes: int) -> FeatureStore:
        return SharedDirFeatureStore(self.directory, RUN, capacity_bytes)

    def make_reader(self, store: FeatureStore) -> FeatureStore:
        return SharedDirFeatureStore(self.directory, RUN)

    make_writer = make_reader

    def truncate(self, store, ref):
        path = self.directory / RUN / ref.key
        os.truncate(path, path.stat().st_size - 1)

    def leftovers(self, store):
        return [str(path) for path in files(self.directory) if path.suffix != ".safetensors"]

    def room(self, num_bytes):
        status = os.statvfs(self.directory.parent)
        return min(num_bytes, status.f_bavail * status.f_frsize)


class TestSyncedSharedDirFeatureStore(TestSharedDirFeatureStore):
    num_cycles = 50

    def make_store(self, capacity_bytes: int) -> FeatureStore:
        return SharedDirFeatureStore(self.directory, RUN, capacity_bytes, fsync=True)

    test_tensor_of_more_than_2_gib = None  # nothing that the sync changes


def test_file_is_private_and_the_public_library_reads_it(store, tmp_path):
    ref = put_one(store, "a b/ü", {"x": torch.randn(3, 5).to(torch.bfloat16), "ids": torch.arange(7)}, generation=3)
    [path] = files(tmp_path)
    assert path == tmp_path / RUN / ref.key
    assert path.name == "a%20b%2F%C3%BC.3.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE(parent.stat().st_mode) for parent in (path.parent, path.parent.parent)} == {0o700}
    tensors = load_file(path)
    [(got, _)] = store.get([ref])
    assert_same_bits({name: tensors[name] for name in got}, got)


def test_get_is_a_mapping_aligned_for_kernels_that_outlives_file_and_store(store, tmp_path):
    ref = put_one(store, "a", {"x": torch.ones(3), "y": torch.ones(3)})
    process = psutil.Process()
    num_descriptors = process.num_fds()
    lent = [store.get([ref])[0][0] for _ in range(20)]
    assert process.num_fds() == num_descriptors
    for tensors in lent:
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
        assert tensors["x"].untyped_storage().data_ptr() == tensors["y"].untyped_storage().data_ptr()
    # Nothing that a reader does to its tensors reaches another.
    lent[0]["x"].zero_()
    store.close()
    store.remove_all()
    assert files(tmp_path) == []
    assert_same_bits(lent[1], {"x": torch.ones(3), "y": torch.ones(3)})


@pytest.mark.parametrize("sample_id", ["", ".", "..", "../../x", "a/b", "=a", "ü" * 200, "x" * 5000, "\0", "a.7.tmp"])
def test_any_text_is_a_sample_id(store, tmp_path, sample_id):
    ref = put_one(store, sample_id, filled(64, 5), generation=-1)
    other = put_one(store, sample_id + "x", filled(64, 6), generation=-1)
    assert len(files(tmp_path / RUN)) == 2
    assert sorted(store.stored()) == sorted([(sample_id, -1), (sample_id + "x", -1)])
    assert_same_bits(store.get([ref])[0][0], filled(64, 5))
    assert_same_bits(store.get([other])[0][0], filled(64, 6))
    store.abort([(sample_id, -1)])
    assert store.stored() == [(sample_id + "x", -1)]


def test_key_is_never_followed(store, tmp_path):
    ref = put_one(store, "a", filled(64, 1))
    other = put_one(store, "b", filled(64, 1))
    for key in ("../../etc/passwd", "/etc/passwd", "", other.key, f"../{RUN}/{ref.key}", f"./{ref.key}"):
        lie = dataclasses.replace(ref, key=key)
        with pytest.raises(FeatureNotFound, match="'a'"):
            store.get([lie])
        assert store.live([lie]) == [False]


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 65])
def test_run_id_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="run id"):
        SharedDirFeatureStore(tmp_path, name)


def test_runs_of_one_directory_do_not_see_each_other(tmp_path):
    first, second = (SharedDirFeatureStore(tmp_path, name) for name in ("one", "two"))
    ref = put_one(first, "a", filled(64, 1))
    assert second.live([ref]) == [False]
    assert second.stored() == []
    second.abort([("a", 1)])
    second.remove_all()
    assert first.live([ref]) == [True]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_back_pressure_and_leaves_nothing(store, tmp_path, full_disk, monkeypatch, code):
    full_disk(1000, code)
    with pytest.raises(FeatureStoreFull, match=str(tmp_path)):
        store.put([PutRequest("a", 1, filled(640, 1)), PutRequest("b", 1, filled(6400, 1))])
    assert files(tmp_path) == []
    assert store.health().num_samples == store.health().live_bytes == 0
    monkeypatch.undo()
    put_one(store, "b", filled(6400, 1))


def test_budget_that_a_failed_put_reserved_is_given_back(tmp_path, full_disk, monkeypatch):
    store = SharedDirFeatureStore(tmp_path, RUN, capacity_bytes=1000)
    full_disk(0)
    for _ in range(3):
        with pytest.raises(FeatureStoreFull, match="is full"):
            put_one(store, "a", filled(640, 1))
    monkeypatch.undo()
    put_one(store, "a", filled(640, 1))
    with pytest.raises(FeatureStoreFull, match="640 of 1000 bytes are live"):
        put_one(store, "b", filled(640, 1))


def test_rename_that_fails_takes_the_whole_batch_back(store, tmp_path, monkeypatch):
    replace = type(tmp_path).replace

    def failing(path, target):
        if target.name.startswith("b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", failing)
    with pytest.raises(FeatureStoreError, match=r"cannot write .*: Input/output error"):
        store.put([PutRequest(name, 1, filled(64, 1)) for name in "abc"])
    assert files(tmp_path) == []
    assert store.health().num_samples == 0


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_directory_that_cannot_be_written_is_said_with_path_and_fix(store, tmp_path, monkeypatch, code):
    def denied(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(shared_dir, "write_temporary", denied)
    with pytest.raises(FeatureStoreError, match=rf"{tmp_path}.*: {os.strerror(code)}; make .* writable"):
        put_one(store, "a", filled(64, 1))


def test_directory_that_is_a_file_is_said_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    store = SharedDirFeatureStore(tmp_path / "file", RUN)
    with pytest.raises(FeatureStoreError, match=str(tmp_path / "file")):
        put_one(store, "a", filled(64, 1))
    assert store.stored() == []
    store.remove_all()


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 4096, b"\xff" * 4096, b"8\0\0\0\0\0\0\0" + b"{" * 56])
def test_garbage_is_corrupt_and_named(store, tmp_path, content):
    ref = put_one(store, "a", filled(64, 1))
    path = tmp_path / RUN / ref.key
    path.write_bytes(content)
    with pytest.raises(CorruptFeature, match=str(path)):
        store.get([ref])
    assert store.live([ref]) == [False]


def test_file_of_other_features_is_corrupt_and_named(store, tmp_path):
    ref, other = (put_one(store, name, filled(size, 1)) for name, size in (("a", 64), ("b", 128)))
    (tmp_path / RUN / other.key).replace(tmp_path / RUN / ref.key)
    with pytest.raises(CorruptFeature, match=f"sample 'a': {tmp_path / RUN / ref.key} holds"):
        store.get([ref])


def temporary(store, directory, host, identity):
    path = directory / RUN / "00" / f".{host}.{identity}.1.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    return path


def test_gc_takes_what_dead_writers_left_half_written_and_nothing_else(store, tmp_path):
    ref = put_one(store, "a", filled(64, 1))
    me, here = ProcessIdentity.current(), safetensors_file._host()
    dead = dataclasses.replace(me, start_ticks=me.start_ticks + 1)
    kept = [
        temporary(store, tmp_path, here, me),
        temporary(store, tmp_path, here, dataclasses.replace(dead, namespace=me.namespace + 1)),
        # The same pid and namespace on another host of the mount.
        temporary(store, tmp_path, "another", dead),
        tmp_path / RUN / ref.key,
    ]
    temporary(store, tmp_path, here, dead)
    assert store.gc() == 1
    assert files(tmp_path) == sorted(kept)
    assert store.gc() == 0
    assert store.stored() == [("a", 1)]
    assert store.live([ref]) == [True]


def test_files_of_others_in_the_directory_are_no_samples(store, tmp_path):
    put_one(store, "a", filled(64, 1))
    for name in ("x.safetensors", "x.one.safetensors", "x.1.safetensors.bak", "=0.1.safetensors", ".nfs0001"):
        (tmp_path / RUN / "00").mkdir(exist_ok=True)
        (tmp_path / RUN / "00" / name).write_bytes(b"")
    (tmp_path / RUN / "note").write_text("")
    assert store.stored() == [("a", 1)]
    assert store.gc() == 0


def test_close_leaves_the_files_to_others_and_remove_all_takes_them(store, tmp_path):
    ref = put_one(store, "a", filled(64, 1))
    store.close()
    late = SharedDirFeatureStore(tmp_path, RUN)
    assert_same_bits(late.get([ref])[0][0], filled(64, 1))
    with pytest.raises(FeatureStoreError, match="stored"):
        put_one(late, "a", filled(64, 1))
    late.remove_all()
    late.remove_all()
    assert list(tmp_path.iterdir()) == []
    assert late.stored() == []
    put_one(late, "a", filled(64, 1))


def test_adopted_files_count_against_the_budget_until_they_are_gone(store, tmp_path):
    refs = [put_one(store, name, filled(640, 1)) for name in "ab"]
    heir = SharedDirFeatureStore(tmp_path, RUN, capacity_bytes=1500)
    assert heir.health().num_samples == 0
    heir.adopt()
    heir.adopt()
    assert (heir.health().num_samples, heir.health().live_bytes) == (2, 1280)
    with pytest.raises(FeatureStoreFull):
        put_one(heir, "c", filled(640, 1))
    store.abort([("a", 1)])
    put_one(heir, "c", filled(640, 1))
    assert (heir.health().num_samples, heir.health().live_bytes) == (2, 1280)
    assert [heir.key_of(("a", 1)), heir.key_of(("b", 1))] == [ref.key for ref in refs]


def test_abort_during_a_put_wins(tmp_path, monkeypatch):
    store, reader = (SharedDirFeatureStore(tmp_path, RUN, 10_000) for _ in range(2))
    write = shared_dir.write_temporary

    def aborted_meanwhile(*arguments, **options):
        answer = write(*arguments, **options)
        store.abort([("a", 1)])
        return answer

    monkeypatch.setattr(shared_dir, "write_temporary", aborted_meanwhile)
    stored = store.put([PutRequest(name, 1, filled(64, 1)) for name in "ab"])
    refs = [make_ref(name, 1, item) for name, item in zip("ab", stored, strict=True)]
    assert reader.live(refs) == [False, True]
    assert reader.stored() == [("b", 1)]
    assert [path.name for path in files(tmp_path)] == ["b.1.safetensors"]
    assert (store.health().num_samples, store.health().live_bytes) == (1, 64)
    with pytest.raises(FeatureStoreFull, match="64 of 10000"):
        put_one(store, "c", filled(9_984, 1))


def test_pair_that_is_being_written_is_not_put_twice(store, monkeypatch):
    write = shared_dir.write_temporary
    errors = []

    def twice(*arguments, **options):
        monkeypatch.undo()
        try:
            put_one(store, "a", filled(64, 2))
        except FeatureStoreError as error:
            errors.append(str(error))
        return write(*arguments, **options)

    monkeypatch.setattr(shared_dir, "write_temporary", twice)
    ref = put_one(store, "a", filled(64, 1))
    assert errors == ["sample 'a', generation 1: its features are already stored"]
    assert_same_bits(store.get([ref])[0][0], filled(64, 1))


def test_writers_in_threads_stay_within_the_budget(tmp_path):
    store = SharedDirFeatureStore(tmp_path, RUN, capacity_bytes=64 * 50)
    refused = []

    def write(name):
        for index in range(20):
            try:
                put_one(store, f"{name}{index}", filled(64, index))
            except FeatureStoreFull:
                refused.append(name)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 30
    assert len(store.stored()) == store.health().num_samples == 50
    assert len(files(tmp_path)) == 50


def test_remove_all_goes_on_when_others_remove_files_too(store, tmp_path, monkeypatch):
    for index in range(5):
        put_one(store, str(index), filled(64, 1))
    rmtree = shared_dir.shutil.rmtree
    calls = []

    def vanishing(path):
        calls.append(path)
        if len(calls) < 3:
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        rmtree(path)

    monkeypatch.setattr(shared_dir.shutil, "rmtree", vanishing)
    store.remove_all()
    assert list(tmp_path.iterdir()) == []


def test_samples_are_spread_over_directories():
    shards = {relative_path(f"sample-{index}", 1)[:2] for index in range(5000)}
    assert len(shards) == 256
