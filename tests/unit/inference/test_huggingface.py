from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specforge.algorithms.base import Sampling, target_logits
from specforge.algorithms.parts.sampling import distribution, draw
from specforge.algorithms.parts.tables import load_target_tables
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.encoding import decode
from specforge.data_plane.tensors import Columns, materialised
from specforge.errors import DataError, TargetError
from specforge.inference.huggingface import HFTargetEngine

TargetDir = Callable[[str], Path]
CAPTURE_DTYPES = ("bfloat16", "float32", "float8_e4m3fn")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "mistral", "gpt2")
ALL_LAYERS = CaptureSpec((0, 1, 2, 3), True)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def task(ids: tuple[int, ...], name: str = "a") -> PromptTask:
    return PromptTask(name, 0, ids, ())


def captured(engine: HFTargetEngine, ids: tuple[int, ...], spec: CaptureSpec = ALL_LAYERS) -> dict[str, torch.Tensor]:
    """The features of ``ids`` as a store would hold them."""
    (sample,) = engine.capture([task(ids)], spec)
    return {name: materialised(source) for name, source in sample.tensors.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_layers_are_the_hidden_states_of_transformers(target_dir: TargetDir, architecture: str):
    """Oracle 1. aux equals hidden_states[id + 1], not [id]; the head over ``last`` gives the model's logits."""
    engine = HFTargetEngine(target_dir(architecture))
    ids = prompt(20)
    features = captured(engine, ids)
    model = AutoModelForCausalLM.from_pretrained(target_dir(architecture), dtype=torch.float32)
    with torch.no_grad():
        oracle = model(torch.tensor([ids]), output_hidden_states=True)
    blocks = features["aux"].split(32, dim=-1)
    for layer in range(3):
        torch.testing.assert_close(blocks[layer], oracle.hidden_states[layer + 1][0], rtol=0, atol=1e-5)
        assert not torch.allclose(blocks[layer], oracle.hidden_states[layer][0], atol=1e-3)
    # the last entry of transformers is after the norm: the true residual is another tensor
    torch.testing.assert_close(features["last"], oracle.hidden_states[-1][0], rtol=0, atol=1e-5)
    assert not torch.allclose(blocks[3], features["last"], atol=1e-3)
    logits = target_logits(load_target_tables(target_dir(architecture)), features["last"])
    torch.testing.assert_close(logits, oracle.logits[0], rtol=0, atol=1e-4)
    assert features["input_ids"].dtype == torch.int32
    assert tuple(features["input_ids"].tolist()) == ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sessions_with_crops_agree_with_one_forward(target_dir: TargetDir, architecture: str):
    """Also past the sliding window of those that have one (8 tokens)."""
    engine = HFTargetEngine(target_dir(architecture))
    ids = prompt(24)
    whole = captured(engine, ids)
    expected = target_logits(engine.tables, whole["last"])
    session = engine.session(ALL_LAYERS)
    first, _ = session.forward(ids[:13])
    session.forward([5, 6, 7])
    session.crop(14)
    session.crop(13)
    second, features = session.forward(ids[13:])
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features["aux"], whole["aux"][13:], rtol=0, atol=1e-5)
    torch.testing.assert_close(features["last"], whole["last"][13:], rtol=0, atol=1e-5)
    session.crop(0)
    again, _ = session.forward(ids[:1])
    torch.testing.assert_close(again, expected[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_batch_continues_every_prompt_as_if_alone(target_dir: TargetDir, architecture: str):
    engine = HFTargetEngine(target_dir(architecture))
    prompts = [prompt(20), prompt(5, 1), prompt(1, 2)]
    together = engine.generate(prompts, Generate(12))
    assert together == engine.generate(prompts, Generate(12))
    assert together == [engine.generate([ids], Generate(12))[0] for ids in prompts]


def test_last_hidden_state_predicts_the_greedy_continuation(engine: HFTargetEngine):
    """Oracle 2. Features are stored unshifted."""
    start = prompt(6)
    (generation,) = engine.generate([start], Generate(20))
    ids = (*start, *generation.token_ids)
    features = captured(engine, ids)
    predicted = target_logits(engine.tables, features["last"]).argmax(-1).tolist()
    assert predicted[len(start) - 1 : -1] == list(generation.token_ids)


def test_capture_depends_on_its_own_task_alone(engine: HFTargetEngine):
    tasks = [task(prompt(length, length), str(length)) for length in (7, 3, 12)]
    together = {sample.sample_id: sample for sample in engine.capture(tasks, ALL_LAYERS)}
    assert list(together) == ["7", "3", "12"]
    for one in tasks:
        for name, tensor in captured(engine, one.input_ids).items():
            assert torch.equal(tensor, materialised(together[one.sample_id].tensors[name]))


def test_features_have_the_dtype_and_parts_of_the_spec(engine: HFTargetEngine):
    features = captured(engine, prompt(5), CaptureSpec((2, 0), False, "bfloat16"))
    assert set(features) == {"input_ids", "aux"}
    assert features["aux"].dtype == torch.bfloat16
    assert features["aux"].shape == (5, 64)
    forward = captured(engine, prompt(5), CaptureSpec((0, 2), False, "bfloat16"))
    assert torch.equal(features["aux"][:, :32], forward["aux"][:, 32:])


@pytest.mark.parametrize("dtype", CAPTURE_DTYPES)
def test_features_have_the_names_dtypes_and_widths_that_the_spec_tells(engine: HFTargetEngine, dtype: str):
    spec = CaptureSpec((0, 1, 3), True, dtype)
    features = captured(engine, prompt(5), spec)
    found = tuple((name, str(value.dtype).removeprefix("torch."), *value.shape) for name, value in features.items())
    assert found == (("input_ids", "int32", 5), *((name, kind, 5, width) for name, kind, width in spec.widths(32)))


def test_the_layers_are_given_as_the_target_computed_them(engine: HFTargetEngine):
    """The put joins and casts; a copy before it would be one too many."""
    (sample,) = engine.capture([task(prompt(5))], CaptureSpec((0, 2), True, "bfloat16"))
    for name, num_layers in (("aux", 2), ("last", 1)):
        source = sample.tensors[name]
        assert isinstance(source, Columns)
        assert [(part.dtype, part.shape) for part in source.parts] == [(torch.float32, (5, 32))] * num_layers
    exact = captured(engine, prompt(5), CaptureSpec((0, 2), True, "float32"))
    assert torch.equal(materialised(sample.tensors["aux"]), exact["aux"].bfloat16())


def test_float8_features_are_the_encoded_states(engine: HFTargetEngine):
    features = captured(engine, prompt(9), CaptureSpec((0, 2), True, "float8_e4m3fn"))
    exact = captured(engine, prompt(9), CaptureSpec((0, 2), True, "float32"))
    for name in ("aux", "last"):
        decoded = torch.empty(exact[name].shape)
        decode(features[name], features[f"{name}_scale"], decoded)
        scales = features[f"{name}_scale"].repeat_interleave(32, dim=1)
        bound = torch.maximum(exact[name].abs() / 16, scales / 1024)
        assert ((decoded - exact[name]).abs() <= bound * 1.00001).all()


@pytest.mark.parametrize("dtype", CAPTURE_DTYPES)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_sessions_give_the_states_as_computed_whatever_is_stored(target_dir: TargetDir, dtype: str, compute: str):
    engine = HFTargetEngine(target_dir("qwen3"), compute)
    _, features = engine.session(CaptureSpec((0, 2), True, dtype)).forward(prompt(7))
    _, exact = engine.session(CaptureSpec((0, 2), True, "float32")).forward(prompt(7))
    assert set(features) == {"aux", "last"}
    for name, tensor in features.items():
        assert tensor.dtype == getattr(torch, compute)
        assert torch.equal(tensor, exact[name])


def test_captured_tensors_can_be_trained_on(engine: HFTargetEngine):
    last = captured(engine, prompt(5))["last"]
    weight = torch.ones(32, requires_grad=True)
    (last @ weight).sum().backward()
    assert not last.requires_grad


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
    free = engine.generate(prompts, Generate(10))
    stop = free[0].token_ids[4]
    engine.info = replace(engine.info, eos_token_ids=(stop,))
    for row, generation in zip(free, engine.generate(prompts, Generate(10)), strict=True):
        stops = stop in row.token_ids
        assert generation.stopped == stops
        expected = row.token_ids[: row.token_ids.index(stop) + 1] if stops else row.token_ids
        assert generation.token_ids == expected


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.8}])
def test_drawn_tokens_are_those_of_the_distribution_and_of_the_seed_alone(engine: HFTargetEngine, options: dict):
    prompts = [prompt(6), prompt(9, 1)]
    wanted = Generate(8, temperature=0.8, seed=5, **options)
    together = engine.generate(prompts, wanted)
    assert together == [engine.generate([ids], wanted)[0] for ids in prompts]
    assert together != engine.generate(prompts, replace(wanted, seed=6))
    for ids, generation in zip(prompts, together, strict=True):
        generator = torch.Generator().manual_seed(5)
        sampling = Sampling(0.8, generator, options.get("top_k"), options.get("top_p"))
        tokens = list(ids)
        for token in generation.token_ids:
            last = captured(engine, tuple(tokens))["last"][-1]
            assert token == draw(distribution(target_logits(engine.tables, last), sampling), generator)
            tokens.append(token)


def test_a_temperature_of_nothing_is_greedy(engine: HFTargetEngine):
    prompts = [prompt(6), prompt(9, 1)]
    assert engine.generate(prompts, Generate(8, temperature=1e-6, top_k=3, seed=1)) == engine.generate(
        prompts, Generate(8)
    )


def test_nothing_is_generated_where_nothing_is_asked(engine: HFTargetEngine):
    assert engine.generate([], Generate(5)) == []
    assert engine.generate([prompt(3)], Generate(0))[0].token_ids == ()


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
