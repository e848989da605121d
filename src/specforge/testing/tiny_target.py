"""A target small enough for tests: a few seconds to train, deterministic, cached on disk by its recipe.

Its text is generated (arithmetic, records, small stories), so a few steps teach it enough for a draft to have something
to predict. Sizes: 8 layers (the default capture layers are distinct), hidden size 64, vocabulary 384.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from specforge.demo.corpus import Module
from specforge.demo.target import (
    TargetRecipe,
    build_model,
    make_optimizers,
    next_token_loss,
    save,
    tokenize,
    train_tokenizer,
    windows,
)

TINY_RECIPE = TargetRecipe(
    vocab_size=384,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    seq_len=64,
    global_batch_size=16,
    num_steps=70,
)


def default_cache() -> Path:
    """The user's cache directory of SpecForge."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge"


def tiny_target(cache: Path | None = None) -> Path:
    """Directory of the tiny target; trained on first use. Safe to call from several processes at once."""
    key = hashlib.sha256(f"{asdict(TINY_RECIPE)}|{torch.__version__}|2".encode()).hexdigest()[:12]
    directory = (cache or default_cache()) / f"tiny-target-{key}"
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", dir=directory.parent))
    _train(partial)
    try:
        partial.rename(directory)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return directory


def generated_text(num_lines: int, seed: int) -> str:
    """Lines of simple, predictable text: a pure function of its arguments."""
    draw = random.Random(seed)  # noqa: S311 - repeatable, not secret
    names = ["Ada", "Bo", "Cy", "Dee", "Eve"]
    places = ["park", "shop", "lake", "school"]
    lines = []
    for _ in range(num_lines):
        a, b = draw.randrange(10), draw.randrange(10)
        name, place = draw.choice(names), draw.choice(places)
        lines.append(
            draw.choice(
                [
                    f"{a} plus {b} is {a + b}.",
                    f'{{"name": "{name}", "place": "{place}", "count": {a}}}',
                    f"{name} went to the {place} and saw {a} birds. Then {name} went home.",
                    f"def {name.lower()}(x):\n    return x + {b}",
                ]
            )
        )
    return "\n".join(lines)


def _train(out: Path) -> None:
    torch.set_num_threads(1)
    module = Module("generated", generated_text(3000, seed=0))
    tokenizer = train_tokenizer([module.text], TINY_RECIPE.vocab_size)
    tokens = tokenize(tokenizer, [module])
    model = build_model(TINY_RECIPE, tokenizer.eos_token_id)
    optimizers = make_optimizers(model)
    for step in range(TINY_RECIPE.num_steps):
        next_token_loss(
            model, windows(tokens, TINY_RECIPE.seq_len, TINY_RECIPE.global_batch_size, (0, step))
        ).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 6e-3 * (1 - step / TINY_RECIPE.num_steps)
            optimizer.step()
            optimizer.zero_grad()
    save(model, tokenizer, [module], out)
