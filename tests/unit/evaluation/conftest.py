"""Random targets for drafts of any algorithm."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from specforge.inference.huggingface import HFTargetEngine


@pytest.fixture(scope="session")
def make_target(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], HFTargetEngine]:
    """A random Qwen3 target by the size of its vocabulary: 8 layers, no stop tokens, greedy output that wanders."""
    made: dict[int, Path] = {}

    def make(vocab_size: int) -> HFTargetEngine:
        if vocab_size not in made:
            torch.manual_seed(3)
            config = transformers.Qwen3Config(
                vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=8, head_dim=8,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.5,
            )  # fmt: skip
            made[vocab_size] = tmp_path_factory.mktemp("target")
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[vocab_size])
        engine = HFTargetEngine(made[vocab_size])
        engine.info = replace(engine.info, eos_token_ids=())
        return engine

    return make
