"""SIGKILL in the middle of an asynchronous save: the checkpoint before it is chosen, and nothing else is lost."""

import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from save_kills import state_after

from specforge.training.checkpoint import newest_whole, read_draft_tensors
from specforge.training.checkpointer import Checkpointer

SCRIPT = Path(__file__).with_name("save_kills.py")
NUM_KILLS = 20
SAVES_BEFORE_A_KILL = 3


def words(line):
    event, step = line.split()
    return event, int(step)


def kill_in_a_save(directory, random_numbers):
    """Start the process and kill it at a random moment of a save; the last step that it said is durable."""
    command = [sys.executable, str(SCRIPT), str(directory), "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        durable, num_saves = 0, 0
        try:
            for line in process.stdout:
                event, step = words(line)
                durable = step if event in {"durable", "resumed"} else durable
                num_saves += event == "saving"
                if num_saves == SAVES_BEFORE_A_KILL:
                    break
            time.sleep(random_numbers.uniform(0.0, 0.08))
        finally:
            process.kill()
        for line in process.stdout.read().splitlines(keepends=True):
            if line.endswith("\n"):
                event, step = words(line)
                durable = max(durable, step) if event == "durable" else durable
    return durable


@pytest.mark.full
@pytest.mark.timeout(600)
def test_twenty_kills_in_the_middle_of_a_save_lose_nothing_that_was_complete(tmp_path):
    random_numbers = random.Random(20261121)
    num_torn = 0
    for _ in range(NUM_KILLS):
        durable = kill_in_a_save(tmp_path, random_numbers)
        num_torn += len(list(tmp_path.glob(".step-*.partial")))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a torn checkpoint would be looked at and named
            newest = newest_whole(tmp_path)
        assert newest is not None
        step = newest.position.step
        # renamed and not announced yet, or announced; never older
        assert durable <= step <= durable + 1
        expected, found = state_after(step), {name: torch.zeros_like(t) for name, t in state_after(step).items()}
        Checkpointer(tmp_path).load(newest, found)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        draft = read_draft_tensors(newest)
        assert all(torch.equal(draft[name.removeprefix("master.")], tensor) for name, tensor in expected.items())
    assert num_torn >= NUM_KILLS // 2  # most kills met a save in the middle
