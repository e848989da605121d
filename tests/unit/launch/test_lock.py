import subprocess
import sys

import pytest

from specforge.errors import ConfigError
from specforge.launch.lock import is_locked, run_lock

LEAVE_A_CHILD = """
import os, subprocess, sys
from pathlib import Path
from specforge.launch.lock import run_lock

with run_lock(Path(sys.argv[1])) as lock:
    subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], pass_fds=[lock])
    print("locked", flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_directory_is_held_by_one_run_and_looking_at_it_changes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    assert not is_locked(run_dir)
    assert not run_dir.exists()
    with run_lock(run_dir):
        assert is_locked(run_dir)
        with pytest.raises(ConfigError, match="in use by another process"), run_lock(run_dir):
            pass
    assert not is_locked(run_dir)
    with run_lock(run_dir):
        pass


def test_the_children_of_a_killed_run_are_waited_for(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", LEAVE_A_CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"locked\n"
    parent.wait()
    assert is_locked(tmp_path)
    assert parent.stdin is not None
    parent.stdin.close()  # lets the child end
    with run_lock(tmp_path):
        pass
    parent.stdout.close()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_a_directory_is_refused_in_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose one that can be written"), run_lock(tmp_path / place):
        pass
