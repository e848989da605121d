"""A batch of sequences of different lengths decodes as each of them alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specforge.contracts.capture import CaptureSpec
from specforge.errors import DataError
from specforge.inference.engine import BatchSession, DecodesBatches
from specforge.inference.huggingface import HFTargetEngine

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "mistral", "gpt2"]
SPEC = CaptureSpec((0, 2), True)
PROMPTS = [[5, 9, 2, 33, 7, 61, 40, 8, 13, 21, 34], [12], [4, 4, 19, 50, 3]]
"""The first is longer than the windows of the targets that have one."""

TREE, PARENTS = [11, 3, 4, 5, 3, 6, 17, 18], [-1, 0, 0, 1, 1, 2, 3, 6]


def assert_like_alone(
    engine: HFTargetEngine, prefix: Sequence[int], tokens: Sequence[int], logits: Tensor, features: dict[str, Tensor]
) -> None:
    """``logits`` and ``features`` of ``tokens`` are those of an unpadded forward of ``prefix`` and ``tokens``."""
    expected, rows = engine.session(SPEC).forward([*prefix, *tokens])
    torch.testing.assert_close(logits, expected[-len(logits) :], rtol=0, atol=3e-5)
    for name, values in features.items():
        torch.testing.assert_close(values, rows[name][-len(values) :], rtol=1e-5, atol=3e-5)


def split(session: BatchSession, rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    logits, features = session.forward(rows)
    counts = [len(row) for row in rows]
    parts = {name: values.split(counts) for name, values in features.items()}
    return [(own, {name: parts[name][i] for name in parts}) for i, own in enumerate(logits.split(counts))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sequences_of_a_batch_decode_as_each_alone(target_dir: Callable[[str], Path], architecture: str):
    """Prefill, a forward with different numbers of tokens, crops of different depth, and a forward after them."""
    engine = HFTargetEngine(target_dir(architecture))
    session = engine.batch_session(SPEC, 3)
    logits, features = session.admit(PROMPTS)
    counts = [len(prompt) for prompt in PROMPTS]
    for number, prompt in enumerate(PROMPTS):
        own = {name: values.split(counts)[number] for name, values in features.items()}
        assert_like_alone(engine, [], prompt, logits[number : number + 1], own)
    rows = [[3, 4, 5, 6], [7], [8, 9]]
    for prompt, tokens, found in zip(PROMPTS, rows, split(session, rows), strict=True):
        assert_like_alone(engine, prompt, tokens, *found)
    kept = [1, 1, 0]
    for number, count in enumerate(kept):
        session.crop(number, len(PROMPTS[number]) + count)
    following = [[20], [21, 22, 23], [24, 25]]
    for number, found in enumerate(split(session, following)):
        prefix = [*PROMPTS[number], *rows[number][: kept[number]]]
        assert_like_alone(engine, prefix, following[number], *found)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_prompts_are_read_one_by_one_without_padding_or_masks(
    target_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, architecture: str
):
    engine = HFTargetEngine(target_dir(architecture))
    lengths, forward = [], engine.forward_batch

    def counted(rows, cache, attention, spec):
        lengths.append([len(row) for row in rows])
        assert attention.mask(engine._backbone.config, engine.dtype, engine.device) is None
        return forward(rows, cache, attention, spec)

    monkeypatch.setattr(engine, "forward_batch", counted)
    session = engine.batch_session(SPEC, 3)
    logits, features = session.admit(PROMPTS)
    assert lengths == [[11], [1], [5]]
    for number, prompt in enumerate(PROMPTS):
        expected, rows = engine.session(SPEC).forward(prompt)
        torch.testing.assert_close(logits[number], expected[-1], rtol=0, atol=1e-6)
        own = features["aux"].split([len(it) for it in PROMPTS])[number]
        assert torch.equal(own, rows["aux"])


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("path", [[0], [0, 2, 5], [0, 1, 3, 6, 7]])
def test_tree_beside_a_chain_keeps_its_path(target_dir: Callable[[str], Path], architecture: str, path: list[int]):
    engine = HFTargetEngine(target_dir(architecture))
    session = engine.batch_session(SPEC, 2)
    session.admit(PROMPTS[:2])
    logits, _ = session.forward([TREE, [7, 8]], [PARENTS, None])
    for node, parent in enumerate(PARENTS):
        branch, above = [TREE[node]], parent
        while above >= 0:
            branch.insert(0, TREE[above])
            above = PARENTS[above]
        assert_like_alone(engine, PROMPTS[0], branch, logits[node : node + 1], {})
    assert_like_alone(engine, PROMPTS[1], [7, 8], logits[len(TREE) :], {})
    session.keep(0, path)
    session.crop(1, 2)
    found = split(session, [[50, 51], [52]])
    assert_like_alone(engine, [*PROMPTS[0], *(TREE[node] for node in path)], [50, 51], *found[0])
    assert_like_alone(engine, [*PROMPTS[1], 7], [52], *found[1])


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_last_sequence_takes_the_number_of_one_that_is_dropped(engine: HFTargetEngine, dropped: int):
    session = engine.batch_session(SPEC, 3)
    session.admit(PROMPTS)
    session.drop(dropped)
    left = list(PROMPTS)
    left[dropped] = left[-1]
    left.pop()
    for prompt, found in zip(left, split(session, [[30], [31, 32]]), strict=True):
        assert_like_alone(engine, prompt, [30] if prompt is left[0] else [31, 32], *found)
    logits, _ = session.admit([[6, 7]])
    assert_like_alone(engine, [], [6, 7], logits, {})


def test_cache_that_grows_keeps_what_it_had(engine: HFTargetEngine):
    """More positions than the first buffers have, which is twice those of the prefill here."""
    session = engine.batch_session(SPEC, 2)
    session.admit([[3, 5], [3]])
    longest = [index % 50 + 2 for index in range(120)]
    split(session, [longest, [9, 8]])
    split(session, [[4, 4], [7]])
    found = split(session, [[10, 11, 12], [12]])
    assert_like_alone(engine, [3, 5, *longest, 4, 4], [10, 11, 12], *found[0])
    assert_like_alone(engine, [3, 9, 8, 7], [12], *found[1])


def test_wrong_numbers_of_sequences_are_refused(engine: HFTargetEngine):
    session = engine.batch_session(SPEC, 2)
    session.admit(PROMPTS[:2])
    with pytest.raises(ValueError, match=r"2 \+ 1 sequences do not fit a session of 2"):
        session.admit(PROMPTS[:1])
    with pytest.raises(ValueError, match="tokens of 2 sequences are needed, got 1"):
        session.forward([[3]])
    with pytest.raises(ValueError, match="cannot keep 12 positions of a cache of 11"):
        session.crop(0, 12)
    with pytest.raises(DataError, match="has no tokens"):
        engine.batch_session(SPEC, 2).admit([[1], []])


def test_engine_says_that_it_decodes_batches(engine: HFTargetEngine):
    assert isinstance(engine, DecodesBatches)
