"""Tiny random targets of several architectures, saved as ordinary Hugging Face directories."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from served_target import WAIT_S, HeldEngine, arena, list_of

from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.serving.service import CaptureService
from specforge.inference.serving.settings import ServingSettings

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "gemma": (transformers.GemmaConfig, {"head_dim": 8}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8, "sliding_window": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 8}),
    "phi": (transformers.PhiConfig, {}),
    "phi3": (transformers.Phi3Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 8}),
    "gpt2": (transformers.GPT2Config, {}),
}


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a random target by architecture name; made on first use."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, extra = ARCHITECTURES[name]
            torch.manual_seed(len(name))
            model = transformers.AutoModelForCausalLM.from_config(kind(**{**SIZES, **extra}))
            # fresh norms and biases are all ones and zeros, which would hide a norm or a bias that is left out
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, 1.0, 0.2)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def engine(target_dir: Callable[[str], Path]) -> HFTargetEngine:
    """A random Qwen3 target in fp32."""
    return HFTargetEngine(target_dir("qwen3"))


@pytest.fixture
def held(target_dir):
    return HeldEngine(target_dir("qwen3"))


@pytest.fixture
def sink(request):
    found = arena(f"serving-{abs(hash(request.node.name)) % 10**12}")
    yield found
    assert list_of(found) == []


@pytest.fixture
def serve(held):
    """Starts a service; stopped, and its sinks closed, at the end."""
    with contextlib.ExitStack() as services:

        def start(engine=held, **settings):
            service = CaptureService(engine, ServingSettings(**{"grace_s": WAIT_S, **settings}))
            service.start()
            services.callback(service.stop)
            return service

        yield start
