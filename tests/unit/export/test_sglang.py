import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.algorithms.base import TargetTables
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.contracts.capture import TargetInfo
from specforge.errors import DraftError
from specforge.export.sglang import export_sglang, load_exported_eagle3, verify_export

VOCAB = 40
CONFIG = Eagle3DraftConfig(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    vocab_size=VOCAB,
    draft_vocab_size=10,
    aux_layers=(1, 3, 4),
    target_num_layers=8,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64.0,
}
TARGET = TargetInfo(
    path="/somewhere/on/this/machine/tiny-target",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    revision="abc123",
    num_layers=8,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=VOCAB,
    rms_norm_eps=1e-6,
    rope_theta=500_000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
)


def draft_of(config: Eagle3DraftConfig) -> Eagle3Draft:
    torch.manual_seed(3)
    pruned = config.draft_vocab_size != config.vocab_size
    draft = Eagle3Draft(config, torch.arange(10) * 3 + 2 if pruned else None)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return draft


def tables() -> TargetTables:
    embedding = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(5))
    return TargetTables(embedding, embedding)


def exported(out: Path, config: Eagle3DraftConfig = CONFIG, dtype: str = "bfloat16") -> dict[str, Any]:
    export_sglang(draft_of(config).served_state(), config, TARGET, out, dtype)
    return dict(json.loads((out / "config.json").read_text()))


def test_config_has_every_key_the_engines_read(tmp_path: Path):
    served = exported(tmp_path / "out")
    assert served["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (served["model_type"], served["num_hidden_layers"], served["hidden_act"]) == ("llama", 1, "silu")
    assert (served["hidden_size"], served["target_hidden_size"], served["intermediate_size"]) == (16, 16, 24)
    assert (served["num_attention_heads"], served["num_key_value_heads"], served["head_dim"]) == (4, 2, 4)
    assert (served["vocab_size"], served["draft_vocab_size"], served["max_position_embeddings"]) == (VOCAB, 10, 128)
    assert served["dtype"] == served["torch_dtype"] == "bfloat16"
    for flag in ("norm_output", "fc_norm", "norm_before_fc", "norm_before_residual", "tie_word_embeddings"):
        assert served[flag] is False


def test_layer_ids_are_written_in_both_conventions(tmp_path: Path):
    served = exported(tmp_path / "out")
    assert served["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    assert served["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


def test_rope_is_written_in_both_forms(tmp_path: Path):
    plain = exported(tmp_path / "plain")
    assert (plain["rope_theta"], plain["rope_scaling"]) == (500_000.0, None)
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 500_000.0}
    scaled = exported(tmp_path / "scaled", replace(CONFIG, rope_scaling=LLAMA3_ROPE))
    assert scaled["rope_scaling"] == LLAMA3_ROPE
    assert scaled["rope_parameters"] == {**LLAMA3_ROPE, "rope_theta": 500_000.0}


def test_weights_have_the_served_names_shapes_and_dtypes(tmp_path: Path):
    exported(tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    layer = ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    layer += [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    weights = ["fc", "norm", "lm_head", *(f"midlayer.{name}" for name in layer)]
    assert set(state) == {f"{name}.weight" for name in weights} | {"d2t", "t2d"}
    assert state["fc.weight"].shape == (16, 48)
    assert state["midlayer.self_attn.q_proj.weight"].shape == (16, 32)
    assert state["lm_head.weight"].shape == (10, 16)
    assert state["d2t"].dtype == torch.int64
    assert state["t2d"].dtype == torch.bool
    assert {state[f"{name}.weight"].dtype for name in weights} == {torch.bfloat16}
    assert (state["d2t"] + torch.arange(10)).tolist() == [3 * i + 2 for i in range(10)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fc_norm": True, "norm_output": True},
        {"draft_vocab_size": VOCAB},
        {"rope_scaling": LLAMA3_ROPE},
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reloaded_draft_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any], dtype: str):
    config = replace(CONFIG, **changes)
    exported(tmp_path / "out", config, dtype)
    loaded, _ = load_exported_eagle3(tmp_path / "out")
    assert loaded == config
    check = verify_export(tmp_path / "out", draft_of(config), tables())
    assert check.identical
    if dtype == "float32":
        assert check.difference_to_original == 0.0
    else:
        assert 0.0 < check.difference_to_original < 1.0


def test_export_of_another_draft_is_found_out(tmp_path: Path):
    exported(tmp_path / "out")
    other = draft_of(CONFIG)
    with torch.no_grad():
        other.midlayer.mlp.up_proj.weight[0, 0] += 0.1
    with pytest.raises(DraftError, match="does not give the logits"):
        verify_export(tmp_path / "out", other, tables())


def test_wrong_flag_on_disk_changes_the_logits_and_is_found_out(tmp_path: Path):
    served = exported(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({**served, "norm_output": True}))
    with pytest.raises(DraftError, match="does not give the logits"):
        verify_export(tmp_path / "out", draft_of(CONFIG), tables())


@pytest.mark.parametrize("option", ["qk_norm", "norm_before_residual", "norm_before_fc"])
def test_options_that_sglang_does_not_compute_are_refused_by_name(tmp_path: Path, option: str):
    config = replace(CONFIG, **{option: True})
    with pytest.raises(DraftError, match=option):
        export_sglang(draft_of(config).served_state(), config, TARGET, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_numbers_of_captured_layers_are_refused(tmp_path: Path):
    config = replace(CONFIG, aux_layers=(1, 2, 3, 4))
    with pytest.raises(DraftError, match="aux_layers"):
        export_sglang(draft_of(config).served_state(), config, TARGET, tmp_path / "out")


def test_tensors_must_be_exactly_the_served_ones(tmp_path: Path):
    state = draft_of(CONFIG).served_state()
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
            export_sglang(broken, CONFIG, TARGET, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "unknown", "dtype"])
def test_reload_is_strict_about_tensors(tmp_path: Path, kind: str):
    exported(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    if kind == "missing":
        del state["fc.weight"]
    elif kind == "unknown":
        state["mask_hidden"] = torch.zeros(1)
    else:
        state["fc.weight"] = state["fc.weight"].float()
    save_file(state, path)
    with pytest.raises(DraftError, match="tensor"):
        load_exported_eagle3(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Eagle3Speculator"]}, "expected"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "not one higher"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ({"dtype": "int8"}, "dtype"),
        ({"specforge": None}, "lacks"),
    ],
)
def test_reload_is_strict_about_the_config(tmp_path: Path, changes: dict[str, Any], message: str):
    served = exported(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({**served, **changes}))
    with pytest.raises(DraftError, match=message):
        load_exported_eagle3(tmp_path / "out")


def test_flag_that_is_not_explicit_is_refused(tmp_path: Path):
    served = exported(tmp_path / "out")
    del served["norm_before_residual"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(served))
    with pytest.raises(DraftError, match="norm_before_residual"):
        load_exported_eagle3(tmp_path / "out")


def test_earlier_export_is_replaced_and_nothing_else_is_left(tmp_path: Path):
    exported(tmp_path / "out", dtype="float32")
    exported(tmp_path / "out")
    assert load_exported_eagle3(tmp_path / "out")[1]["fc.weight"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_directory_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DraftError, match="not an export of ours"):
        exported(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_directory_of_another_model_is_left_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DraftError, match="not an export of ours"):
        exported(tmp_path)


def test_empty_directory_is_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    exported(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_model_card_names_the_target_without_the_path_of_this_machine(tmp_path: Path):
    served = exported(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("tiny-target", "abc123", "Qwen3ForCausalLM", "1, 3, 4", "2, 4, 5"):
        assert fact in card
    assert "/somewhere" not in card
    assert "/somewhere" not in json.dumps(served)


def test_directory_without_an_export_is_one_sentence(tmp_path: Path):
    with pytest.raises(DraftError, match="does not exist"):
        load_exported_eagle3(tmp_path)
