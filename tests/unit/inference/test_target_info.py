import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specforge.contracts.capture import TargetInfo
from specforge.contracts.codec import dumps, loads
from specforge.errors import TargetError
from specforge.inference.plugins import target_files
from specforge.inference.target import load_tokenizer, read_target_info

TargetDir = Callable[[str], Path]


def copied(source: Path, into: Path) -> Path:
    return Path(shutil.copytree(source, into / "copy"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_facts_of_a_target_are_read(target_dir: TargetDir):
    info = read_target_info(target_dir("qwen3"))
    assert (info.architecture, info.model_type) == ("Qwen3ForCausalLM", "qwen3")
    assert (info.num_layers, info.hidden_size, info.vocab_size, info.head_dim) == (4, 32, 64, 8)
    assert (info.num_attention_heads, info.num_key_value_heads, info.intermediate_size) == (4, 2, 48)
    assert (info.eos_token_ids, info.rope_scaling, info.rope_theta) == ((2,), None, 10_000.0)
    assert loads(TargetInfo, dumps(info)) == info


def test_head_dim_follows_from_the_sizes_where_the_config_has_none(target_dir: TargetDir):
    assert read_target_info(target_dir("qwen2")).head_dim == 8


def test_older_names_of_the_sizes_are_understood(target_dir: TargetDir):
    info = read_target_info(target_dir("gpt2"))
    assert (info.num_layers, info.num_attention_heads, info.max_position_embeddings) == (4, 4, 128)


def test_soft_cap_of_the_logits_is_read(target_dir: TargetDir):
    assert read_target_info(target_dir("gemma2")).logit_softcap == 30.0
    assert read_target_info(target_dir("llama")).logit_softcap is None


def test_rope_of_full_attention_is_used_where_layer_types_differ(target_dir: TargetDir):
    assert read_target_info(target_dir("gemma3")).rope_theta == 1_000_000.0


def test_old_and_new_forms_of_rope_scaling_give_the_same_facts(target_dir: TargetDir, tmp_path: Path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = copied(target_dir("llama"), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    for form in ({"rope_theta": 5e5, "rope_scaling": scaling}, {"rope_parameters": {"rope_theta": 5e5, **scaling}}):
        (directory / "config.json").write_text(json.dumps({**config, **form}))
        info = read_target_info(directory)
        assert info.rope_theta == 5e5
        assert info.rope_scaling == scaling


def test_numbers_of_the_rope_scaling_stay_whole_numbers_and_booleans(target_dir: TargetDir, tmp_path: Path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
    directory = copied(target_dir("llama"), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_theta": 5e5, **scaling}}))
    info = read_target_info(directory)
    found = loads(TargetInfo, dumps(info)).rope_scaling
    assert found is not None
    assert {name: (type(value), value) for name, value in found.items() if name in scaling} == {
        name: (type(value), value) for name, value in scaling.items()
    }


def test_stop_tokens_of_the_generation_config_win(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("llama"), tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert read_target_info(directory).eos_token_ids == (5, 9)


def test_nested_text_config_is_read(tmp_path: Path):
    text = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 64, "head_dim": 8}
    transformers.Gemma3Config(
        text_config=text,
        vision_config={"hidden_size": 16, "num_hidden_layers": 2},
        architectures=["Gemma3ForConditionalGeneration"],
    ).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    info = read_target_info(tmp_path)
    assert (info.num_layers, info.hidden_size, info.vocab_size) == (6, 32, 64)


def test_revision_depends_on_content_not_on_place(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("qwen3"), tmp_path)
    original = read_target_info(target_dir("qwen3")).revision
    assert read_target_info(directory).revision == original
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert read_target_info(directory).revision != original


def test_revision_of_large_files_samples_their_content(
    target_dir: TargetDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(target_files, "FULL_HASH_BYTES", 0)
    monkeypatch.setattr(target_files, "HASH_SAMPLE_BYTES", 4096)
    directory = copied(target_dir("qwen3"), tmp_path)
    before = read_target_info(directory).revision
    assert read_target_info(directory).revision == before
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    assert read_target_info(directory).revision != before


def test_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(TargetError, match="is not a directory"):
        read_target_info(tmp_path / "nowhere")


def test_directory_without_config_is_named(tmp_path: Path):
    with pytest.raises(TargetError, match=r"has no config\.json"):
        read_target_info(tmp_path)


def test_broken_config_is_one_sentence(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("llama"), tmp_path)
    (directory / "config.json").write_text("{ not json")
    with pytest.raises(TargetError, match="not a configuration") as caught:
        read_target_info(directory)
    assert "\n" not in str(caught.value)


def test_unknown_model_type_is_one_sentence(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("llama"), tmp_path)
    edit_config(directory, model_type="no-such-model")
    with pytest.raises(TargetError) as caught:
        read_target_info(directory)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("llama"), tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(TargetError, match="pickled"):
        read_target_info(directory)


def test_missing_weights_are_named(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("llama"), tmp_path)
    (directory / "model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"no \*\.safetensors"):
        read_target_info(directory)


def test_encoder_is_not_a_target(target_dir: TargetDir, tmp_path: Path):
    directory = copied(target_dir("llama"), tmp_path)
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(directory)
    with pytest.raises(TargetError, match="not a causal language model"):
        read_target_info(directory)


def test_missing_tokenizer_is_one_sentence(target_dir: TargetDir):
    with pytest.raises(TargetError, match="tokenizer") as caught:
        load_tokenizer(target_dir("llama"))
    assert "\n" not in str(caught.value)


def test_tokenizer_of_a_target_loads(tiny_target_dir: Path):
    tokenizer = load_tokenizer(tiny_target_dir)
    assert tokenizer.decode(tokenizer.encode("1 + 2 = 3")) == "1 + 2 = 3"


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2.5]]}
ADDED = [{"content": "<mask>", "id": 5}]


@pytest.mark.parametrize(
    ("tokenizer", "found"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 9}}, "added_tokens": ADDED}, (5, 10)),
        ({"model": UNIGRAM, "added_tokens": ADDED}, (5, 6)),
        ({"model": UNIGRAM, "added_tokens": []}, (None, 3)),
        ({"model": {"type": "BPE"}, "added_tokens": ADDED}, (5, None)),
        ({"model": {"type": "Unigram", "vocab": []}, "added_tokens": ADDED}, (5, None)),
        ({"model": None, "added_tokens": None}, (None, None)),
    ],
)
def test_ids_of_a_tokenizer_are_those_of_its_model_and_added_ones(
    target_dir: TargetDir, tmp_path: Path, tokenizer: dict[str, object], found: tuple[int | None, int | None]
):
    directory = copied(target_dir("llama"), tmp_path)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<mask>"}}))
    info = read_target_info(directory)
    assert (info.mask_token_id, info.num_tokens) == found
