"""Drafts of the demo's target, trained long enough to be right often, with the responses made once for all of them.

``python engine_drafts.py DIRECTORY ALGORITHM`` trains one: the demo of ALGORITHM up to the end of its training.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from specforge.demo.recipes import DemoRecipe
from specforge.demo.run import Demo, DemoOptions, held_out_prompts, make_responses, open_demo
from specforge.launch.local import train

RECIPE = DemoRecipe(num_responses=1600, num_eval_prompts=16, checkpoint_every=100)
"""200 steps of 8 responses; 16 prompts of 48 tokens from modules that the target never saw, 64 new tokens each."""


def demo_of(directory: Path, algorithm: str) -> Demo:
    """The demo of ``algorithm`` below ``directory``."""
    out = directory / algorithm
    out.mkdir(parents=True, exist_ok=True)
    return open_demo(DemoOptions(out, algorithm=algorithm, resume=True), RECIPE)


def train_draft(directory: Path, algorithm: str) -> None:
    """Responses where there are none yet, and the training."""
    torch.set_num_threads(1)
    demo, shared = demo_of(directory, algorithm), directory / "responses.jsonl"
    if not shared.exists():
        make_responses(demo)
        demo.responses.rename(shared)
    shutil.copyfile(shared, demo.responses)
    train(demo.run_config())


def prompts_of(demo: Demo) -> list[list[int]]:
    """Token ids of the held-out prompts."""
    return [list(prompt.input_ids) for prompt in held_out_prompts(demo)]


if __name__ == "__main__":
    train_draft(Path(sys.argv[1]), sys.argv[2])
