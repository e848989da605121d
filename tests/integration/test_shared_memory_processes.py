"""SharedMemoryFeatureStore between real processes, some of which are killed."""

import contextlib
import multiprocessing
import os
import time
import uuid

import pytest
import torch

from specforge.contracts.codec import dumps, loads
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore, collect_orphans
from specforge.errors import FeatureNotFound, FeatureStoreError, FeatureStoreFull
from specforge.testing.feature_store import assert_same_bits, filled, make_ref, put_one

CAPACITY = 1 << 20
SAMPLES = {
    "bf16": {"x": torch.arange(500).to(torch.bfloat16).reshape(20, 25), "y": torch.tensor([True, False])},
    "fp8": {"x": torch.arange(100).to(torch.float8_e4m3fn), "ids": torch.arange(7, dtype=torch.int32)},
}


class DiesHere:
    """Stands for a tensor whose copy never ends: the writer dies in the middle of a put."""

    dtype, shape = torch.uint8, (64,)

    def detach(self):
        os.kill(os.getpid(), 9)


def write(pipe, run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    for name, tensors in SAMPLES.items():
        pipe.send(dumps(put_one(store, name, tensors)))
    while True:
        request = pipe.recv()
        if request == "die in a put":
            store.put([PutRequest("whole", 1, filled(64, 1)), PutRequest("torn", 1, {"x": DiesHere()})])
        elif request == "health":
            pipe.send(store.health())
        else:
            store.close()
            return


def read(pipe, run_id):
    store = SharedMemoryFeatureStore.attach(run_id)
    while True:
        request, *arguments = pipe.recv()
        if request == "hold":
            [(tensors, _)] = store.get([loads(SampleRef, arguments[0])])
            pipe.send(int(tensors["x"].view(torch.uint8).sum()))
        elif request == "abort":
            store.abort([arguments])
            pipe.send("aborted")
        else:
            store.close()
            return


@pytest.fixture
def run_id():
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    yield run_id
    collect_orphans(run_id)
    assert list(SHARED_MEMORY.glob(f"*{run_id}*")) == []


@contextlib.contextmanager
def process(target, run_id):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, run_id))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join()
        ours.close()


def receive(pipe):
    assert pipe.poll(60), "the other process said nothing for a minute"
    return pipe.recv()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reader_sees_the_bits_of_another_process_and_frees_there(run_id):
    with process(write, run_id) as (writer, pipe):
        refs = [loads(SampleRef, receive(pipe)) for _ in SAMPLES]
        store = SharedMemoryFeatureStore.attach(run_id)
        lent = store.get(refs)
        for (tensors, _), expected in zip(lent, SAMPLES.values(), strict=True):
            assert_same_bits(tensors, expected)
        store.abort([("bf16", 1), ("fp8", 1)])
        store.release([lent[0][1]])
        pipe.send("health")
        health = receive(pipe)
        assert (health.num_samples, health.num_handles, health.live_bytes) == (0, 1, refs[1].num_bytes)
        store.release([lent[1][1]])
        pipe.send("health")
        assert receive(pipe).live_bytes == 0
        store.close()
        pipe.send("end")
        writer.join(60)
        assert writer.exitcode == 0


def test_killed_writer_leaves_held_tensors_whole_and_an_orphan_to_collect(run_id):
    with process(write, run_id) as (writer, pipe):
        refs = [loads(SampleRef, receive(pipe)) for _ in SAMPLES]
        store = SharedMemoryFeatureStore.attach(run_id)
        [(held, handle)] = store.get(refs[:1])
        assert collect_orphans(run_id) == 0
        writer.kill()
        writer.join()
        assert_same_bits(store.get(refs[1:])[0][0], SAMPLES["fp8"])
        assert store.gc() == 0
        assert collect_orphans(run_id) == 1
        assert_same_bits(held, SAMPLES["bf16"])
        late = SharedMemoryFeatureStore.attach(run_id)
        with pytest.raises(FeatureNotFound, match="'bf16'"):
            late.get(refs[:1])
        store.release([handle])
        store.close()
        assert_same_bits(held, SAMPLES["bf16"])


def test_arena_of_a_dead_writer_goes_when_its_samples_are_freed(run_id):
    with process(write, run_id) as (writer, pipe):
        refs = [loads(SampleRef, receive(pipe)) for _ in SAMPLES]
        store = SharedMemoryFeatureStore.attach(run_id)
        store.release([handle for _, handle in store.get(refs)])
        writer.kill()
        writer.join()
        store.gc()
        assert store.health().num_samples == 2
        store.abort([(name, 1) for name in SAMPLES])
        store.gc()
        assert store.health().capacity_bytes == 0
        assert list(SHARED_MEMORY.glob(f"*{run_id}*")) == []
        store.close()


def test_writer_killed_in_a_put_shows_nothing_of_it(run_id):
    with process(write, run_id) as (writer, pipe):
        refs = [loads(SampleRef, receive(pipe)) for _ in SAMPLES]
        store = SharedMemoryFeatureStore.attach(run_id)
        store.release([handle for _, handle in store.get(refs)])
        pipe.send("die in a put")
        writer.join(60)
        assert writer.exitcode == -9
        assert store.health().num_samples == 2
        store.close()


def test_writer_reclaims_what_a_killed_reader_held(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    ref = put_one(store, "a", filled(640, 1))
    with process(read, run_id) as (reader, pipe):
        pipe.send(("hold", dumps(ref)))
        assert receive(pipe) == 640
        store.abort([("a", 1)])
        store.gc()
        assert (store.health().live_bytes, store.health().num_handles) == (640, 1)
        os.kill(reader.pid, 9)
        # Not joined: to its parent the reader is a zombie, to the store it is dead.
        wait_until(lambda: store.gc() == 1)
        assert (store.health().live_bytes, store.health().num_handles) == (0, 0)
    store.close()


def test_full_store_takes_back_what_a_killed_reader_held_before_it_refuses(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    refs = [put_one(store, str(index), filled(CAPACITY // 64, index)) for index in range(64)]
    with process(read, run_id) as (reader, pipe):
        for ref in refs:
            pipe.send(("hold", dumps(ref)))
            receive(pipe)
        store.abort([(str(index), 1) for index in range(64)])
        assert store.health().live_bytes == CAPACITY
        reader.kill()
        reader.join()
        put_one(store, "next", filled(CAPACITY // 64, 1))
    assert store.health().live_bytes == CAPACITY // 64
    store.close()


def test_abort_of_one_reader_is_seen_by_another_before_the_writer_acts(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    ref = put_one(store, "a", filled(640, 1))
    other = SharedMemoryFeatureStore.attach(run_id)
    with process(read, run_id) as (reader, pipe):
        pipe.send(("abort", "a", 1))
        assert receive(pipe) == "aborted"
        with pytest.raises(FeatureNotFound):
            other.get([ref])
        pipe.send(("end",))
        reader.join(60)
        assert reader.exitcode == 0
    assert store.gc() == 1
    assert store.health().live_bytes == 0
    other.close()
    store.close()


def test_moving_writer_never_shows_a_reader_torn_bytes(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    size = CAPACITY // 64 // 4
    refs = [put_one(store, str(index), filled(size, 1)) for index in range(256)]
    store.abort([(str(index), 1) for index in range(0, 256, 2)])
    with process(read_over_and_over, run_id) as (_, pipe):
        pipe.send([dumps(ref) for ref in refs[1::2]])
        assert receive(pipe) == "reading"
        num_put = 0
        for cycle in range(400):
            name = f"large{cycle % 12}"
            store.abort([(name, cycle - 12)])
            # The gaps are a quarter as large: only moving the samples that are being read makes room.
            with contextlib.suppress(FeatureStoreFull):
                put_one(store, name, filled(4 * size - 64 * (cycle % 7), 2), generation=cycle)
                num_put += 1
        pipe.send("end")
        assert receive(pipe) > 0
        assert num_put > 300
    store.close()


def read_over_and_over(pipe, run_id):
    store = SharedMemoryFeatureStore.attach(run_id)
    refs = [loads(SampleRef, text) for text in pipe.recv()]
    num_read = 0
    pipe.send("reading")
    while not pipe.poll():
        for ref in refs[num_read % 7 :: 7]:
            [(tensors, handle)] = store.get([ref])
            assert bool((tensors["x"] == 1).all())
            store.release([handle])
            num_read += 1
    store.close()
    pipe.send(num_read)


def test_store_of_the_parent_is_refused_in_a_forked_child(run_id):
    store = SharedMemoryFeatureStore.create(run_id, CAPACITY)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.get([make_ref("a", 1, store.put([])[0])])
        except FeatureStoreError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"before a fork" in os.read(reading, 1000)
    os.close(reading)
    os.close(writing)
    store.close()
