"""Every layout of target goes the whole way: chat data, pruned vocabulary, training, evaluation, export, evaluation."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge.config.load import run_config_from
from specforge.evaluation.config import EvaluationConfig
from specforge.inference.config import TargetConfig
from specforge.launch.evaluate import evaluate_draft
from specforge.launch.export import export_draft
from specforge.launch.local import train

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LAYOUTS = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 32}),
    "phi": ("PhiConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 32}),
    "phi3": ("Phi3Config", {}),
}


@pytest.mark.parametrize(
    "layout", ["llama", "gemma2", "phi", *(pytest.param(name, marks=pytest.mark.full) for name in list(LAYOUTS)[3:])]
)
def test_a_target_of_this_layout_is_trained_for_evaluated_and_exported(tmp_path, tiny_target_dir, layout):
    name, settings = LAYOUTS[layout]
    torch.manual_seed(0)
    target = tmp_path / "target"
    AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES, **settings)).save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny_target_dir).save_pretrained(target)
    conversations = tmp_path / "conversations.jsonl"
    question = [{"role": "user", "content": "what is 4 plus 3?"}]
    rows = [
        {"messages": [*question, {"role": "assistant", "content": f"{i} plus 3 is {i + 3}. " * 3}]} for i in range(8)
    ]
    conversations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_config_from(
        {
            "run_dir": "run",
            "target": {"path": "target", "device": "cpu"},
            "data": {"path": "conversations.jsonl"},
            "algorithm": {"name": "eagle3", "ttt_steps": 3, "draft_vocab_size": 128},
            "training": {"global_batch_size": 4, "num_epochs": 2, "device": "cpu"},
        },
        tmp_path,
    )
    assert train(config).step == 4
    options = EvaluationConfig(prompts=conversations, num_prompts=3, max_new_tokens=20)
    engine = TargetConfig(path=target, dtype="float32", device="cpu")
    trained = evaluate_draft(engine, tmp_path / "run", options)
    assert trained["lossless"] is True
    written = export_draft(tmp_path / "run", "sglang", tmp_path / "export")
    assert written["reload_difference_to_rounded"] == 0.0
    assert evaluate_draft(engine, tmp_path / "export", options)["lossless"] is True
