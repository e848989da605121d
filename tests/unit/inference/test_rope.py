"""Targets whose RoPE turns with the longest position of a forward: no sample may see the length of another."""

from pathlib import Path

import pytest
import torch
import transformers

from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.contracts.tasks import PromptTask
from specforge.data_plane.tensors import materialised
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.rope import grouped, length_of_short_rope

ORIGINAL = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
}
KINDS = {
    "longrope": (
        transformers.Phi3Config,
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": ORIGINAL,
            "max_position_embeddings": 128,
        },
    ),
    "dynamic": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0},
            "max_position_embeddings": ORIGINAL,
        },
    ),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTHS = (8, 60, 31, 45, 20)
SPEC = CaptureSpec((0, 1), last_hidden=True)


@pytest.fixture(params=KINDS)
def turning(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, options = KINDS[request.param]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(kind(**SIZES, **options)).save_pretrained(tmp_path)
    return tmp_path


def prompt_of(length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(length)
    return tuple(torch.randint(3, 64, (length,), generator=draw).tolist())


def test_features_and_responses_do_not_depend_on_longer_neighbours(turning: Path):
    engine = HFTargetEngine(turning)
    tasks = [PromptTask(str(length), index, prompt_of(length), ()) for index, length in enumerate(LENGTHS)]
    together = engine.capture_together(tasks, SPEC)
    assert [sample.sample_id for sample in together] == [task.sample_id for task in tasks]
    for task, sample in zip(tasks, together, strict=True):
        (alone,) = HFTargetEngine(turning).capture([task], SPEC)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(materialised(sample.tensors[name]), materialised(tensor), rtol=0, atol=1e-4)
    prompts = [task.input_ids for task in tasks]
    alone_too = [HFTargetEngine(turning).generate([prompt], Generate(6))[0] for prompt in prompts]
    assert engine.generate(prompts, Generate(6)) == alone_too


def test_rows_that_turn_the_rope_are_computed_alone():
    assert grouped([5, 3, 9], None) == [[0, 1, 2]]
    assert grouped([5, 3, 9, 10], 5) == [[0, 1], [2], [3]]
    assert grouped([9], 5) == [[0]]
    assert grouped([], 5) == grouped([], None) == []


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 4096}}, None),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 4096}, 4096),
        ({"rope_parameters": LONGROPE, "max_position_embeddings": 128}, ORIGINAL),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 2048}, 2047),
        ({"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}}, ORIGINAL),
    ],
)
def test_length_from_which_the_rope_is_another(config: dict, length: int | None):
    assert length_of_short_rope(config) == length
