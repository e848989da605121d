"""The final norm without transformers: the same bits as transformers' own."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from specforge.errors import TargetError
from specforge.inference.plugins.target_files import FINAL_NORMS, FinalNorm, read_final_norm, read_revision
from specforge.inference.target import read_target_info

TargetDir = Callable[[str], Path]

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def final_norm_of(architecture: str) -> torch.nn.Module:
    """The module that transformers norms the last hidden state with, with weights that show what is done to them."""
    kinds = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model_type = next(name for name, model in kinds.items() if model == architecture)
    experts = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    sizes = SIZES | (experts if "Moe" in architecture or "Mixtral" in architecture else {})
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == architecture
    norm = dict(model.named_modules())["model.norm"]
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm


@pytest.mark.parametrize("architecture", FINAL_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_every_known_architecture_has_the_bits_of_transformers(architecture: str, dtype: torch.dtype):
    torch.manual_seed(0)
    theirs = final_norm_of(architecture).to(dtype)
    eps = getattr(theirs, "variance_epsilon", None) or theirs.eps
    ours = FinalNorm(theirs.weight.detach(), eps, FINAL_NORMS[architecture])
    hidden = (torch.randn(40, 32) * torch.logspace(-3, 3, 40)[:, None]).to(dtype)
    with torch.no_grad():
        assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2"])
def test_norm_is_read_from_a_directory(target_dir: TargetDir, name: str):
    model = transformers.AutoModelForCausalLM.from_pretrained(target_dir(name))
    norm = read_final_norm(target_dir(name), torch.float32)
    hidden = torch.randn(5, 32)
    with torch.no_grad():
        assert torch.equal(norm(hidden), model.model.norm(hidden))
    assert read_final_norm(target_dir(name), torch.bfloat16).weight.dtype == torch.bfloat16


def test_norm_is_found_in_the_shard_that_has_it(target_dir: TargetDir, tmp_path: Path):
    directory = Path(shutil.copytree(target_dir("qwen3"), tmp_path / "sharded"))
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    last = {"model.norm.weight": weights.pop("model.norm.weight")}
    save_file(weights, directory / "model-00001-of-00002.safetensors")
    save_file(last, directory / "model-00002-of-00002.safetensors")
    assert torch.equal(read_final_norm(directory, torch.float32).weight, last["model.norm.weight"])


def test_unknown_norm_is_refused(target_dir: TargetDir):
    with pytest.raises(TargetError, match="GPT2LMHeadModel"):
        read_final_norm(target_dir("gpt2"), torch.float32)
    # LayerNorm with a bias, in a model whose name says nothing of it
    with pytest.raises(TargetError, match="PhiForCausalLM"):
        read_final_norm(target_dir("phi"), torch.float32)


@pytest.mark.parametrize("broken", ["config", "eps", "weights", "norm"])
def test_what_is_missing_is_named(target_dir: TargetDir, tmp_path: Path, broken: str):
    directory = Path(shutil.copytree(target_dir("qwen3"), tmp_path / "broken"))
    config, weights = directory / "config.json", directory / "model.safetensors"
    if broken == "config":
        config.unlink()
    elif broken == "eps":
        fields = json.loads(config.read_text())
        del fields["rms_norm_eps"]
        config.write_text(json.dumps(fields))
    elif broken == "weights":
        weights.unlink()
    else:
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights)
    expected = {"config": "config.json", "eps": "rms_norm_eps", "weights": "safetensors", "norm": "model.norm.weight"}
    with pytest.raises(TargetError, match=re.escape(expected[broken])):
        read_final_norm(directory, torch.float32)


def test_revision_is_that_of_the_target_info(target_dir: TargetDir, tmp_path: Path):
    assert read_revision(target_dir("qwen3")) == read_target_info(target_dir("qwen3")).revision
    with pytest.raises(TargetError, match=r"config\.json"):
        read_revision(tmp_path)
