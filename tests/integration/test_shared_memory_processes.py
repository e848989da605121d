"""SharedMemoryFeatureStore between real processes, some of which are killed."""

import contextlib
import mmap
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from children import child_process

from specforge.contracts.codec import dumps, loads
from specforge.contracts.refs import SampleRef
from specforge.data_plane import arena, arena_space, arena_writer
from specforge.data_plane.base import PutRequest
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore, collect_orphans
from specforge.errors import FeatureNotFound, FeatureStoreError, FeatureStoreFull
from specforge.testing.feature_store import assert_same_bits, filled, make_ref, put_one

RUN = "run"
CAPACITY = 1 << 20
LARGEST = CAPACITY // 64
"""Bytes of the largest sample: four pages of the arena."""
SAMPLES = {
    "bf16": {"x": torch.arange(500).to(torch.bfloat16).reshape(20, 25), "y": torch.tensor([True, False])},
    "fp8": {"x": torch.arange(100).to(torch.float8_e4m3fn), "ids": torch.arange(7, dtype=torch.int32)},
}


class DiesHere:
    """Stands for columns whose copy never ends: the writer dies in the middle of a put."""

    dtype, shape = torch.uint8, (64, 1)

    @property
    def parts(self):
        os.kill(os.getpid(), 9)


class StopsHere(DiesHere):
    """The same, only that the writer stops for the time being."""

    @property
    def parts(self):
        os.kill(os.getpid(), signal.SIGSTOP)
        return (torch.ones(64, 1, dtype=torch.uint8),)


def write(pipe, directory):
    """A writer process: puts ``SAMPLES``, then does as it is told."""
    store = SharedMemoryFeatureStore.create(RUN, CAPACITY, directory=directory)
    for name, tensors in SAMPLES.items():
        pipe.send(dumps(put_one(store, name, tensors)))
    while True:
        request, *arguments = pipe.recv()
        if request in ("close", "leave"):
            getattr(store, request)()
            return
        pipe.send(REQUESTS[request](store, pipe, *arguments))


def put_all(store, pipe, *samples):
    return [dumps(put_one(store, name, filled(size, value))) for name, size, value in samples]


def put_and_die(store, pipe):
    store.put([PutRequest("whole", 1, filled(64, 1)), PutRequest("torn", 1, {"x": DiesHere()})])


def put_and_stop(store, pipe):
    store.put([PutRequest("whole", 1, filled(64, 1)), PutRequest("torn", 1, {"x": StopsHere()})])
    return "went on"


def put_and_die_between_two_entries(store, pipe):
    arena_writer.digest = dies_for("torn", arena_writer.digest)
    store.put([PutRequest(name, 1, filled(64, 1)) for name in ("whole", "torn")])


def put_with_moves(store, pipe):
    """The moves that make room are carried out only when the other side has had its turn after they were planned."""
    plan = arena_space.plan_moves

    def announced(*arguments):
        moves = plan(*arguments)
        pipe.send(moves)
        pipe.recv()
        return moves

    arena_space.plan_moves = announced
    with contextlib.suppress(FeatureStoreFull):
        put_one(store, "large", filled(LARGEST, 1))
    return "moved"


REQUESTS = {
    "put": put_all,
    "put and die": put_and_die,
    "put and stop": put_and_stop,
    "put and die between two entries": put_and_die_between_two_entries,
    "put with moves": put_with_moves,
    "abort": lambda store, pipe, *samples: store.abort(samples),
    "health": lambda store, pipe: store.health(),
}


def dies_for(name, digest):
    def dying(sample_id):
        if sample_id == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return digest(sample_id)

    return dying


def die_half_made(pipe, directory):
    """A writer that dies while the pages of its arena are being reserved."""
    arena._reserve = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    SharedMemoryFeatureStore.create(RUN, CAPACITY, directory=directory)


def read(pipe, directory):
    store = SharedMemoryFeatureStore.attach(RUN, directory)
    held = None
    while True:
        request, *arguments = pipe.recv()
        if request == "hold":
            [(held, _)] = store.get([loads(SampleRef, arguments[0])])
            pipe.send(int(held["x"].view(torch.uint8).sum()))
        elif request == "sum":
            pipe.send(int(held["x"].view(torch.uint8).sum()))
        elif request == "live":
            pipe.send(store.live([loads(SampleRef, text) for text in arguments]))
        elif request == "abort":
            store.abort([arguments])
            pipe.send("aborted")
        else:
            store.close()
            return


def collect_over_and_over(pipe, directory):
    """As a second collector beside the test, until it is told to end."""
    store = SharedMemoryFeatureStore.attach(RUN, directory)
    pipe.send("collecting")
    while not pipe.poll():
        store.gc()
    store.close()


@pytest.fixture
def directory():
    """A directory of this test's own in shared memory, which must be empty but for arenas of the dead in the end."""
    with tempfile.TemporaryDirectory(prefix="specforge-test-", dir=SHARED_MEMORY) as name:
        yield Path(name)
        collect_orphans(RUN, Path(name))
        assert files(Path(name)) == []


@pytest.fixture
def attach(directory):
    return lambda: SharedMemoryFeatureStore.attach(RUN, directory)


@pytest.fixture
def create(directory):
    return lambda: SharedMemoryFeatureStore.create(RUN, CAPACITY, directory=directory)


def process(target, directory):
    return child_process(target, directory, preload=["specforge.data_plane.shared_memory", __name__])


@contextlib.contextmanager
def writer_process(directory):
    """A writer with the refs of ``SAMPLES``, which it has put."""
    with process(write, directory) as (writer, pipe):
        yield writer, pipe, [loads(SampleRef, receive(pipe)) for _ in SAMPLES]


def kill(child):
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def put(pipe, *samples):
    pipe.send(("put", *samples))
    return [loads(SampleRef, text) for text in receive(pipe)]


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def resident_bytes(directory):
    return sum(path.lstat().st_blocks * 512 for path in directory.iterdir())


def assert_reads(store, ref, expected):
    [(tensors, handle)] = store.get([ref])
    assert_same_bits(tensors, expected)
    store.release([handle])


def receive(pipe):
    assert pipe.poll(60), "the other process said nothing for a minute"
    return pipe.recv()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reader_sees_the_bits_of_another_process_and_frees_there(directory, attach):
    with writer_process(directory) as (writer, pipe, refs):
        store = attach()
        lent = store.get(refs)
        for (tensors, _), expected in zip(lent, SAMPLES.values(), strict=True):
            assert_same_bits(tensors, expected)
        store.abort([("bf16", 1), ("fp8", 1)])
        store.release([lent[0][1]])
        pipe.send(("health",))
        health = receive(pipe)
        assert (health.num_samples, health.num_handles, health.live_bytes) == (0, 1, refs[1].num_bytes)
        store.release([lent[1][1]])
        pipe.send(("health",))
        assert receive(pipe).live_bytes == 0
        store.close()
        pipe.send(("close",))
        writer.join(60)
        assert writer.exitcode == 0


def test_killed_writer_leaves_held_tensors_whole_and_an_orphan_to_collect(directory, attach):
    with writer_process(directory) as (writer, _, refs):
        store = attach()
        [(held, handle)] = store.get(refs[:1])
        assert collect_orphans(RUN, directory) == 0
        kill(writer)
        assert_reads(store, refs[1], SAMPLES["fp8"])
        assert store.gc() == 0
        assert collect_orphans(RUN, directory) == 1
        assert_same_bits(held, SAMPLES["bf16"])
        late = attach()
        assert late.live(refs) == [False, False]
        with pytest.raises(FeatureNotFound, match="'bf16'"):
            late.get(refs[:1])
        store.release([handle])
        store.close()
        assert_same_bits(held, SAMPLES["bf16"])


def test_samples_outlive_writer_and_readers_and_are_adopted_by_who_comes_later(directory, attach, create):
    with writer_process(directory) as (writer, _, refs), process(read, directory) as (reader, pipe):
        pipe.send(("hold", dumps(refs[0])))
        receive(pipe)
        kill(writer)
        pipe.send(("live", *[dumps(ref) for ref in refs]))
        assert receive(pipe) == [True, True]
        kill(reader)
        successor = create()
        third = put_one(successor, "third", filled(64, 1))
        adopting = attach()
        assert adopting.live([*refs, third]) == [True, True, True]
        assert sorted(adopting.stored()) == [("bf16", 1), ("fp8", 1), ("third", 1)]
        assert adopting.gc() == 0
        for ref, expected in zip(refs, SAMPLES.values(), strict=True):
            assert_reads(adopting, ref, expected)
        adopting.close()
        successor.close()


def test_abort_in_an_arena_of_a_dead_writer_is_final_for_everybody(directory, attach):
    with writer_process(directory) as (writer, _, refs), process(read, directory) as (reader, pipe):
        other = attach()
        assert other.live(refs) == [True, True]
        kill(writer)
        pipe.send(("abort", "bf16", 1))
        assert receive(pipe) == "aborted"
        assert other.live(refs) == [False, True]
        kill(reader)
        late = attach()
        for store in (other, late):
            assert store.gc() <= 1
            assert store.live(refs) == [False, True]
            assert store.stored() == [("fp8", 1)]
            with pytest.raises(FeatureNotFound, match="'bf16'"):
                store.get(refs[:1])
        other.close()
        late.close()


def test_arena_of_a_dead_writer_goes_when_its_samples_are_freed(directory, attach):
    with writer_process(directory) as (writer, _, refs):
        store = attach()
        store.release([handle for _, handle in store.get(refs)])
        kill(writer)
        store.gc()
        assert store.health().num_samples == 2
        store.abort([(name, 1) for name in SAMPLES])
        assert store.gc() == 2
        assert store.health().capacity_bytes == 0
        assert files(directory) == []
        store.close()


def test_arena_of_a_dead_writer_costs_what_is_wanted_of_it(directory, attach):
    with writer_process(directory) as (writer, pipe, _):
        many = put(pipe, *[(f"s{index}", LARGEST, index) for index in range(60)])
        kill(writer)
        store = attach()
        store.abort([(name, 1) for name in SAMPLES])
        store.gc()
        with_all = resident_bytes(directory)
        assert with_all > CAPACITY
        [(held, handle)] = store.get(many[1:2])
        store.abort([(ref.sample_id, 1) for ref in many[:50]])
        assert store.gc() == 49
        # One of the 50 is held, and the pages at the edges may hold bytes of neighbours.
        assert resident_bytes(directory) <= with_all - 48 * LARGEST
        assert_same_bits(held, filled(LARGEST, 1))
        for index in range(50, 60):
            assert_reads(store, many[index], filled(LARGEST, index))
        shrunk = resident_bytes(directory)
        store.release([handle])
        assert store.gc() == 1
        assert resident_bytes(directory) <= shrunk - LARGEST + 2 * mmap.PAGESIZE
        assert sorted(store.stored()) == sorted((f"s{index}", 1) for index in range(50, 60))
        for index in range(50, 60):
            assert_reads(store, many[index], filled(LARGEST, index))
        store.abort(store.stored())
        assert store.gc() == 10
        assert files(directory) == []
        store.close()


def test_what_another_process_holds_in_an_arena_of_a_dead_writer_stays_whole(directory, attach):
    with writer_process(directory) as (writer, pipe, _), process(read, directory) as (reader, reading):
        [held, _] = put(pipe, ("held", LARGEST, 3), ("other", LARGEST, 4))
        reading.send(("hold", dumps(held)))
        assert receive(reading) == 3 * LARGEST
        kill(writer)
        store = attach()
        store.abort([("held", 1), *[(name, 1) for name in SAMPLES]])
        store.gc()
        assert store.stored() == [("other", 1)]
        reading.send(("sum",))
        assert receive(reading) == 3 * LARGEST
        before = resident_bytes(directory)
        kill(reader)
        assert store.gc() == 1
        assert resident_bytes(directory) <= before - LARGEST + 2 * mmap.PAGESIZE
        store.abort([("other", 1)])
        store.gc()
        assert files(directory) == []
        store.close()


def test_reader_that_looks_at_the_old_place_of_a_moved_sample_keeps_it_when_the_writer_dies(directory, attach):
    half = LARGEST // 2
    with writer_process(directory) as (writer, pipe, _):
        pipe.send(("abort", *[(name, 1) for name in SAMPLES]))
        receive(pipe)
        refs = put(pipe, *[(str(index), half, index) for index in range(128)])
        pipe.send(("abort", ("0", 1), ("2", 1)))
        receive(pipe)
        # Room for a large one is made by moving the second sample into the place of the first.
        pipe.send(("put with moves",))
        assert receive(pipe) == [(0, 0)]
        store = attach()
        [(old, handle)] = store.get(refs[1:2])
        pipe.send("go on")
        assert receive(pipe) is None
        pipe.send("go on")
        assert receive(pipe) == "moved"
        [(new, _)] = store.get(refs[1:2])
        assert old["x"].data_ptr() == new["x"].data_ptr() + half
        kill(writer)
        store.abort([(str(index), 1) for index in range(128) if index != 3])
        assert store.gc() == 124
        assert_same_bits(old, filled(half, 1))
        assert_same_bits(new, filled(half, 1))
        assert_reads(store, refs[3], filled(half, 3))
        assert store.stored() == [("3", 1)]
        store.release([handle])
        store.close()


@pytest.mark.parametrize("request_name", ["put and die", "put and die between two entries"])
def test_writer_killed_in_a_put_shows_nothing_of_it(directory, attach, request_name):
    with writer_process(directory) as (writer, pipe, refs):
        store = attach()
        store.release([handle for _, handle in store.get(refs)])
        pipe.send((request_name,))
        writer.join(60)
        assert writer.exitcode == -signal.SIGKILL
        assert store.health().num_samples == 2
        assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1)]
        store.gc()
        assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1)]
        store.abort(store.stored())
        store.gc()
        assert files(directory) == []
        store.close()


@pytest.mark.parametrize("ends", ["killed", "continued"])
def test_put_of_a_stopped_writer_shows_nothing_before_it_is_complete(directory, attach, ends):
    with writer_process(directory) as (writer, pipe, refs):
        store = attach()
        pipe.send(("put and stop",))
        stat = Path(f"/proc/{writer.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1)]
        assert store.gc() == 0
        assert store.live(refs) == [True, True]
        if ends == "killed":
            kill(writer)
            store.gc()
            assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1)]
        else:
            os.kill(writer.pid, signal.SIGCONT)
            assert receive(pipe) == "went on"
            assert sorted(store.stored()) == [("bf16", 1), ("fp8", 1), ("torn", 1), ("whole", 1)]
        store.close()


def test_writer_that_leaves_is_read_on_and_its_arena_goes_when_it_is_used_up(directory, attach):
    with writer_process(directory) as (writer, pipe, refs):
        pipe.send(("leave",))
        writer.join(60)
        assert writer.exitcode == 0
        store = attach()
        for ref, expected in zip(refs, SAMPLES.values(), strict=True):
            assert_reads(store, ref, expected)
        store.abort(store.stored())
        assert store.gc() == 2
        assert files(directory) == []
        store.close()


def test_half_made_arena_of_a_dead_writer_is_removed(directory, attach):
    with process(die_half_made, directory) as (writer, _):
        writer.join(60)
        assert writer.exitcode == -signal.SIGKILL
    assert len(files(directory)) == 1
    store = attach()
    assert store.stored() == []
    store.gc()
    assert files(directory) == []
    store.close()


def test_kills_and_restarts_of_writers_and_readers_leave_only_the_living_behind(directory, attach):
    left = []
    for cycle in range(8):
        with (
            writer_process(directory) as (first, first_pipe, _),
            writer_process(directory) as (second, second_pipe, _),
            process(read, directory) as (reader, reading),
        ):
            trainer = attach()
            refs = put(first_pipe, *[(f"first-{cycle}-{index}", LARGEST, index) for index in range(3)])
            refs += put(second_pipe, *[(f"second-{cycle}-{index}", LARGEST, index) for index in range(3)])
            reading.send(("hold", dumps(refs[0])))
            receive(reading)
            for child in (first, second, reader):
                kill(child)
            # Part of what is there was put in the cycle before, and not read since.
            assert trainer.live(left + refs) == [True] * len(left + refs)
            for ref in left + refs[:2]:
                assert_reads(trainer, ref, filled(LARGEST, int(ref.sample_id[-1])))
            trainer.abort([(ref.sample_id, 1) for ref in left + refs[:2]] + [(name, 1) for name in SAMPLES])
            trainer.gc()
            left = refs[2:]
            assert sorted(trainer.stored()) == sorted((ref.sample_id, 1) for ref in left)
            assert {name.partition(".lane-")[0] for name in files(directory)} == arenas_of(left)
            trainer.close()
    with writer_process(directory) as (_, _, refs):
        trainer = attach()
        trainer.abort([(ref.sample_id, 1) for ref in left])
        trainer.gc()
        assert {name.partition(".lane-")[0] for name in files(directory)} == arenas_of(refs)
        trainer.close()


def arenas_of(refs):
    return {ref.key.partition(":")[0] for ref in refs}


def test_two_collectors_and_a_reader_agree_about_an_arena_of_a_dead_writer(directory, attach):
    with writer_process(directory) as (writer, pipe, _), process(collect_over_and_over, directory) as (_, collecting):
        refs = put(pipe, *[(f"s{index}", 63 * 64 + 64 * index, index + 1) for index in range(100)])
        assert receive(collecting) == "collecting"
        kill(writer)
        store = attach()
        store.abort([(name, 1) for name in SAMPLES])
        for position, ref in enumerate(refs):
            [(tensors, handle)] = store.get([ref])
            store.abort([(ref.sample_id, 1)])
            store.gc()
            assert_same_bits(tensors, filled(ref.num_bytes, position + 1))
            store.release([handle])
        store.close()
        collecting.send("end")
        wait_until(lambda: files(directory) == [])


def test_writer_reclaims_what_a_killed_reader_held(directory, attach, create):
    store = create()
    ref = put_one(store, "a", filled(640, 1))
    with process(read, directory) as (reader, pipe):
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


def test_gc_of_one_reader_ends_the_holds_of_a_killed_one(directory, attach, create):
    store = create()
    ref = put_one(store, "a", filled(640, 1))
    other = attach()
    with process(read, directory) as (reader, pipe):
        pipe.send(("hold", dumps(ref)))
        receive(pipe)
        assert other.live([ref]) == [True]
        store.abort([("a", 1)])
        assert store.health().live_bytes == 640
        kill(reader)
        other.gc()
        assert len(files(directory)) == 1 + 2
        put_one(store, "next", filled(64, 1))
        assert store.health().live_bytes == 64
    other.close()
    store.close()


def test_full_store_takes_back_what_a_killed_reader_held_before_it_refuses(directory, attach, create):
    store = create()
    refs = [put_one(store, str(index), filled(CAPACITY // 64, index)) for index in range(64)]
    with process(read, directory) as (reader, pipe):
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


def test_abort_of_one_reader_is_seen_by_another_before_the_writer_acts(directory, attach, create):
    store = create()
    ref = put_one(store, "a", filled(640, 1))
    other = attach()
    with process(read, directory) as (reader, pipe):
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


def test_moving_writer_never_shows_a_reader_torn_bytes(directory, attach, create):
    store = create()
    size = CAPACITY // 64 // 4
    refs = [put_one(store, str(index), filled(size, 1)) for index in range(256)]
    store.abort([(str(index), 1) for index in range(0, 256, 2)])
    with process(read_over_and_over, directory) as (_, pipe):
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


def read_over_and_over(pipe, directory):
    store = SharedMemoryFeatureStore.attach(RUN, directory)
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


def test_store_of_the_parent_is_refused_in_a_forked_child(directory, attach, create):
    store = create()
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
