"""SharedDirFeatureStore between real processes, some of which are killed."""

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from specforge.contracts.codec import dumps, loads
from specforge.contracts.refs import SampleRef
from specforge.data_plane import safetensors_file
from specforge.data_plane.base import PutRequest
from specforge.data_plane.shared_dir import SharedDirFeatureStore
from specforge.errors import FeatureNotFound
from specforge.testing.feature_store import assert_same_bits, filled, put_one

RUN = "run"


def work(pipe, directory):
    """A process of the run: does as it is told."""
    store = SharedDirFeatureStore(directory, RUN)
    held = {}
    while True:
        request, *arguments = pipe.recv()
        if request == "end":
            return
        pipe.send(REQUESTS[request](store, held, *arguments))


def put(store, _, name, size, value, generation=1):
    return dumps(put_one(store, name, filled(size, value), generation))


def put_and_die_before_the_rename(store, _):
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.put([PutRequest(name, 1, filled(1000, 1)) for name in ("whole", "torn")])


def put_and_die_between_two_renames(store, _):
    replace = Path.replace

    def dies_at_torn(path, target):
        if target.name.startswith("torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = dies_at_torn
    store.put([PutRequest(name, 1, filled(1000, 1)) for name in ("whole", "torn")])


def put_and_die_while_writing(store, _):
    pieces = safetensors_file._pieces_of

    def dies_in_y(spec, source):
        if spec.name == "y":
            os.kill(os.getpid(), signal.SIGKILL)
        return pieces(spec, source)

    safetensors_file._pieces_of = dies_in_y
    store.put([PutRequest("torn", 1, {"x": filled(1_000_000, 1)["x"], "y": filled(64, 1)["x"]})])


def hold(store, held, text):
    ref = loads(SampleRef, text)
    [(tensors, _)] = store.get([ref])
    held[ref.sample_id] = tensors["x"]
    return int(tensors["x"].long().sum())


REQUESTS = {
    "put": put,
    "put and die before the rename": put_and_die_before_the_rename,
    "put and die between two renames": put_and_die_between_two_renames,
    "put and die while writing": put_and_die_while_writing,
    "abort": lambda store, _, *pairs: store.abort(pairs),
    "live": lambda store, _, *texts: store.live([loads(SampleRef, text) for text in texts]),
    "hold": hold,
    "sum": lambda _, held, name: int(held[name].long().sum()),
}


class Worker:
    def __init__(self, process, pipe):
        self.process, self.pipe = process, pipe

    def ask(self, *request):
        self.pipe.send(request)
        assert self.pipe.poll(60), f"no answer to {request}"
        return self.pipe.recv()

    def dies_of(self, request):
        self.pipe.send((request,))
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL


@pytest.fixture
def start(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = []

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, tmp_path))
        process.start()
        theirs.close()
        workers.append(Worker(process, ours))
        return workers[-1]

    yield start
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.pipe.send(("end",))
        worker.process.join(30)
        worker.process.kill()
        worker.process.join()
        worker.process.close()
        worker.pipe.close()


@pytest.fixture
def store(tmp_path):
    return SharedDirFeatureStore(tmp_path, RUN)


def files(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_samples_pass_between_processes_and_an_abort_of_any_reaches_all(store, start, tmp_path):
    writer, reader = start(), start()
    first, second = (writer.ask("put", name, 1000, 3) for name in ("first", "second"))
    assert reader.ask("hold", first) == reader.ask("hold", second) == 3000
    store.abort([("first", 1)])
    reader.ask("abort", ("second", 1))
    for worker in (writer, reader):
        assert worker.ask("live", first, second) == [False, False]
    with pytest.raises(FeatureNotFound):
        store.get([loads(SampleRef, second)])
    # What was mapped stays, whatever is put afterwards.
    third = writer.ask("put", "first", 1000, 9, 2)
    assert reader.ask("sum", "first") == reader.ask("sum", "second") == 3000
    assert reader.ask("hold", third) == 9000
    assert files(tmp_path) == ["first.2.safetensors"]


@pytest.mark.parametrize("moment", ["put and die before the rename", "put and die while writing"])
def test_writer_killed_in_a_put_shows_nothing_and_the_next_attempt_works(store, start, tmp_path, moment):
    writer, witness = start(), start()
    kept = writer.ask("put", "kept", 1000, 3)
    writer.dies_of(moment)
    assert store.stored() == [("kept", 1)]
    assert witness.ask("live", kept) == [True]
    leftovers = [name for name in files(tmp_path) if name.endswith(".tmp")]
    assert leftovers
    assert store.gc() == len(leftovers)
    assert files(tmp_path) == ["kept.1.safetensors"]
    again = witness.ask("put", "torn", 1000, 5, 2)
    assert_same_bits(store.get([loads(SampleRef, again)])[0][0], filled(1000, 5))
    assert_same_bits(store.get([loads(SampleRef, kept)])[0][0], filled(1000, 3))


def test_writer_killed_while_a_batch_appears_leaves_whole_samples_that_can_be_aborted(store, start, tmp_path):
    writer = start()
    writer.dies_of("put and die between two renames")
    # Nobody has a ref to it: who cleans up after the dead finds it in the list.
    assert store.stored() == [("whole", 1)]
    assert store.gc() == 1
    store.abort(store.stored())
    assert files(tmp_path) == []


def test_gc_leaves_the_put_of_a_live_writer_alone(store, start, tmp_path):
    writer = start()
    os.kill(writer.process.pid, signal.SIGSTOP)
    try:
        path = tmp_path / RUN / "00"
        path.mkdir(parents=True)
        identity = safetensors_file.ProcessIdentity.current()
        stopped = f"{identity.namespace}-{writer.process.pid}-{_start_ticks(writer.process.pid)}"
        (path / f".{safetensors_file._host()}.{stopped}.1.tmp").write_bytes(b"half")
        assert store.gc() == 0
    finally:
        os.kill(writer.process.pid, signal.SIGCONT)
    writer.process.kill()
    writer.process.join()
    assert store.gc() == 1


def _start_ticks(pid):
    return safetensors_file.PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()[19]
