"""Every directory for SGLang passes a loader that was written from SGLang's side, and broken ones do not."""

import json
from pathlib import Path
from typing import Any

import pytest
from export_drafts import exported, trained
from safetensors.torch import load_file, save_file
from sglang_loader import LoadError, load

from specforge.export.draft import FORMATS

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("eagle3", {}),
    ("eagle3", {"draft_vocab_size": 10}),
    ("eagle3", {"fc_norm": True, "norm_output": True}),
    ("eagle3", {"architecture": "mla"}),
    ("eagle3", {"architecture": "mla", "draft_vocab_size": 10, "fc_norm": True}),
    ("peagle", {}),
    ("peagle", {"draft_vocab_size": 10}),
    ("dflash", {}),
    ("dflash", {"layer_types": ("full_attention", "sliding_attention"), "sliding_window": 6}),
    ("domino", {}),
    ("dspark", {}),
    ("dspark", {"markov_head_type": "gated", "confidence_head_with_markov": False}),
    ("dspark", {"markov_head_type": "rnn", "enable_confidence_head": False}),
]


def test_every_algorithm_that_sglang_serves_is_loaded_here():
    assert {algorithm for algorithm, _ in VARIANTS} == set(FORMATS["sglang"].layouts)


@pytest.mark.parametrize(("algorithm", "options"), VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_written_for_sglang_loads(tmp_path: Path, algorithm: str, options: dict[str, Any], dtype: str):
    exported(trained(algorithm, **options), tmp_path / "out", dtype=dtype)
    load(tmp_path / "out", algorithm)


@pytest.mark.parametrize(("algorithm", "options"), VARIANTS)
def test_every_single_tensor_is_needed_and_no_other_is(tmp_path: Path, algorithm: str, options: dict[str, Any]):
    exported(trained(algorithm, **options), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    for name, tensor in state.items():
        others = {other: value for other, value in state.items() if other != name}
        save_file(others, path)
        with pytest.raises(LoadError, match="missing name"):
            load(tmp_path / "out", algorithm)
        save_file({**others, f"model.{name}": tensor}, path)
        with pytest.raises(LoadError, match="unknown name"):
            load(tmp_path / "out", algorithm)
        save_file({**others, name: tensor.double()}, path)
        with pytest.raises(LoadError, match="float64"):
            load(tmp_path / "out", algorithm)
        save_file({**others, name: tensor[None]}, path)
        with pytest.raises(LoadError, match="has shape"):
            load(tmp_path / "out", algorithm)


@pytest.mark.parametrize("algorithm", list(FORMATS["sglang"].layouts))
def test_keys_that_size_the_draft_are_read(tmp_path: Path, algorithm: str):
    served = exported(trained(algorithm), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_hidden_layers"):
        path.write_text(json.dumps({**served, key: served[key] + 1}))
        with pytest.raises(LoadError):
            load(tmp_path / "out", algorithm)
