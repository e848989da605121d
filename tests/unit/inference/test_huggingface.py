from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specforge.algorithms.base import target_logits
from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.tasks import PromptTask
from specforge.errors import DataError, TargetError
from specforge.inference.huggingface import HFTargetEngine

TargetDir = Callable[[str], Path]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "mistral", "gpt2")
ALL_LAYERS = CaptureSpec((0, 1, 2, 3), True)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def task(ids: tuple[int, ...], name: str = "a") -> PromptTask:
    return PromptTask(name, 0, ids, ())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_layers_are_the_hidden_states_of_transformers(target_dir: TargetDir, architecture: str):
    """Oracle test 1: aux equals hidden_states[id + 1], not [id]; the head over ``last`` gives the model's logits."""
    engine = HFTargetEngine(target_dir(architecture))
    ids = prompt(20)
    (sample,) = engine.capture([task(ids)], ALL_LAYERS)
    model = AutoModelForCausalLM.from_pretrained(target_dir(architecture), dtype=torch.float32)
    with torch.no_grad():
        oracle = model(torch.tensor([ids]), output_hidden_states=True)
    blocks = sample.tensors["aux"].split(32, dim=-1)
    for layer in range(3):
        torch.testing.assert_close(blocks[layer], oracle.hidden_states[layer + 1][0], rtol=0, atol=1e-5)
        assert not torch.allclose(blocks[layer], oracle.hidden_states[layer][0], atol=1e-3)
    # the last entry of transformers is after the norm: the true residual is another tensor
    torch.testing.assert_close(sample.tensors["last"], oracle.hidden_states[-1][0], rtol=0, atol=1e-5)
    assert not torch.allclose(blocks[3], sample.tensors["last"], atol=1e-3)
    logits = target_logits(load_target_tables(target_dir(architecture)), sample.tensors["last"])
    torch.testing.assert_close(logits, oracle.logits[0], rtol=0, atol=1e-4)
    assert sample.tensors["input_ids"].dtype == torch.int32
    assert tuple(sample.tensors["input_ids"].tolist()) == ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sessions_with_crops_agree_with_one_forward(target_dir: TargetDir, architecture: str):
    """Also past the sliding window of those that have one (8 tokens)."""
    engine = HFTargetEngine(target_dir(architecture))
    ids = prompt(24)
    (sample,) = engine.capture([task(ids)], ALL_LAYERS)
    expected = target_logits(engine.tables, sample.tensors["last"])
    session = engine.session(ALL_LAYERS)
    first, _ = session.forward(ids[:13])
    session.forward([5, 6, 7])
    session.crop(14)
    session.crop(13)
    second, features = session.forward(ids[13:])
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features["aux"], sample.tensors["aux"][13:], rtol=0, atol=1e-5)
    torch.testing.assert_close(features["last"], sample.tensors["last"][13:], rtol=0, atol=1e-5)
    session.crop(0)
    again, _ = session.forward(ids[:1])
    torch.testing.assert_close(again, expected[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batch_continues_every_prompt_as_if_alone(target_dir: TargetDir, architecture: str):
    engine = HFTargetEngine(target_dir(architecture))
    prompts = [prompt(20), prompt(5, 1), prompt(1, 2)]
    together = engine.generate(prompts, 12)
    assert together == engine.generate(prompts, 12)
    assert together == [engine.generate([ids], 12)[0] for ids in prompts]


def test_last_hidden_state_predicts_the_greedy_continuation(engine: HFTargetEngine):
    """Oracle test 2: features are stored unshifted."""
    start = prompt(6)
    (generation,) = engine.generate([start], 20)
    ids = (*start, *generation.token_ids)
    (sample,) = engine.capture([task(ids)], ALL_LAYERS)
    predicted = target_logits(engine.tables, sample.tensors["last"]).argmax(-1).tolist()
    assert predicted[len(start) - 1 : -1] == list(generation.token_ids)


def test_capture_depends_on_its_own_task_alone(engine: HFTargetEngine):
    tasks = [task(prompt(length, length), str(length)) for length in (7, 3, 12)]
    together = {sample.sample_id: sample for sample in engine.capture(tasks, ALL_LAYERS)}
    assert list(together) == ["7", "3", "12"]
    for alone in (next(iter(engine.capture([one], ALL_LAYERS))) for one in tasks):
        for name, tensor in alone.tensors.items():
            assert torch.equal(tensor, together[alone.sample_id].tensors[name])


def test_features_have_the_dtype_and_parts_of_the_spec(engine: HFTargetEngine):
    (sample,) = engine.capture([task(prompt(5))], CaptureSpec((2, 0), False, "bfloat16"))
    assert set(sample.tensors) == {"input_ids", "aux"}
    assert sample.tensors["aux"].dtype == torch.bfloat16
    assert sample.tensors["aux"].shape == (5, 64)
    (forward,) = engine.capture([task(prompt(5))], CaptureSpec((0, 2), False, "bfloat16"))
    assert torch.equal(sample.tensors["aux"][:, :32], forward.tensors["aux"][:, 32:])


def test_captured_tensors_can_be_trained_on(engine: HFTargetEngine):
    (sample,) = engine.capture([task(prompt(5))], ALL_LAYERS)
    weight = torch.ones(32, requires_grad=True)
    (sample.tensors["last"] @ weight).sum().backward()
    assert not sample.tensors["last"].requires_grad


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_the_target_does_not_have_are_refused(engine: HFTargetEngine, layer: int):
    spec = CaptureSpec((layer,), True)
    with pytest.raises(TargetError, match="has 4 layers"):
        list(engine.capture([task(prompt(4))], spec))
    with pytest.raises(TargetError, match="has 4 layers"):
        engine.session(spec)


@pytest.mark.parametrize("ids", [(), (3, 64), (-1, 3)])
def test_prompts_the_target_cannot_read_are_refused(engine: HFTargetEngine, ids: tuple[int, ...]):
    with pytest.raises(DataError, match="prompt"):
        list(engine.capture([task(ids)], ALL_LAYERS))


def test_stop_token_ends_its_row_only(target_dir: TargetDir):
    engine = HFTargetEngine(target_dir("qwen3"))
    prompts = [prompt(6, seed) for seed in range(4)]
    free = engine.generate(prompts, 10)
    stop = free[0].token_ids[4]
    engine.info = replace(engine.info, eos_token_ids=(stop,))
    for row, generation in zip(free, engine.generate(prompts, 10), strict=True):
        stops = stop in row.token_ids
        assert generation.stopped == stops
        expected = row.token_ids[: row.token_ids.index(stop) + 1] if stops else row.token_ids
        assert generation.token_ids == expected


def test_nothing_is_generated_where_nothing_is_asked(engine: HFTargetEngine):
    assert engine.generate([], 5) == []
    assert engine.generate([prompt(3)], 0)[0].token_ids == ()


def test_reference_logits_are_computed_in_float64_throughout(engine: HFTargetEngine):
    """A second engine whose weights are float64 already would still round in its float32 norms without the cast."""
    ids = prompt(9)
    reference = engine.reference_logits(ids)
    logits, _ = engine.session(ALL_LAYERS).forward(ids)
    assert reference.dtype == torch.float64
    torch.testing.assert_close(reference.float(), logits[-1], rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(engine.info.path, dtype=torch.float64)
    with torch.no_grad():
        rounded = model(torch.tensor([ids])).logits[0, -1]
    assert 0 < (rounded - reference).abs().max() < 1e-5


def test_cropping_to_more_than_there_is_fails(engine: HFTargetEngine):
    session = engine.session(ALL_LAYERS)
    session.forward([3, 4])
    with pytest.raises(ValueError, match="cannot keep 3"):
        session.crop(3)


def test_incomplete_weights_are_one_sentence(target_dir: TargetDir, tmp_path: Path):
    directory = tmp_path / "torn"
    directory.mkdir()
    for file in target_dir("llama").iterdir():
        content = file.read_bytes()
        (directory / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(TargetError, match="could not be loaded"):
        HFTargetEngine(directory)
