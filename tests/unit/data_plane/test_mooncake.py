import dataclasses
import itertools
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch

from specforge.data_plane import mooncake
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures
from specforge.data_plane.mooncake import MooncakeFeatureStore, MooncakeSettings, load_library
from specforge.data_plane.mooncake_objects import HEADER_BYTES, Names, Place, check_object, write_header
from specforge.data_plane.mooncake_pool import TransferPool
from specforge.errors import (
    CorruptFeature,
    FeatureNotFound,
    FeatureStoreError,
    FeatureStoreFull,
    FeatureTooLarge,
    MissingExtraError,
    UserError,
)
from specforge.launch.mooncake import ServiceTimes
from specforge.testing.feature_store import FeatureStoreSuite, assert_same_bits, filled, make_ref, put_one
from specforge.testing.mooncake import settings_of, temporary_service

SEGMENT = 3 * 2**30
"""Bytes; taken only as far as they are used."""
BUFFER = 4 * 2**20
RUNS = (f"run-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def service():
    # The largest put of the suite takes longer than the timeouts of a test would let it.
    with temporary_service(SEGMENT, times=ServiceTimes()) as service:
        yield service


class Forwarding:
    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Recycled(Forwarding):
    """A client of the library that another test goes on with: to close one takes a second."""

    idle: ClassVar = {}

    def setup(self, *arguments):
        self.arguments = arguments
        if self.idle.get(arguments):
            self.inner = self.idle[arguments].pop()
            return 0
        return self.inner.setup(*arguments)

    def register_buffer(self, address, num_bytes):
        self.address = address
        return self.inner.register_buffer(address, num_bytes)

    def close(self):
        assert self.inner.unregister_buffer(self.address) == 0
        self.idle.setdefault(self.arguments, []).append(self.inner)
        return 0

    @classmethod
    def close_all(cls):
        with ThreadPoolExecutor(16) as closing:
            list(closing.map(lambda client: client.close(), itertools.chain(*cls.idle.values())))
        cls.idle.clear()


@pytest.fixture
def recycling(service, monkeypatch):
    library = load_library()
    monkeypatch.setattr(
        mooncake,
        "load_library",
        lambda: SimpleNamespace(
            ReplicateConfig=library.ReplicateConfig,
            MooncakeDistributedStore=lambda: Recycled(library.MooncakeDistributedStore()),
        ),
    )


@pytest.fixture(scope="module", autouse=True)
def _close_recycled():
    yield
    Recycled.close_all()


@pytest.fixture
def opened(service, recycling):
    """Opens stores of one run, which are closed in the end."""
    run_id, stores = next(RUNS), []

    def open_store(**changes):
        stores.append(MooncakeFeatureStore(settings_of(service, run_id, **{"reconnect_s": 2.0} | changes)))
        return stores[-1]

    yield open_store
    open_store().remove_all()
    for store in stores:
        store.close()


class TestMooncakeFeatureStore(FeatureStoreSuite):
    handles_hold_bytes = False
    handles_are_shared = False
    num_cycles = 300

    @pytest.fixture(autouse=True)
    def _service(self, service, recycling):
        self.service, self.run_id = service, next(RUNS)
        yield
        cleaner = self.make_writer(None)
        cleaner.remove_all()
        cleaner.close()

    def make_store(self, capacity_bytes: int) -> FeatureStore:
        self.buffer_bytes = capacity_bytes + BUFFER
        return self.open(capacity_bytes)

    def make_reader(self, store: FeatureStore) -> FeatureStore:
        return self.open(None)

    def make_writer(self, store: FeatureStore) -> FeatureStore:
        return self.open(None)

    def open(self, capacity_bytes):
        buffer_bytes = getattr(self, "buffer_bytes", BUFFER)
        return MooncakeFeatureStore(
            settings_of(self.service, self.run_id, buffer_bytes=buffer_bytes, capacity_bytes=capacity_bytes)
        )

    def truncate(self, store, ref):
        put_again(store, ref, num_bytes=HEADER_BYTES + ref.num_bytes // 2)

    def room(self, num_bytes: int) -> int:
        # The memory of the service, and the buffers of writer and reader.
        return min(psutil.virtual_memory().available // 4, num_bytes)


def put_again(store, ref, *, num_bytes):
    """Put the first ``num_bytes`` bytes of the object of ``ref`` in its place."""
    key = Place.parse(ref.key).object_key
    pool, connection = store._pool, store._connection
    [slot] = pool.take([max(num_bytes, HEADER_BYTES + ref.num_bytes)])
    address = pool.address + slot.offset
    assert connection.get([key], [address], [HEADER_BYTES + ref.num_bytes]) == [HEADER_BYTES + ref.num_bytes]
    connection.remove([key])
    assert connection.put([key], [address], [num_bytes]) == [0]
    pool.give_back([slot])


def test_get_is_a_view_of_the_buffer_aligned_for_kernels(opened):
    store = opened()
    ref = put_one(store, "a", {"x": torch.ones(3), "y": torch.ones(3)})
    [(tensors, handle)] = store.get([ref])
    start, end = store._pool.address, store._pool.address + BUFFER
    assert all(start <= tensor.data_ptr() < end and tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
    store.release([handle])


def test_tensors_outlive_the_store(opened):
    store = opened()
    [(tensors, _)] = store.get([put_one(store, "a", filled(100_000, 3))])
    store.close()
    del store
    assert_same_bits(tensors, filled(100_000, 3))


def test_bytes_of_another_put_of_the_pair_are_not_found(opened):
    """Mooncake answers 0 to the second put of a key and keeps the first: the nonce of the ref tells."""
    first, second, reader = opened(), opened(), opened()
    refs = [put_one(side, "a", filled(64, value)) for value, side in enumerate((first, second))]
    assert refs[0].key != refs[1].key
    [(tensors, handle)] = reader.get(refs[:1])
    assert_same_bits(tensors, filled(64, 0))
    reader.release([handle])
    with pytest.raises(FeatureNotFound, match="another put"):
        reader.get(refs[1:])


def test_object_larger_than_the_reference_says_is_corrupt(opened):
    store = opened()
    ref = put_one(store, "a", filled(640, 1))
    put_again(store, ref, num_bytes=HEADER_BYTES + 1000)
    with pytest.raises(CorruptFeature, match=r"'a'.*larger"):
        store.get([ref])


def test_object_without_a_header_is_corrupt(opened):
    store = opened()
    ref = put_one(store, "a", filled(640, 1))
    put_again(store, ref, num_bytes=10)
    with pytest.raises(CorruptFeature, match="shorter than its header"):
        store.get([ref])


def test_header_names_one_put_of_one_sample():
    buffer = memoryview(bytearray(HEADER_BYTES + 128))
    ref = make_ref("a", 1, StoredFeatures("mooncake", "key", 128, ()))
    write_header(buffer, 0, 5, ("a", 1, 128))
    check_object(ref, 5, buffer, len(buffer))
    for other, nonce in (("a", 6), ("b", 5)):
        with pytest.raises(FeatureNotFound):
            check_object(dataclasses.replace(ref, sample_id=other), nonce, buffer, len(buffer))
    with pytest.raises(FeatureNotFound):
        check_object(dataclasses.replace(ref, generation=2), 5, buffer, len(buffer))
    for size, num_read in ((128, len(buffer) - 1), (128, 63), (64, len(buffer))):
        with pytest.raises(CorruptFeature):
            check_object(dataclasses.replace(ref, num_bytes=size), 5, buffer, num_read)
    buffer[0] = 0
    with pytest.raises(CorruptFeature, match="no header"):
        check_object(ref, 5, buffer, len(buffer))


@pytest.mark.parametrize("sample_id", ["a", "", "ü/#%\n", "a sample/with.every:thing-%d", "x" * 2000])
def test_names_are_read_back(sample_id):
    names = Names("run.1/#")
    key = names.key(sample_id, 7)
    assert names.pair(key) == (sample_id, 7)
    assert Names("run.1").pair(key) is None
    assert Place.parse(str(Place(key, 2**64 - 1))) == Place(key, 2**64 - 1)


def test_runs_do_not_see_each_other_and_are_removed_apart(service):
    # A dot in a run's id stands for itself alone.
    stores = {run: MooncakeFeatureStore(settings_of(service, run)) for run in ("a.b", "axb", "a.b2")}
    for store in stores.values():
        put_one(store, "s", filled(64, 1))
    assert stores["a.b"].remove_all() == 1
    assert [store.stored() for store in stores.values()] == [[], [("s", 1)], [("s", 1)]]
    for store in stores.values():
        store.remove_all()
        store.close()


def test_batch_larger_than_the_buffer_is_put_in_pieces(opened):
    store = opened(buffer_bytes=1 << 16)
    stored = store.put([PutRequest(f"s{index}", 1, filled(20_000, index)) for index in range(10)])
    for index, item in enumerate(stored):
        [(tensors, handle)] = store.get([make_ref(f"s{index}", 1, item)])
        assert_same_bits(tensors, filled(20_000, index))
        store.release([handle])


def test_sample_larger_than_the_buffer_names_the_option(opened):
    store = opened(buffer_bytes=1 << 16)
    with pytest.raises(FeatureTooLarge, match=r"'a'.*buffer_bytes"):
        put_one(store, "a", filled(1 << 16, 1))
    ref = put_one(opened(), "a", filled(1 << 16, 1))
    with pytest.raises(FeatureTooLarge, match=r"'a'.*buffer_bytes"):
        store.get([ref])


def test_get_over_held_handles_names_the_option_and_keeps_nothing(opened):
    store = opened(buffer_bytes=1 << 16)
    refs = [put_one(store, f"s{index}", filled(15_000, index)) for index in range(5)]
    held = store.get(refs[:3])
    with pytest.raises(FeatureStoreError, match="buffer_bytes"):
        store.get(refs[3:])
    with pytest.raises(FeatureStoreError, match="buffer_bytes"):
        put_one(store, "more", filled(30_000, 1))
    store.release([handle for _, handle in held])
    assert len(store.get(refs[:4])) == 4


def test_pool_waits_for_calls_of_other_threads():
    pool = TransferPool(1 << 12)
    [busy] = pool.take([4096])
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(pool.take([64, 64])))
    thread.start()
    pool.give_back([busy])
    thread.join(10)
    assert len(taken) == 2


def test_full_segment_is_back_pressure_and_leaves_nothing_of_the_batch():
    with temporary_service(1) as service:  # the least that Mooncake takes, which is 16 MiB
        store = MooncakeFeatureStore(settings_of(service, "run", buffer_bytes=64 * 2**20))
        assert store.health().capacity_bytes == 16 * 2**20
        kept = put_one(store, "kept", filled(6 * 2**20, 1))
        with pytest.raises(FeatureStoreFull, match="no room"):
            store.put([PutRequest(f"s{index}", 1, filled(4 * 2**20, index)) for index in range(4)])
        assert store.stored() == [("kept", 1)]
        assert store.health().num_samples == 1
        with pytest.raises(FeatureTooLarge, match=r"'b'.*capacity_bytes"):
            put_one(store, "b", filled(17 * 2**20, 1))
        store.put([PutRequest(f"s{index}", 1, filled(4 * 2**20, index)) for index in range(2)])
        [(tensors, handle)] = store.get([kept])
        assert_same_bits(tensors, filled(6 * 2**20, 1))
        store.release([handle])
        store.close()


def test_abort_during_a_put_leaves_nothing(opened, monkeypatch):
    store = opened()
    put = store._connection.put

    def put_late(*arguments):
        store.abort([("a", 1)])
        return put(*arguments)

    monkeypatch.setattr(store._connection, "put", put_late)
    store.put([PutRequest(name, 1, filled(64, 1)) for name in "ab"])
    assert store.stored() == [("b", 1)]
    assert store.health().num_samples == 1


def test_get_of_what_is_freed_while_it_is_read_is_not_found(opened, monkeypatch):
    """The bytes could be another's by then: a removal does not wait for readers."""
    store = opened()
    ref = put_one(store, "a", filled(64, 1))

    class Racing(Forwarding):
        def batch_get_into(self, *arguments):
            counts = self.inner.batch_get_into(*arguments)
            self.inner.batch_remove([Place.parse(ref.key).object_key], True)
            return counts

    monkeypatch.setattr(store._connection, "_client", Racing(store._connection._client))
    with pytest.raises(FeatureNotFound, match="'a'"):
        store.get([ref])


class Failing(Forwarding):
    """The library, whose first calls fail with these codes; ``None`` lets a call through."""

    def __init__(self, inner, codes):
        super().__init__(inner)
        self.codes = list(codes)

    def batch_put_from(self, keys, *arguments):
        return self._first() or self.inner.batch_put_from(keys, *arguments)

    def batch_get_into(self, keys, *arguments):
        return self._first() or self.inner.batch_get_into(keys, *arguments)

    def batch_remove(self, *arguments):
        return self._first() or self.inner.batch_remove(*arguments)

    def _first(self):
        code = self.codes.pop(0) if self.codes else None
        return None if code is None else [code]


def fail(store, monkeypatch, *codes):
    monkeypatch.setattr(store._connection, "_client", Failing(store._connection._client, codes))


@pytest.mark.parametrize("code", [-800, -900])
def test_calls_are_tried_again_while_a_side_is_away(opened, monkeypatch, code):
    store = opened()
    fail(store, monkeypatch, code, code)
    ref = put_one(store, "a", filled(64, 1))
    fail(store, monkeypatch, code)
    [(tensors, handle)] = store.get([ref])
    assert_same_bits(tensors, filled(64, 1))
    store.release([handle])
    fail(store, monkeypatch, code)
    store.abort([("a", 1)])
    assert store.stored() == []


@pytest.mark.parametrize(("code", "words"), [(-800, "owns the features' memory"), (-900, "master at"), (-707, "lease")])
def test_call_gives_up_after_reconnect_s_and_says_what_is_away(opened, monkeypatch, code, words):
    store = opened(reconnect_s=0.2)
    ref = put_one(store, "a", filled(64, 1))
    fail(store, monkeypatch, *[code] * 1000)
    with pytest.raises(FeatureStoreError, match=words):
        store.get([ref])
    assert store.health().num_handles == 0


@pytest.mark.parametrize(("code", "error"), [(-704, FeatureNotFound), (-703, FeatureNotFound), (-600, CorruptFeature)])
def test_answers_to_a_get_become_errors(opened, monkeypatch, code, error):
    store = opened()
    ref = put_one(store, "a", filled(64, 1))
    fail(store, monkeypatch, code)
    with pytest.raises(error, match="'a'"):
        store.get([ref])


def test_unknown_code_is_an_error_that_names_it(opened, monkeypatch):
    store = opened()
    ref = put_one(store, "a", filled(64, 1))
    fail(store, monkeypatch, -1234)
    with pytest.raises(FeatureStoreError, match="-1234"):
        store.get([ref])
    fail(store, monkeypatch, -1234)
    with pytest.raises(FeatureStoreError, match="-1234"):
        put_one(store, "b", filled(64, 1))
    assert store.stored() == [("a", 1)]
    fail(store, monkeypatch, -1234)
    with pytest.raises(FeatureStoreError, match="-1234"):
        store.abort([("a", 1)])


def test_put_that_was_cut_off_is_not_taken_for_stored(opened, monkeypatch):
    """Mooncake answers 0 to the put of a key that is half-written, and stores nothing."""
    store = opened(reconnect_s=0.3)
    inner = store._connection._client

    class Pretending(Forwarding):
        attempts = 0

        def batch_put_from(self, keys, *arguments):
            self.attempts += 1
            return [-900] if self.attempts == 1 else [0]

    monkeypatch.setattr(store._connection, "_client", Pretending(inner))
    with pytest.raises(FeatureStoreError, match="storing features"):
        put_one(store, "a", filled(64, 1))
    assert store.health().num_samples == 0


def test_budget_counts_what_others_freed(opened):
    store, reader = opened(capacity_bytes=100 * 64), opened()
    for index in range(5):
        store.put([PutRequest(f"s{index}-{number}", 1, filled(64, 1)) for number in range(90)])
        with pytest.raises(FeatureStoreFull):
            put_one(store, "more", filled(11 * 64, 1))
        reader.abort([(f"s{index}-{number}", 1) for number in range(90)])
    assert store.health().live_bytes == 0


def test_what_others_freed_is_forgotten_without_a_budget_too(opened, monkeypatch):
    monkeypatch.setattr(mooncake, "_RECOUNT_AT_LEAST", 8)
    store, reader = opened(), opened()
    for index in range(100):
        put_one(store, f"s{index}", filled(64, 1))
        reader.abort([(f"s{index}", 1)])
        assert len(store._own.of) <= 10


def test_nothing_works_after_close(opened):
    store = opened()
    ref = put_one(store, "a", filled(64, 1))
    store.close()
    for call in (
        lambda: store.get([ref]),
        lambda: store.abort([("a", 1)]),
        lambda: store.live([ref]),
        store.stored,
        store.health,
        store.remove_all,
    ):
        with pytest.raises(FeatureStoreError, match="closed"):
            call()
    store.release([])


def test_close_waits_for_a_call_and_ends_its_retries(opened, monkeypatch):
    store = opened(reconnect_s=60.0)
    ref = put_one(store, "a", filled(64, 1))
    fail(store, monkeypatch, *[-800] * 10_000)
    errors = []

    def read():
        try:
            store.get([ref])
        except FeatureStoreError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    store.close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert "closed" in errors[0]


def test_forked_child_may_not_use_the_store(opened, monkeypatch):
    store = opened()
    ref = put_one(store, "a", filled(64, 1))
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        for call in (lambda: store.get([ref]), lambda: put_one(store, "b", filled(64, 1)), store.stored):
            with pytest.raises(FeatureStoreError, match="fork"):
                call()
        store.close()
    [(_, handle)] = store.get([ref])
    store.release([handle])


def test_master_that_does_not_answer_is_named(service):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(FeatureStoreError, match=f"{address} does not answer.*reconnect_s"):
            MooncakeFeatureStore(MooncakeSettings("run", address, address, reconnect_s=0.2))


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake", None)
    with pytest.raises(MissingExtraError, match=r"specforge\[mooncake\]"):
        MooncakeFeatureStore(MooncakeSettings("run", "127.0.0.1:1", "127.0.0.1:1"))


def test_library_that_cannot_be_loaded_names_the_remedy(monkeypatch):
    package = ModuleType("mooncake")

    def load(name):
        raise ImportError("libibverbs.so.1: cannot open shared object file")

    package.__getattr__ = load
    monkeypatch.setitem(sys.modules, "mooncake", package)
    with pytest.raises(UserError, match="libibverbs1"):
        MooncakeFeatureStore(MooncakeSettings("run", "127.0.0.1:1", "127.0.0.1:1"))
