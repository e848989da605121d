"""What SGLang reads: the keys and names of each algorithm's layout, and what it would not serve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_drafts import TARGET, VOCAB, draft_of, exported, tables, trained
from safetensors.torch import load_file

from specforge.errors import DraftError
from specforge.export.draft import FORMATS, read_export, verify_export, write_export

SGLANG = FORMATS["sglang"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64.0,
}
LAYER = ["input_layernorm", "post_attention_layernorm"]
LAYER += [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_eagle3_config_has_every_key_the_engines_read(tmp_path: Path):
    served = exported(trained("eagle3", draft_vocab_size=10), tmp_path / "out")
    assert served["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (served["model_type"], served["num_hidden_layers"], served["hidden_act"]) == ("llama", 1, "silu")
    assert (served["hidden_size"], served["target_hidden_size"], served["intermediate_size"]) == (16, 16, 24)
    assert (served["num_attention_heads"], served["num_key_value_heads"], served["head_dim"]) == (4, 2, 4)
    assert (served["vocab_size"], served["draft_vocab_size"], served["max_position_embeddings"]) == (VOCAB, 10, 128)
    assert served["dtype"] == served["torch_dtype"] == "bfloat16"
    for flag in ("norm_output", "fc_norm", "norm_before_fc", "norm_before_residual", "tie_word_embeddings"):
        assert served[flag] is False


def test_eagle3_layer_ids_are_written_in_both_conventions(tmp_path: Path):
    served = exported(trained("eagle3"), tmp_path / "out")
    assert served["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    assert served["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1, 3, 4" in card
    assert "2, 4, 5" in card


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash"])
def test_rope_is_written_in_both_forms(tmp_path: Path, algorithm: str):
    plain = exported(trained(algorithm), tmp_path / "plain")
    assert (plain["rope_theta"], plain["rope_scaling"]) == (500_000.0, None)
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000.0}
    scaled = exported(trained(algorithm, replace(TARGET, rope_scaling=LLAMA3_ROPE)), tmp_path / "scaled")
    assert scaled["rope_scaling"] == LLAMA3_ROPE
    assert scaled["rope_parameters"] == {**LLAMA3_ROPE, "rope_theta": 500_000.0}


def test_eagle3_weights_have_the_served_names_shapes_and_dtypes(tmp_path: Path):
    exported(trained("eagle3", draft_vocab_size=10), tmp_path / "out")
    state = weights_of(tmp_path / "out")
    weights = ["fc", "norm", "lm_head", *(f"midlayer.{name}" for name in ["hidden_norm", *LAYER])]
    assert set(state) == {f"{name}.weight" for name in weights} | {"d2t", "t2d"}
    assert state["fc.weight"].shape == (16, 48)
    assert state["midlayer.self_attn.q_proj.weight"].shape == (16, 32)
    assert state["lm_head.weight"].shape == (10, 16)
    assert state["d2t"].dtype == torch.int64
    assert state["t2d"].dtype == torch.bool
    assert {state[f"{name}.weight"].dtype for name in weights} == {torch.bfloat16}
    assert (state["d2t"] + torch.arange(10)).tolist() == [3 * i + 2 for i in range(10)]


@pytest.mark.parametrize(
    "options",
    [
        {"draft_vocab_size": 10},
        {"fc_norm": True, "norm_output": True},
        {"architecture": "mla"},
        {"architecture": "mla", "draft_vocab_size": 10},
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_variant_of_eagle3_gives_the_same_logits(tmp_path: Path, options: dict[str, Any], dtype: str):
    record = trained("eagle3", **options)
    exported(record, tmp_path / "out", dtype=dtype)
    check = verify_export(tmp_path / "out", draft_of(record), tables())
    assert check.identical
    assert (check.difference_to_original == 0.0) == (dtype == "float32")


def test_latent_attention_is_written_in_deepseeks_names_and_order(tmp_path: Path):
    record = trained("eagle3", architecture="mla")
    served = exported(record, tmp_path / "out", dtype="float32")
    assert served["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
    sizes = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    assert [served[name] for name in sizes] == [getattr(record.config, name) for name in sizes]
    state = weights_of(tmp_path / "out")
    names = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
    assert {name.split(".")[2] for name in state if "self_attn" in name} == names
    assert state["midlayer.self_attn.q_a_proj.weight"].shape[1] == 32
    rope = served["qk_rope_head_dim"]
    ours = record.state["midlayer.self_attn.kv_a_proj_with_mqa.weight"][-rope:]
    theirs = state["midlayer.self_attn.kv_a_proj_with_mqa.weight"][-rope:]
    # pairs (i, i + d/2) that are rotated together lie side by side in DeepSeek's checkpoints
    assert torch.equal(theirs[0::2], ours[: rope // 2])
    assert torch.equal(theirs[1::2], ours[rope // 2 :])


def test_dflash_is_written_as_sglang_reads_it(tmp_path: Path):
    served = exported(trained("dflash", aux_layers=(2, 5), mask_token_id=39), tmp_path / "out")
    assert (served["architectures"], served["model_type"]) == (["DFlashDraftModel"], "qwen3")
    assert (served["block_size"], served["num_hidden_layers"], served["num_target_layers"]) == (4, 2, 8)
    assert served["dflash_config"] == {"mask_token_id": 39, "target_layer_ids": [2, 5]}
    assert served["layer_types"] == ["full_attention"] * 2
    names = [*LAYER, "self_attn.q_norm", "self_attn.k_norm"]
    layers = {f"layers.{i}.{name}.weight" for i in range(2) for name in names}
    assert set(weights_of(tmp_path / "out")) == layers | {"fc.weight", "hidden_norm.weight", "norm.weight"}


def test_sliding_layers_are_written_with_their_window(tmp_path: Path):
    types = ("full_attention", "sliding_attention")
    served = exported(trained("dflash", layer_types=types, sliding_window=6), tmp_path / "out")
    assert (served["layer_types"], served["sliding_window"], served["use_sliding_window"]) == ([*types], 6, True)


def test_domino_is_dflash_with_its_projector(tmp_path: Path):
    served = exported(trained("domino"), tmp_path / "out")
    assert served["architectures"] == ["DFlashDraftModel"]
    own = {"projector_type": "domino", "shift_label": True, "pure_draft_prefix_len": 1, "emb_dim": 6}
    assert served["dflash_config"].items() >= (own | {"gru_hidden_dim": 5}).items()
    assert (served["emb_dim"], served["gru_hidden_dim"]) == (6, 5)
    state = weights_of(tmp_path / "out")
    assert state["prefix_gru.weight_ih_l0"].shape == (15, 16)
    assert state["prefix_gru.weight_hh_l0"].shape == (15, 5)
    assert state["embed_proj.0.weight"].shape == (6, 21)
    assert state["embed_proj.2.weight"].shape == (VOCAB, 6)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("confidence", [True, False])
def test_dspark_is_written_with_its_heads(tmp_path: Path, head: str, confidence: bool):
    record = trained("dspark", markov_head_type=head, enable_confidence_head=confidence)
    served = exported(record, tmp_path / "out")
    assert served["architectures"] == ["DSparkDraftModel"]
    own = {"markov_rank": 6, "markov_head_type": head, "enable_confidence_head": confidence}
    assert served["dflash_config"].items() >= (own | {"projector_type": "dspark"}).items()
    assert served.items() >= own.items()
    assert served["target_layer_ids"] == served["dflash_config"]["target_layer_ids"]
    state = weights_of(tmp_path / "out")
    assert state["markov_head.markov_w1.weight"].shape == state["markov_head.markov_w2.weight"].shape == (VOCAB, 6)
    assert ("confidence_head.proj.weight" in state) == confidence
    assert verify_export(tmp_path / "out", draft_of(record), tables()).identical


def test_peagle_is_eagle3_with_parallel_drafting_and_an_embedding_of_its_own(tmp_path: Path):
    served = exported(trained("peagle", draft_vocab_size=10, mask_token_id=39), tmp_path / "out")
    assert (served["parallel_drafting"], served["num_hidden_layers"]) == (True, 2)
    assert served["mask_token_id"] == served["pard_token"] == served["ptd_token_id"] == 39
    state = weights_of(tmp_path / "out")
    assert state["mask_hidden"].shape == (1, 1, 48)
    assert state["embed_tokens.weight"].shape == (VOCAB, 16)
    assert state["layers.0.self_attn.q_proj.weight"].shape == (16, 32)
    assert state["layers.1.self_attn.q_proj.weight"].shape == (16, 16)
    assert state["lm_head.weight"].shape == (10, 16)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("eagle3", {"architecture": "qwen3"}, "architecture qwen3"),
        ("eagle3", {"norm_before_residual": True}, "norm_before_residual"),
        ("eagle3", {"norm_before_fc": True}, "norm_before_fc"),
        ("eagle3", {"aux_layers": (1, 2, 3, 4)}, "aux_layers"),
        ("domino", {"shift_label": False}, "shift_label"),
        ("domino", {"pure_draft_prefix_len": 2}, "pure_draft_prefix_len"),
    ],
)
def test_options_that_sglang_does_not_compute_are_refused_by_name(
    tmp_path: Path, algorithm: str, options: dict[str, Any], message: str
):
    record = trained(algorithm, **options)
    with pytest.raises(DraftError, match=message):
        write_export(record, TARGET, SGLANG, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert exported(record, tmp_path / "out", "hf")


def test_tensors_must_be_exactly_the_served_ones(tmp_path: Path):
    record = trained("eagle3", draft_vocab_size=10)
    state = dict(record.state)
    torn = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    for broken, message in (
        (torn, r"lacks the tensor 'norm\.weight'"),
        ({**state, "extra.weight": torch.zeros(2)}, r"'extra\.weight', which no engine loads"),
        ({**state, "norm.weight": torch.ones(17)}, "shape"),
        ({**state, "d2t": state["d2t"].int()}, r"torch\.int32, expected torch\.int64"),
        ({**state, "norm.weight": torch.full((16,), torch.nan)}, "NaN"),
        ({**state, "d2t": state["d2t"] + torch.arange(10)}, "d2t and t2d"),
        ({**state, "t2d": torch.ones(VOCAB, dtype=torch.bool)}, "d2t and t2d"),
        ({**state, "d2t": state["d2t"].flip(0)}, "d2t and t2d"),
    ):
        with pytest.raises(DraftError, match=message):
            write_export(replace(record, state=broken), TARGET, SGLANG, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_earlier_export_is_replaced_and_nothing_else_is_left(tmp_path: Path):
    exported(trained("eagle3"), tmp_path / "out", dtype="float32")
    exported(trained("eagle3"), tmp_path / "out")
    assert read_export(tmp_path / "out").state["fc.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directory_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DraftError, match="not an export of ours"):
        exported(trained("eagle3"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_directory_of_another_model_is_left_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DraftError, match="not an export of ours"):
        exported(trained("eagle3"), tmp_path)


def test_empty_directory_is_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    exported(trained("eagle3"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_directory_without_an_export_is_one_sentence(tmp_path: Path):
    with pytest.raises(DraftError, match="does not exist"):
        read_export(tmp_path)
