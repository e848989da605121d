"""Prompts of the demo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from specforge.demo.corpus import Module
from specforge.errors import DataError

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
