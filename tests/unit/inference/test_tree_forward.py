"""One forward over a tree of tokens equals a plain forward of every root-to-leaf path."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specforge.contracts.capture import CaptureSpec
from specforge.errors import TargetError
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.tree import TreeAttention

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "mistral", "gpt2"]
SPEC = CaptureSpec((0, 2), True)
PROMPT = [5, 9, 2, 33, 7, 61, 40, 8, 13, 21, 34]
"""Longer than the windows of the targets that have one."""

TOKENS = [11, 3, 4, 5, 3, 6, 17, 18]
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6]


def path_to(node: int) -> list[int]:
    """Indices from the root to ``node``."""
    return [*(path_to(PARENTS[node]) if PARENTS[node] >= 0 else ()), node]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tree_forward_equals_a_plain_forward_of_every_path(target_dir: Callable[[str], Path], architecture: str):
    engine = HFTargetEngine(target_dir(architecture))
    session = engine.session(SPEC)
    session.forward(PROMPT)
    logits, features = session.forward(TOKENS, PARENTS)
    for node in range(len(TOKENS)):
        path = path_to(node)
        expected, rows = engine.session(SPEC).forward([*PROMPT, *(TOKENS[index] for index in path)])
        torch.testing.assert_close(logits[node], expected[-1], rtol=0, atol=2e-5)
        for name, values in features.items():
            torch.testing.assert_close(values[node], rows[name][-1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("path", [[0], [0, 2, 5], [0, 1, 3, 6, 7]])
def test_kept_path_is_a_cache_of_that_path(target_dir: Callable[[str], Path], architecture: str, path: Sequence[int]):
    engine = HFTargetEngine(target_dir(architecture))
    session = engine.session(SPEC)
    session.forward(PROMPT)
    session.forward(TOKENS, PARENTS)
    session.keep(path)
    logits, features = session.forward([50, 51])
    expected, rows = engine.session(SPEC).forward([*PROMPT, *(TOKENS[index] for index in path), 50, 51])
    torch.testing.assert_close(logits, expected[-2:], rtol=0, atol=2e-5)
    for name, values in features.items():
        torch.testing.assert_close(values, rows[name][-2:], rtol=1e-5, atol=2e-5)


def test_tree_that_is_a_chain_equals_a_chain(engine: HFTargetEngine):
    tree, chain = engine.session(SPEC), engine.session(SPEC)
    tree.forward(PROMPT)
    chain.forward(PROMPT)
    torch.testing.assert_close(tree.forward([1, 2, 3], [-1, 0, 1])[0], chain.forward([1, 2, 3])[0], rtol=0, atol=2e-5)


def test_parent_that_comes_later_is_refused():
    with pytest.raises(ValueError, match="token 1 of a tree has the parent 1"):
        TreeAttention.of([-1, 1], 3)


def test_target_with_other_layers_says_to_use_chains():
    config = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    with pytest.raises(TargetError, match="linear_attention, which cannot verify a tree"):
        TreeAttention.of([-1], 3).mask(config, torch.float32, torch.device("cpu"))
