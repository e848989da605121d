"""What vLLM reads: the layout of speculators, key by key, and what vLLM would not serve.

That vLLM itself loads it and drafts with it is tested in ``tests/engines``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from export_drafts import TARGET, VOCAB, draft_of, exported, tables, trained
from safetensors.torch import load_file

from specforge.errors import DraftError
from specforge.export.draft import FORMATS, verify_export, write_export


def names_in(out: Path) -> set[str]:
    return set(load_file(out / "model.safetensors"))


def proposals(served: dict[str, Any]) -> int:
    return int(served["speculators_config"]["proposal_methods"][0]["speculative_tokens"])


def test_eagle3_names_its_target_and_its_layers_as_inputs(tmp_path: Path):
    served = exported(trained("eagle3", draft_vocab_size=10), tmp_path / "out", "vllm")
    assert (served["speculators_model_type"], served["architectures"]) == ("eagle3", ["Eagle3Speculator"])
    assert served["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]  # trained on the outputs of 1, 3, 4
    assert (served["draft_vocab_size"], served["target_hidden_size"], served["tie_word_embeddings"]) == (10, 16, False)
    flags = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
    assert [served[name] for name in flags] == [False] * 4
    verifier = served["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "tiny-target", "architectures": ["Qwen3ForCausalLM"]}
    assert proposals(served) == 5
    layer = served["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["num_aux_hidden_states"]) == ("llama", 1, 3)
    assert (layer["hidden_size"], layer["vocab_size"], layer["head_dim"]) == (16, VOCAB, 4)
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"] == 500_000.0


def test_eagle3_layer_is_layer_zero_and_maps_are_of_pruned_vocabularies_alone(tmp_path: Path):
    exported(trained("eagle3"), tmp_path / "full", "vllm")
    exported(trained("eagle3", draft_vocab_size=10), tmp_path / "pruned", "vllm")
    full, pruned = names_in(tmp_path / "full"), names_in(tmp_path / "pruned")
    assert pruned - full == {"d2t", "t2d"}
    assert not {name for name in full if name.startswith("midlayer.")}
    assert full >= {"layers.0.hidden_norm.weight", "layers.0.self_attn.q_proj.weight", "fc.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("eagle3", {}), ("eagle3", {"ttt_steps": 3}), ("peagle", {"num_depths": 4}), ("dflash", {}), ("dspark", {})],
)
def test_card_asks_for_as_many_proposals_as_the_configuration(tmp_path: Path, algorithm: str, options: dict[str, Any]):
    served = exported(trained(algorithm, **options), tmp_path / "out", "vllm")
    assert f'"num_speculative_tokens": {proposals(served)}' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "qwen3"},
        {"architecture": "qwen3", "norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
        {"aux_layers": (1, 2, 3, 4)},
        {"architecture": "mla", "draft_vocab_size": 10},
        {"architecture": "mla", "fc_norm": True},
    ],
)
def test_every_variant_of_eagle3_that_vllm_computes_is_written(tmp_path: Path, options: dict[str, Any]):
    record = trained("eagle3", **options)
    served = exported(record, tmp_path / "out", "vllm", "float32")
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        assert served[name] is options.get(name, False)
    assert ("input_norm.weight" in names_in(tmp_path / "out")) == options.get("norm_before_fc", False)
    check = verify_export(tmp_path / "out", draft_of(record), tables())
    assert check.difference_to_original == 0.0


def test_latent_attention_is_written_flat_as_a_model_that_vllm_does_not_take_for_mtp(tmp_path: Path):
    served = exported(trained("eagle3", architecture="mla"), tmp_path / "out", "vllm")
    assert served["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    assert served["model_type"] == "deepseek_v2"
    assert "speculators_model_type" not in served
    assert served["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert served["num_aux_hidden_states"] == 3


def test_peagle_has_its_mask_token_and_as_many_proposals_as_depths(tmp_path: Path):
    served = exported(trained("peagle", mask_token_id=39, num_depths=6), tmp_path / "out", "vllm")
    assert (served["speculators_model_type"], served["mask_token_id"], proposals(served)) == ("peagle", 39, 6)
    assert served["transformer_layer_config"]["num_hidden_layers"] == 2
    assert load_file(tmp_path / "out" / "model.safetensors")["mask_hidden"].shape == (1, 1, 48)
    assert "embed_tokens.weight" in names_in(tmp_path / "out")


@pytest.mark.parametrize("sliding", [False, True])
def test_dflash_says_who_sees_what_follows(tmp_path: Path, sliding: bool):
    options = {"layer_types": ("sliding_attention",) * 2, "sliding_window": 6} if sliding else {}
    served = exported(trained("dflash", aux_layers=(2, 5), mask_token_id=39, **options), tmp_path / "out", "vllm")
    assert (served["speculators_model_type"], proposals(served), served["block_size"]) == ("dflash", 3, 4)
    assert (served["aux_hidden_state_layer_ids"], served["mask_token_id"]) == ([3, 6], 39)
    assert served["sliding_window_non_causal"] is not sliding
    assert served["transformer_layer_config"]["sliding_window"] == (6 if sliding else None)
    assert {"embed_tokens.weight", "lm_head.weight"}.isdisjoint(names_in(tmp_path / "out"))


def test_dspark_proposes_from_the_anchor(tmp_path: Path):
    served = exported(trained("dspark"), tmp_path / "out", "vllm")
    assert (served["speculators_model_type"], served["sample_from_anchor"], proposals(served)) == ("dspark", True, 4)
    own = {"markov_rank": 6, "markov_head_type": "vanilla", "enable_confidence_head": True}
    assert served.items() >= own.items()


def test_medusa_has_no_other_key_that_vllm_takes_for_heads_or_layers(tmp_path: Path):
    served = exported(trained("medusa", num_blocks=2), tmp_path / "out", "vllm")
    assert (served["model_type"], served["num_heads"], served["num_hidden_layers"]) == ("medusa", 2, 2)
    assert served["medusa_fc_bias"] is True
    mistaken = {key for key in served if "num" in key and ("heads" in key or "layers" in key)}
    assert mistaken == {"num_heads", "num_hidden_layers"}
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_heads.1.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("eagle3", {"fc_norm": True, "norm_before_fc": True}, "norm_before_fc together with fc_norm"),
        ("eagle3", {"architecture": "mla", "norm_before_fc": True}, "norm_before_fc and architecture mla"),
        ("dflash", {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 6}, "layer_types"),
        ("dspark", {"markov_head_type": "gated"}, "markov_head_type gated"),
        ("dspark", {"markov_rank": 0, "confidence_head_with_markov": False}, "markov_rank 0"),
        ("medusa", {"shared_head": True}, "shared_head: false"),
        ("domino", {}, r"vLLM serves no domino drafts \(.*--to sglang\); --to vllm writes eagle3, .*--to hf"),
        ("mtp", {}, "vLLM serves no mtp drafts .* --to hf"),
    ],
)
def test_what_vllm_does_not_compute_is_refused_by_name(
    tmp_path: Path, algorithm: str, options: dict[str, Any], message: str
):
    record = trained(algorithm, **options)
    with pytest.raises(DraftError, match=message):
        write_export(record, TARGET, FORMATS["vllm"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert exported(record, tmp_path / "out", "hf")
