"""Which stores a capture server opens, how many, and when it lets go of them."""

import shutil
import time
from dataclasses import replace

import pytest
from served_target import arena

from specforge.contracts.capture_server import MooncakeSink, SharedDirSink, SharedMemorySink
from specforge.data_plane.arena import list_arenas
from specforge.data_plane.shared_memory import SHARED_MEMORY
from specforge.inference.serving.jobs import Refused
from specforge.inference.serving.settings import ServingSettings
from specforge.inference.serving.sinks import OpenSinks

MOONCAKE = MooncakeSink("run", "127.0.0.1:1", "127.0.0.1:1", "tcp", "", "P2PHANDSHAKE", 1 << 20, 1.0)


@pytest.fixture
def sinks(engine):
    opened = []

    def make(**settings):
        opened.append(OpenSinks(ServingSettings(**settings), engine.info, lambda: None))
        return opened[-1]

    yield make
    for one in opened:
        one.leave_all()


def refusal(sinks, sink):
    with pytest.raises(Refused) as refused:
        sinks.acquire(sink)
    return refused.value.what, str(refused.value)


def arenas(run_id):
    return list(list_arenas(SHARED_MEMORY, run_id))


def test_a_sink_is_opened_once_and_closed_with_its_features(sinks):
    found, sink = sinks(), arena("sinks-once")
    first = found.acquire(sink)
    assert found.acquire(sink) is first
    assert len(arenas("sinks-once")) > 0
    found.close(sink)
    assert arenas("sinks-once") == []
    with pytest.raises(Refused, match="closed"):
        first.writer.claim([], None)


def test_there_are_no_more_sinks_than_allowed(sinks):
    found = sinks(max_sinks=1)
    found.release(found.acquire(arena("sinks-a")))
    what, reason = refusal(found, arena("sinks-b"))
    assert what == "busy"
    assert "--max-sinks" in reason
    found.close(arena("sinks-a"))
    found.acquire(arena("sinks-b"))
    found.close(arena("sinks-b"))


def test_their_memory_is_bounded(sinks):
    found = sinks(max_feature_bytes=10 << 20)
    found.acquire(arena("sinks-a", 6 << 20))
    assert refusal(found, arena("sinks-b", 6 << 20))[0] == "busy"
    assert refusal(found, arena("sinks-b", 20 << 20))[0] == "request"
    assert refusal(found, replace(MOONCAKE, buffer_bytes=20 << 20))[0] == "request"
    found.close(arena("sinks-a", 6 << 20))


def test_a_sink_that_nobody_uses_is_closed_after_a_while(sinks):
    found = sinks(sink_idle_s=0.0)
    used, idle = arena("sinks-used"), arena("sinks-idle")
    entry = found.acquire(used)
    found.release(found.acquire(idle))
    deadline = time.monotonic() + 60
    while arenas("sinks-idle"):
        assert time.monotonic() < deadline
        found.close_idle()
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
    found.acquire(SharedDirSink("run", str(allowed / "chat")))


def test_a_store_that_cannot_be_opened_leaves_no_trace(sinks):
    found = sinks(max_sinks=1, max_feature_bytes=1 << 49)
    huge = arena("sinks-huge", 2 * shutil.disk_usage(SHARED_MEMORY).total)
    assert refusal(found, huge)[0] == "busy"
    assert arenas("sinks-huge") == []
    found.acquire(arena("sinks-after"))
    found.close(arena("sinks-after"))
