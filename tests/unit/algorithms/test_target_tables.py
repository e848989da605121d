"""The frozen tables give the target's own logits, for the layouts that people train on."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specforge.algorithms.base import target_logits
from specforge.algorithms.parts.tables import load_target_tables

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYOUTS = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "phi": {},
    "phi3": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_last_hidden_states_and_tables_give_the_targets_logits(kind, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **LAYOUTS[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    logits = target_logits(load_target_tables(tmp_path), output.hidden_states[-1][0])
    torch.testing.assert_close(logits, output.logits[0], rtol=1e-4, atol=1e-4)
