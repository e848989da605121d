"""What holds for drafts of every algorithm in every format that writes them."""

import json
from pathlib import Path

import pytest
import torch
from export_drafts import OPTIONS, TARGET, draft_of, exported, tables, trained
from safetensors.torch import load_file, save_file

from specforge.algorithms.catalog import ALGORITHMS
from specforge.errors import DraftError
from specforge.export.base import DraftOrigin
from specforge.export.draft import FORMATS, read_export, verify_export, write_export
from specforge.launch.export import served_format

PAIRS = [(name, to) for name in ALGORITHMS for to, format_ in FORMATS.items() if format_.writes(name)]


def test_every_algorithm_is_tried_here_and_all_but_two_are_served_by_sglang():
    assert set(OPTIONS) >= set(ALGORITHMS)
    assert {name: served_format(name) for name in ("mtp", "medusa")} == {"mtp": "hf", "medusa": "vllm"}
    assert {name for name in ALGORITHMS if served_format(name) != "sglang"} == {"mtp", "medusa"}


@pytest.mark.parametrize(("algorithm", "to"), PAIRS)
def test_what_is_reloaded_proposes_the_same(tmp_path: Path, algorithm: str, to: str):
    record = trained(algorithm)
    exported(record, tmp_path / "out", to)
    found = read_export(tmp_path / "out")
    assert found.config == record.config
    assert found.options == record.options
    assert (found.target_revision, found.capture_dtype) == ("abc123", "float32")
    assert set(found.state) == set(record.state)
    check = verify_export(tmp_path / "out", draft_of(record), tables())
    assert check.identical
    assert (check.difference_to_original == 0.0) == (to == "hf")


@pytest.mark.parametrize(("algorithm", "to"), PAIRS)
def test_number_format_can_be_chosen(tmp_path: Path, algorithm: str, to: str):
    record = trained(algorithm)
    assert exported(record, tmp_path / "out", to, "float16")["dtype"] == "float16"
    weights = {
        tensor.dtype for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items() if name[1:] != "2d"
    }
    assert weights - {torch.int64, torch.bool} == {torch.float16}
    assert verify_export(tmp_path / "out", draft_of(record), tables()).identical


@pytest.mark.parametrize(("algorithm", "to"), PAIRS)
def test_another_draft_is_found_out(tmp_path: Path, algorithm: str, to: str):
    exported(trained(algorithm), tmp_path / "out", to)
    with pytest.raises(DraftError, match="does not give the logits"):
        verify_export(tmp_path / "out", draft_of(trained(algorithm, seed=4)), tables())


@pytest.mark.parametrize(("algorithm", "to"), PAIRS)
@pytest.mark.parametrize("kind", ["missing", "unknown", "dtype", "shape"])
def test_reload_is_strict_about_tensors(tmp_path: Path, algorithm: str, to: str, kind: str):
    exported(trained(algorithm), tmp_path / "out", to)
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    name = next(name for name, tensor in state.items() if tensor.dim() == 2)
    if kind == "missing":
        del state[name]
    elif kind == "unknown":
        state["extra"] = state[name].clone()
    elif kind == "dtype":
        state[name] = state[name].double()
    else:
        state[name] = state[name][:-1].clone()
    save_file(state, path)
    with pytest.raises(DraftError, match="tensor"):
        read_export(tmp_path / "out").build(tables())


@pytest.mark.parametrize(("algorithm", "to"), PAIRS)
def test_every_key_of_the_reader_is_checked(tmp_path: Path, algorithm: str, to: str):
    record = trained(algorithm)
    served = exported(record, tmp_path / "out", to)
    path = tmp_path / "out" / "config.json"
    origin = DraftOrigin(record.options, "tiny-target", "Qwen3ForCausalLM")
    keys = FORMATS[to].layout(algorithm).config(record.config, origin)
    assert len(keys) >= 10
    for key in keys:
        path.write_text(json.dumps({**served, key: "changed"}))
        with pytest.raises(DraftError, match=f"says {key} = 'changed'"):
            read_export(tmp_path / "out")
        path.write_text(json.dumps({name: value for name, value in served.items() if name != key}))
        with pytest.raises(DraftError, match=key):
            read_export(tmp_path / "out")


@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) & {"mtp", "medusa"}))
def test_what_no_engine_serves_is_refused_with_what_can_be_written(tmp_path: Path, algorithm: str):
    with pytest.raises(DraftError, match=rf"SGLang serves no {algorithm} drafts; .*eagle3.*dspark.*--to hf"):
        write_export(trained(algorithm), TARGET, FORMATS["sglang"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("algorithm", "to"), PAIRS)
def test_model_card_names_the_target_without_the_path_of_this_machine(tmp_path: Path, algorithm: str, to: str):
    served = exported(trained(algorithm), tmp_path / "out", to)
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (f"# {algorithm} draft", "tiny-target", "abc123", "Qwen3ForCausalLM", "## Serving", "parameters"):
        assert fact in card
    assert "/somewhere" not in card + json.dumps(served)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_plain_export_has_the_whole_draft_config(tmp_path: Path, algorithm: str):
    record = trained(algorithm)
    served = exported(record, tmp_path / "out", "hf")
    assert served["model_type"] == f"specforge_{algorithm}"
    assert record.config.to_dict().items() <= served.items()
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(record.state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"specforge": None}, "lacks 'specforge'"),
        ({"specforge": {}}, r"lacks specforge\.format"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_config_of_somebody_else_is_refused(tmp_path: Path, changes: dict[str, object], message: str):
    served = exported(trained("eagle3"), tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({**served, **changes}))
    with pytest.raises(DraftError, match=message):
        read_export(tmp_path / "out")


def test_unknown_algorithm_or_format_is_one_sentence(tmp_path: Path):
    served = exported(trained("eagle3"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    for change in ({"options": {"name": "eagle9"}}, {"format": "gguf"}, {"options": {"name": "eagle3", "odd": 1}}):
        path.write_text(json.dumps(served | {"specforge": served["specforge"] | change}))
        with pytest.raises(DraftError):
            read_export(tmp_path / "out")
