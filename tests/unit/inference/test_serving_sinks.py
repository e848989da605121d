"""Which stores a capture server opens, how many, and when it lets go of them."""

import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from served_target import WAIT_S, arena

from specforge.contracts.capture_server import MooncakeSink, SharedDirSink, SharedMemorySink
from specforge.data_plane.arena import list_arenas
from specforge.data_plane.base import PutRequest
from specforge.data_plane.shared_memory import SHARED_MEMORY
from specforge.data_plane.sinks import open_sink
from specforge.errors import FeatureStoreError
from specforge.inference.serving import sinks as sinks_module
from specforge.inference.serving.jobs import Refused
from specforge.inference.serving.settings import ServingSettings
from specforge.inference.serving.sinks import OPEN_S, OpenSinks

MOONCAKE = MooncakeSink("run", "127.0.0.1:1", "127.0.0.1:1", "tcp", "", "P2PHANDSHAKE", 1 << 20, 1.0)


@pytest.fixture
def sinks(engine):
    opened = []

    def make(**settings):
        opened.append(OpenSinks(ServingSettings(**settings), engine.info, lambda: None, lambda error: None))
        return opened[-1]

    yield make
    for one in opened:
        one.leave_all()


def acquire(sinks, sink):
    """The sink, open."""
    entry = sinks.acquire(sink, time.monotonic())
    entry.wait(WAIT_S)
    return entry


def wait_until(is_so):
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refusal(sinks, sink):
    with pytest.raises(Refused) as refused:
        acquire(sinks, sink)
    return refused.value.what, str(refused.value)


def arenas(run_id):
    return list(list_arenas(SHARED_MEMORY, run_id))


def test_a_sink_is_opened_once_and_closed_with_its_features(sinks):
    found, sink = sinks(), arena("sinks-once")
    first = acquire(found, sink)
    assert acquire(found, sink) is first
    assert len(arenas("sinks-once")) > 0
    found.close(sink)
    assert arenas("sinks-once") == []
    with pytest.raises(Refused, match="closed"):
        first.writer.claim([], None)


def test_there_are_no_more_sinks_than_allowed(sinks):
    found = sinks(max_sinks=1)
    found.release(acquire(found, arena("sinks-a")))
    what, reason = refusal(found, arena("sinks-b"))
    assert what == "busy"
    assert "--max-sinks" in reason
    found.close(arena("sinks-a"))
    acquire(found, arena("sinks-b"))
    found.close(arena("sinks-b"))


def test_their_memory_is_bounded(sinks):
    found = sinks(max_feature_bytes=10 << 20)
    acquire(found, arena("sinks-a", 6 << 20))
    assert refusal(found, arena("sinks-b", 6 << 20))[0] == "busy"
    assert refusal(found, arena("sinks-b", 20 << 20))[0] == "request"
    assert refusal(found, replace(MOONCAKE, buffer_bytes=20 << 20))[0] == "request"
    found.close(arena("sinks-a", 6 << 20))


def test_a_sink_that_nobody_uses_is_closed_after_a_while(sinks):
    found = sinks(sink_idle_s=0.0)
    used, idle = arena("sinks-used"), arena("sinks-idle")
    entry = acquire(found, used)
    found.release(acquire(found, idle))
    wait_until(lambda: found.close_idle() or not arenas("sinks-idle"))
    assert arenas("sinks-used")
    found.release(entry)
    found.close(used)


@pytest.mark.parametrize(
    "sink",
    [
        arena("a/b"),
        SharedMemorySink("r", 4095, 1),
        SharedMemorySink("r", 1 << 20, 0),
        SharedMemorySink("r", -5, 5),
        SharedMemorySink("r", 1 << 20, 1 << 60),
        replace(MOONCAKE, buffer_bytes=0),
        replace(MOONCAKE, reconnect_s=1e9),
    ],
)
def test_sizes_and_names_that_no_store_has_are_refused(sinks, sink):
    assert refusal(sinks(), sink)[0] == "request"


def test_files_are_written_below_named_directories_only(sinks, tmp_path):
    allowed, other = tmp_path / "features", tmp_path / "elsewhere"
    what, reason = refusal(sinks(), SharedDirSink("run", str(allowed)))
    assert what == "request"
    assert f"--feature-dir {allowed}" in reason
    found = sinks(feature_dirs=(allowed,))
    assert "shared_dir" in found.kinds
    outside = [str(other), str(allowed / ".." / "elsewhere"), "features", f"{allowed}\0", f"{allowed}-more"]
    assert [refusal(found, SharedDirSink("run", path))[0] for path in outside] == ["request"] * len(outside)
    assert refusal(found, SharedDirSink("../run", str(allowed)))[0] == "request"
    (allowed).mkdir()
    (allowed / "out").symlink_to(tmp_path)
    assert refusal(found, SharedDirSink("run", str(allowed / "out" / "x")))[0] == "request"
    acquire(found, SharedDirSink("run", str(allowed / "chat")))


def test_a_store_that_cannot_be_opened_leaves_no_trace(sinks):
    found = sinks(max_sinks=1, max_feature_bytes=1 << 49)
    huge = arena("sinks-huge", 2 * shutil.disk_usage(SHARED_MEMORY).total)
    assert refusal(found, huge)[0] == "busy"
    assert arenas("sinks-huge") == []
    acquire(found, arena("sinks-after"))
    found.close(arena("sinks-after"))


def put_one(entry):
    entry.writer.store.put([PutRequest("a", 1, {"input_ids": torch.zeros(3, dtype=torch.int32)})])


def test_a_sink_with_features_is_not_closed_until_another_needs_its_room(sinks):
    found = sinks(sink_idle_s=0.0, max_sinks=1)
    kept, other = arena("sinks-kept"), arena("sinks-other")
    entry = acquire(found, kept)
    put_one(entry)
    found.release(entry)
    found.close_idle()
    assert acquire(found, kept) is entry
    assert refusal(found, other)[0] == "busy"
    found.release(entry)
    time.sleep(0.001)  # the clock's next tick
    found.release(acquire(found, other))
    wait_until(lambda: not arenas("sinks-kept"))
    found.close(other)


def test_a_broken_store_counts_once_and_not_against_its_successor(sinks):
    found = sinks(max_feature_bytes=10 << 20)
    sink = arena("sinks-broken", 6 << 20)
    for _ in range(3):
        entry = acquire(found, sink)
        put_one(entry)
        for _ in range(2):
            entry.writer._on_broken(FeatureStoreError("on fire"))
    assert len(found._entries()) == 1
    what, reason = refusal(found, arena("sinks-b", 6 << 20))
    assert what == "busy"
    assert "--max-feature-bytes" in reason
    found.close(sink)
    wait_until(lambda: not arenas("sinks-broken"))
    # told late
    entry.writer._on_broken(FeatureStoreError("on fire"))
    assert found._entries() == []


def test_a_run_is_over_for_all_its_sinks(sinks):
    found = sinks()
    small, large = arena("sinks-twice", 1 << 20), arena("sinks-twice", 2 << 20)
    acquire(found, small)
    acquire(found, large)
    found.close(large)
    assert arenas("sinks-twice") == []


def test_a_store_that_takes_long_to_open_holds_up_nobody_else(sinks, monkeypatch):
    go = threading.Event()

    def opened(sink, host):
        if isinstance(sink, MooncakeSink):
            assert sink.reconnect_s <= OPEN_S
            assert go.wait(WAIT_S)
            raise FeatureStoreError("no master")
        return open_sink(sink, host)

    monkeypatch.setattr(sinks_module, "open_sink", opened)
    found = sinks()
    entries = [found.acquire(replace(MOONCAKE, reconnect_s=3600.0), time.monotonic()) for _ in range(50)]
    with pytest.raises(Refused, match="not open") as refused:
        entries[0].wait(0.0)
    assert refused.value.what == "busy"
    acquire(found, arena("sinks-quick"))
    found.close(arena("sinks-quick"))
    found.close(entries[0].sink)
    go.set()
    with pytest.raises(Refused, match="no master"):
        entries[0].wait(WAIT_S)
