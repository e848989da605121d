"""Prompts of the demo, and the target's own responses to them, recorded before anything trains on them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from specforge.demo.corpus import Module
from specforge.errors import DataError
from specforge.inference.engine import TargetEngine

_CHARS_PER_TOKEN = 12  # more text than any prompt needs, so that the cut is always at a token


@dataclass(frozen=True, slots=True)
class CutPrompt:
    """``input_ids`` were cut from module ``module``, starting at the beginning of a line."""

    module: str
    input_ids: tuple[int, ...]


def cut_prompts(
    modules: Sequence[Module], tokenizer: PreTrainedTokenizerBase, num_prompts: int, num_tokens: int, key: str
) -> list[CutPrompt]:
    """``num_prompts`` different prompts of exactly ``num_tokens`` tokens: a pure function of modules and ``key``."""
    usable = [module for module in modules if len(module.text) > 2 * num_tokens * _CHARS_PER_TOKEN]
    if not usable:
        raise DataError("no module of the standard library is long enough to cut prompts from")
    draw = random.Random(key)  # noqa: S311 - repeatable, not secret
    prompts: list[CutPrompt] = []
    seen: set[tuple[int, ...]] = set()
    for _ in range(num_prompts * 20):
        if len(prompts) == num_prompts:
            return prompts
        module = draw.choice(usable)
        start = module.text.find("\n", draw.randrange(len(module.text))) + 1
        text = module.text[start : start + num_tokens * _CHARS_PER_TOKEN]
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens])
        if len(ids) == num_tokens and ids not in seen:
            seen.add(ids)
            prompts.append(CutPrompt(module.name, ids))
    raise DataError(f"only {len(prompts)} different prompts could be cut from {len(usable)} modules")


def record_responses(
    engine: TargetEngine, prompts: Sequence[CutPrompt], path: Path, batch_size: int, max_new_tokens: int
) -> Iterator[int]:
    """Let the target continue every prompt; yields the number of recorded responses after each batch.

    A batch is on disk (fsync) before the next begins. What an interrupted run left is kept in whole batches, so the
    composition of every generation batch, and with it every token, is the same as without the interruption.
    """
    done = _whole_batches(path, batch_size, len(prompts))
    yield done
    with path.open("ab") as file:
        for start in range(done, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            generations = engine.generate([prompt.input_ids for prompt in batch], max_new_tokens)
            for prompt, generation in zip(batch, generations, strict=True):
                length = len(prompt.input_ids)
                row = {
                    "input_ids": [*prompt.input_ids, *generation.token_ids],
                    "loss_spans": [[length, length + len(generation.token_ids)]],
                    "attributes": {"module": prompt.module},
                }
                file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            yield start + len(batch)


def _whole_batches(path: Path, batch_size: int, num_prompts: int) -> int:
    """Cut ``path`` back to the last whole batch; the number of rows that stay."""
    if not path.exists():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn
    keep = len(lines) if len(lines) == num_prompts else len(lines) - len(lines) % batch_size
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:keep]))
        os.fsync(file.fileno())
    return keep
