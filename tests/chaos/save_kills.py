"""A process that trains and checkpoints every step, to be killed in the middle of its saves.

``python save_kills.py DIRECTORY NUM_STEPS`` goes on from the newest checkpoint in DIRECTORY, if there is one, and
prints ``saving N`` when the save of step N begins and ``durable N`` when it is complete. The weights after N steps
are those of N multiplications: anybody can say what a checkpoint must hold.
"""

import sys
import threading
from pathlib import Path

import torch

from specforge.training.checkpoint import Provenance, TrainPosition
from specforge.training.checkpointer import Checkpointer, Snapshot

NUM_TENSORS, ROWS, COLUMNS = 8, 512, 512


def state_after(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"master.layer{number}": torch.randn(ROWS, COLUMNS, generator=generator) + step for number in range(NUM_TENSORS)
    }


def main(directory: Path, num_steps: int) -> None:
    checkpointer, lock = Checkpointer(directory, keep_last=2), threading.Lock()
    state, step = state_after(0), 0
    newest = checkpointer.latest()
    if newest is not None:
        checkpointer.load(newest, state)
        step = newest.position.step

    def say(text: str) -> None:
        with lock:
            print(text, flush=True)

    say(f"resumed {step}")
    for following in range(step + 1, num_steps + 1):
        expected = state_after(following)
        for name, tensor in state.items():
            tensor.copy_(expected[name])  # the optimizer step: in place, while the save before may still be written
        say(f"saving {following}")
        draft = {name.removeprefix("master."): tensor for name, tensor in state.items()}
        snapshot = Snapshot(TrainPosition(following, 4 * following), Provenance({}, {}, {}), draft, state)
        checkpointer.save(snapshot, lambda done=following: say(f"durable {done}"))
    checkpointer.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
