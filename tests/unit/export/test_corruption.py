"""A directory that says or holds something wrong is refused when it is read, or found by the comparison of logits.

Two kinds of culprit: somebody with an editor, who changes what was written, and an exporter with a mistake, which would
write and expect the same wrong thing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_drafts import TARGET, draft_of, exported, tables, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.errors import DraftError
from specforge.export.base import ExportFormat
from specforge.export.draft import FORMATS, read_export, verify_export, write_export

PRUNED = {"draft_vocab_size": 10}
EAGLE_PAIRS = [("eagle3", "sglang"), ("eagle3", "vllm"), ("peagle", "sglang"), ("peagle", "vllm")]
BLOCK_PAIRS = [("dflash", "sglang"), ("dflash", "vllm"), ("dspark", "sglang"), ("dspark", "vllm"), ("domino", "sglang")]
IDS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")


def shifted_ids(served: dict[str, Any], by: int) -> dict[str, Any]:
    """``served`` with every list of layer ids ``by`` more."""
    changed = dict(served)
    for key, value in served.items():
        if key in IDS:
            changed[key] = [layer + by for layer in value]
        elif isinstance(value, dict) and key != "specforge":
            changed[key] = shifted_ids(value, by)
    return changed


def edit_config(out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = out / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def edit_tensors(out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = out / "model.safetensors"
    save_file(change(load_file(path)), path)


def mistaken(to: str, algorithm: str, method: str, change: Callable[[Any], Any]) -> ExportFormat:
    """The format ``to`` whose layout of ``algorithm`` changes what ``method`` gives: an exporter with a mistake."""
    right = FORMATS[to].layout(algorithm)

    class Mistaken(type(right)):  # type: ignore[misc]
        pass

    setattr(Mistaken, method, lambda _self, *arguments: change(getattr(right, method)(*arguments)))
    return replace(FORMATS[to], layouts={**FORMATS[to].layouts, algorithm: Mistaken()})


@pytest.mark.parametrize(("algorithm", "to"), EAGLE_PAIRS + BLOCK_PAIRS)
@pytest.mark.parametrize("by", [-1, 1])
def test_layer_ids_off_by_one_are_refused_whoever_wrote_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, to: str, by: int
):
    record = trained(algorithm)
    exported(record, tmp_path / "edited", to)
    edit_config(tmp_path / "edited", lambda served: shifted_ids(served, by))
    with pytest.raises(DraftError, match="expected"):
        read_export(tmp_path / "edited")
    wrong = mistaken(to, algorithm, "config", lambda served: shifted_ids(served, by))
    monkeypatch.setitem(FORMATS, to, wrong)
    write_export(record, TARGET, wrong, tmp_path / "out")
    with pytest.raises(DraftError, match=r"would take the draft's aux_layers for"):
        verify_export(tmp_path / "out", draft_of(record), tables())


@pytest.mark.parametrize("to", ["sglang", "vllm"])
@pytest.mark.parametrize("flag", ["fc_norm", "norm_output", "norm_before_fc", "norm_before_residual"])
def test_flipped_norm_is_refused_whoever_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, flag: str):
    record = trained("eagle3")
    exported(record, tmp_path / "edited", to)
    edit_config(tmp_path / "edited", lambda served: {**served, flag: True})
    with pytest.raises(DraftError, match=f"says {flag} = True, expected False"):
        read_export(tmp_path / "edited")
    wrong = mistaken(to, "eagle3", "config", lambda served: {**served, flag: True})
    monkeypatch.setitem(FORMATS, to, wrong)
    write_export(record, TARGET, wrong, tmp_path / "out")
    with pytest.raises(DraftError, match=f"would take the draft's {flag} for True, but it is False"):
        verify_export(tmp_path / "out", draft_of(record), tables())


@pytest.mark.parametrize("to", ["sglang", "vllm", "hf"])
def test_norm_flipped_everywhere_shows_in_the_logits(tmp_path: Path, to: str):
    """The directory of another draft with the very same tensors agrees with itself; its logits do not agree."""
    record = trained("eagle3")
    other = trained("eagle3", norm_output=True)
    assert other.state.keys() == record.state.keys()
    exported(replace(other, state=record.state), tmp_path / "out", to, "float32")
    with pytest.raises(DraftError, match="does not give the logits"):
        verify_export(tmp_path / "out", draft_of(record), tables())


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_size", 5), ("mask_token_id", 1), ("layer_types", ["sliding_attention"] * 2), ("num_hidden_layers", 1)],
)
@pytest.mark.parametrize("to", ["sglang", "vllm"])
def test_exporter_that_writes_another_block_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, key: str, value: Any
):
    def change(served: dict[str, Any]) -> dict[str, Any]:
        nested = {name: change(inner) if isinstance(inner, dict) else inner for name, inner in served.items()}
        return {**nested, key: value} if key in served else nested

    record = trained("dflash", mask_token_id=39)
    wrong = mistaken(to, "dflash", "config", change)
    monkeypatch.setitem(FORMATS, to, wrong)
    write_export(record, TARGET, wrong, tmp_path / "out")
    with pytest.raises(DraftError, match="would take the draft's"):
        verify_export(tmp_path / "out", draft_of(record), tables())


@pytest.mark.parametrize("to", ["sglang", "vllm", "hf"])
def test_map_that_holds_ids_instead_of_offsets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str):
    record = trained("eagle3", **PRUNED)

    def hold_ids(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "d2t": tensors["d2t"] + torch.arange(10)}

    exported(record, tmp_path / "edited", to)
    edit_tensors(tmp_path / "edited", hold_ids)
    with pytest.raises(DraftError, match="d2t and t2d"):
        read_export(tmp_path / "edited")
    if to == "hf":
        return
    wrong = mistaken(to, "eagle3", "encode", hold_ids)
    monkeypatch.setitem(FORMATS, to, wrong)
    write_export(record, TARGET, wrong, tmp_path / "out")
    with pytest.raises(DraftError, match="d2t and t2d"):
        verify_export(tmp_path / "out", draft_of(record), tables())


@pytest.mark.parametrize("missing", ["d2t", "t2d"])
def test_one_map_without_the_other_is_refused(tmp_path: Path, missing: str):
    exported(trained("eagle3", **PRUNED), tmp_path / "out", "hf")
    edit_tensors(tmp_path / "out", lambda tensors: {name: it for name, it in tensors.items() if name != missing})
    with pytest.raises(DraftError, match="alone; expected both d2t and t2d, or neither"):
        read_export(tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda tensors: {name: it for name, it in tensors.items() if "2" not in name})
    with pytest.raises(DraftError, match="lacks the tensor 't2d'"):
        read_export(tmp_path / "out").build(tables())
    edit_tensors(tmp_path / "out", lambda tensors: {**tensors, "d2t": torch.tensor(1), "t2d": torch.tensor(True)})
    with pytest.raises(DraftError, match="d2t has 0 dimensions"):
        read_export(tmp_path / "out")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
ROTARY_PAIRS = [("eagle3", "sglang"), ("eagle3", "vllm"), ("dflash", "vllm"), ("mtp", "hf")]


@pytest.mark.parametrize(("algorithm", "to"), ROTARY_PAIRS)
@pytest.mark.parametrize("key", ["factor", "rope_type", "rope_theta"])
def test_rotary_settings_that_differ_between_readers_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, to: str, key: str
):
    def change(served: dict[str, Any]) -> dict[str, Any]:
        nested = {name: change(inner) if isinstance(inner, dict) else inner for name, inner in served.items()}
        if "rope_parameters" in served:
            nested["rope_parameters"] = {**served["rope_parameters"], key: 2.0}
        return nested

    record = trained(algorithm, replace(TARGET, rope_scaling=YARN))
    exported(record, tmp_path / "right", to)
    assert read_export(tmp_path / "right").config.rope_scaling == YARN
    if to == "hf":
        wrong = replace(FORMATS["hf"], any_other=mistaken("hf", algorithm, "config", change).layouts[algorithm])
    else:
        wrong = mistaken(to, algorithm, "config", change)
    monkeypatch.setitem(FORMATS, to, wrong)
    write_export(record, TARGET, wrong, tmp_path / "out")
    with pytest.raises(DraftError, match="would take the draft's rope_"):
        read_export(tmp_path / "out")


def test_old_name_of_the_rotary_type_reaches_every_reader(tmp_path: Path):
    old = {"type": "linear", "factor": 2.0}
    served = exported(trained("eagle3", replace(TARGET, rope_scaling=old)), tmp_path / "out")
    assert served["rope_scaling"] == old
    assert served["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}
    assert read_export(tmp_path / "out").config.rope_scaling == old


@pytest.mark.parametrize(("algorithm", "to"), [*EAGLE_PAIRS, ("medusa", "vllm")])
def test_changed_row_of_a_head_is_found_out(tmp_path: Path, algorithm: str, to: str):
    record = trained(algorithm)
    exported(record, tmp_path / "out", to)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = next(name for name in tensors if name.startswith("lm_head"))
        tensors[head][7] += 1.0
        return tensors

    edit_tensors(tmp_path / "out", change)
    with pytest.raises(DraftError, match=r"does not give the logits .*lm_head"):
        verify_export(tmp_path / "out", draft_of(record), tables())


@pytest.mark.parametrize(("algorithm", "to"), EAGLE_PAIRS + BLOCK_PAIRS)
def test_weight_of_another_format_or_name_is_refused(tmp_path: Path, algorithm: str, to: str):
    exported(trained(algorithm), tmp_path / "out", to)
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    name = "norm.weight"
    for change, message in (
        ({name: state[name].float()}, r"'norm\.weight' is torch\.float32, expected torch\.bfloat16"),
        ({"final_norm.weight": state[name]}, r"'final_norm\.weight', which no engine loads"),
    ):
        others = {other: tensor for other, tensor in state.items() if other != name}
        save_file({**others, **change}, path)
        with pytest.raises(DraftError, match=message):
            read_export(tmp_path / "out")


def test_number_format_that_the_config_does_not_say_is_refused(tmp_path: Path):
    exported(trained("eagle3"), tmp_path / "out", "vllm")
    edit_config(tmp_path / "out", lambda served: {**served, "dtype": "float16", "torch_dtype": "float16"})
    with pytest.raises(DraftError, match=r"torch\.bfloat16, expected torch\.float16"):
        read_export(tmp_path / "out")
