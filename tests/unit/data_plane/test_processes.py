import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from specforge.data_plane import processes
from specforge.data_plane.arena import ArenaName
from specforge.data_plane.processes import ProcessIdentity
from specforge.data_plane.tombstones import Tombstones


def test_this_process_is_alive_and_survives_its_text():
    me = ProcessIdentity.current()
    assert not me.is_dead()
    assert ProcessIdentity.parse(str(me)) == me
    assert ProcessIdentity.parse("1-2") is None
    assert ProcessIdentity.parse("1-2-x") is None


def test_reused_pid_is_another_process():
    me = ProcessIdentity.current()
    assert dataclasses.replace(me, start_ticks=me.start_ticks + 1).is_dead()


def test_process_of_another_namespace_counts_as_alive():
    assert not ProcessIdentity(1, 2**30, 1).is_dead()


def test_killed_child_is_dead_before_and_after_its_parent_noticed():
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1)
    with child:
        child.stdout.readline()
        me = ProcessIdentity.current()
        start = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        identity = ProcessIdentity(me.namespace, child.pid, start)
        assert not identity.is_dead()
        child.kill()
        assert child.stdout.read() == b""
        deadline = time.monotonic() + 30
        while not identity.is_dead():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.wait(timeout=30)
        assert identity.is_dead()


def test_arena_name_survives_its_text():
    name = ArenaName.new("my-run_1")
    assert ArenaName.parse(str(name)) == name
    for other in (
        "specforge.run",
        "specforge.run.1-2-3.xyz",
        "other.run.1-2-3.00000000",
        "specforge.a/b.1-2-3.00000000",
    ):
        assert ArenaName.parse(other) is None


def test_tombstones_forget_the_oldest():
    tombstones = Tombstones(limit=2)
    for generation in (1, 2, 1, 3):
        tombstones.add(("a", generation))
    assert [("a", generation) in tombstones for generation in (1, 2, 3)] == [True, False, True]


def test_without_a_proc_file_system_the_pid_alone_names_a_process(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert not ProcessIdentity.current().is_dead()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert ProcessIdentity(0, child.pid, 0).is_dead()
