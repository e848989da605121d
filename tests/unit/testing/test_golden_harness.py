"""The golden vectors pass, and the harness notices when something is wrong."""

import copy
import functools
import json
import operator
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.testing.golden.position_losses import POSITION_LOSSES, loss_terms
from specforge.testing.golden.report import Comparison, NotBuilt, Status
from specforge.testing.golden.run import main, run_directory, run_vector
from specforge.testing.golden.schedule import run_schedule
from specforge.testing.golden.vectors import Vector


def copied(source: Path, directory: Path) -> Path:
    """The json of a copy of the vector ``source`` (without suffix), below ``directory``."""
    folder = directory / source.parent.name
    folder.mkdir(exist_ok=True)
    for suffix in (".json", ".safetensors"):
        shutil.copy(f"{source}{suffix}", folder)
    return folder / f"{source.name}.json"


def outcome(path: Path) -> Status:
    return run_vector(path, path.stem)[0].status


def numbers(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of the numbers in a json."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from numbers(value, (*place, key))
    elif isinstance(tree, float):
        yield place


def perturbed(facts: dict[str, Any], place: tuple[Any, ...]) -> str:
    changed = copy.deepcopy(facts)
    inner = functools.reduce(operator.getitem, place[:-1], changed)
    inner[place[-1]] = inner[place[-1]] * 1.02 or 0.01
    return json.dumps(changed)


@pytest.fixture
def one_vector(golden_dir: Path, tmp_path: Path) -> Path:
    """A copy of one vector under a name that says nothing."""
    (tmp_path / "eagle3").mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copy(golden_dir / "eagle3" / f"sf_ttt7_fcnorm{suffix}", tmp_path / "eagle3" / f"copy{suffix}")
    return tmp_path


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_every_vector_agrees(golden_dir):
    results = run_directory(golden_dir)
    # a vector may name inputs that are not among the shared ones
    absent = [r.name for r in results if r.status is Status.NO_INPUTS]
    assert [(r.name, r.note) for r in results if r.status is not Status.PASSED and r.name not in absent] == []
    assert absent == ["dspark/deepspec_rnn"]


def test_a_good_vector_passes_under_any_name(one_vector):
    assert exit_code(str(one_vector), "--strict") == 0


@pytest.mark.parametrize(
    "key", ["w.fc.weight", "grad.norm.weight", "out.step6.logits", "out.plosses", "out.acc_corrects"]
)
def test_a_perturbed_tensor_is_noticed(one_vector, key, capsys):
    path = one_vector / "eagle3" / "copy.safetensors"
    tensors = load_file(path)
    tensors[key].view(-1)[0] += 2e-3
    save_file(tensors, path)
    assert exit_code(str(one_vector)) == 1
    assert "over" in capsys.readouterr().out


def test_a_perturbed_loss_is_noticed(one_vector):
    path = one_vector / "eagle3" / "copy.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "loss": facts["loss"] * (1 + 3e-6)}))
    assert exit_code(str(one_vector)) == 1


def test_a_result_that_nothing_compares_is_a_failure(one_vector):
    path = one_vector / "eagle3" / "copy.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "out.something_new": tensors["out.loss"].clone()}, path)
    assert exit_code(str(one_vector)) == 1


def test_a_vector_that_cannot_be_run_is_a_failure(one_vector):
    (one_vector / "eagle3" / "copy.safetensors").unlink()
    assert exit_code(str(one_vector)) == 1


def test_vectors_of_what_is_not_built_fail_only_when_strict(one_vector):
    path = one_vector / "eagle3" / "copy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "project": "another one"}))
    assert exit_code(str(one_vector)) == 0
    assert exit_code(str(one_vector), "--strict") == 1


def test_a_folder_without_vectors_is_an_error(tmp_path):
    assert exit_code(str(tmp_path)) == 2


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("dspark/sf_vanilla", ("accuracy", "grad_norm", "ratio_metrics")),
        ("dspark/speculators_gated", ("grad_norm", "metrics")),
        ("dspark/deepspec_vanilla", ("grad_norm", "metrics")),
        ("dflash/speculators_kl_gamma4", ("grad_norm", "metrics")),
        ("domino/sf_shift_lam0.5", ("accuracy", "grad_norm", "metrics")),
        ("peagle/sf_base", ("grad_norm", "metrics")),
        ("eagle3/sf_ttt1_fullvocab", ("grad_norm", "grad_norms", "plosses", "acceptance_rates", "acc_corrects")),
        ("eagle3/speculators_ttt3_eagle31", ("grad_norm", "metrics")),
    ],
)
def test_every_number_of_the_json_is_compared(golden_dir, tmp_path, name, results):
    path = copied(golden_dir / name, tmp_path)
    if name == "dspark/deepspec_vanilla":
        copied(golden_dir / "dspark" / "sf_vanilla", tmp_path)
    facts = json.loads(path.read_text())
    places = list(numbers({key: facts[key] for key in results}))
    assert outcome(path) is Status.PASSED
    for place in places:
        path.write_text(perturbed(facts, place))
        assert outcome(path) is Status.OVER, place


@pytest.mark.parametrize(("name", "key"), [("speculators_vanilla", "metrics"), ("sf_gated", "ratio_metrics")])
def test_a_metric_without_a_counterpart_is_a_failure(golden_dir, tmp_path, name, key):
    path = copied(golden_dir / "dspark" / name, tmp_path)
    facts = json.loads(path.read_text())
    facts[key]["something_new"] = {"num": [1.0]} if key == "ratio_metrics" else 1.0
    path.write_text(json.dumps(facts))
    assert outcome(path) is Status.OVER


def test_a_gradient_of_zeros_agrees_with_none_and_another_does_not(golden_dir, tmp_path):
    path = copied(golden_dir / "dspark" / "sf_vanilla", tmp_path)
    tensors = load_file(path.with_suffix(".safetensors"))
    for value, expected in ((0.0, Status.PASSED), (1.0, Status.OVER)):
        save_file({**tensors, "grad.unused.weight": torch.full((2,), value)}, path.with_suffix(".safetensors"))
        assert outcome(path) is expected


@pytest.mark.parametrize("name", ["eagle_tree", "dspark_greedy", "target_config"])
def test_a_vector_whose_other_files_are_not_there_has_no_inputs(golden_dir, tmp_path, name):
    shutil.copy(golden_dir / "inference" / f"{name}.json", tmp_path)
    path = tmp_path / "inference" / f"{name}.json"
    path.parent.mkdir()
    (tmp_path / f"{name}.json").rename(path)
    assert outcome(path) is Status.NO_INPUTS


def test_a_source_without_its_tensors_gives_no_inputs(golden_dir, tmp_path):
    path = copied(golden_dir / "eagle3" / "torchspec_ttt7_base", tmp_path)
    assert outcome(path) is Status.NO_INPUTS
    copied(golden_dir / "eagle3" / "sf_ttt7_base", tmp_path)
    assert outcome(path) is Status.PASSED
    path.with_name("sf_ttt7_base.safetensors").unlink()
    assert outcome(path) is Status.NO_INPUTS


def test_a_trace_finds_its_draft_by_the_start_of_its_name(golden_dir, tmp_path):
    path = copied(golden_dir / "inference" / "dspark_greedy", tmp_path)
    for name in ("target_config.json", "target.safetensors"):
        shutil.copy(golden_dir / "inference" / name, path.parent)
    path = path.rename(path.with_name("dspark_greedy_conf0.0.json"))
    assert outcome(path) is Status.PASSED


def test_a_loss_is_a_name_or_factors_of_names():
    assert loss_terms("rkl") == {"rkl": 1.0}
    assert loss_terms('{"ce": 0.1, "tv": 0.9}') == loss_terms({"ce": 0.1, "tv": 0.9}) == {"ce": 0.1, "tv": 0.9}
    with pytest.raises(NotBuilt, match="another"):
        loss_terms("another")
    draft, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(POSITION_LOSSES["rkl"](draft, teacher), POSITION_LOSSES["kl_div"](teacher, draft))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("torchspec_linear_total4_warm0", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("torchspec_linear_warm0_total4", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("torchspec_linear_min0.5_warm2_total4", [0.0, 0.5, 1.0, 0.75, 0.5]),
        ("torchspec_WSD_linear_decay2_total4_warm0", [1.0, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_the_parts_of_a_schedules_name_may_be_in_any_order(tmp_path, name, first):
    result = Comparison(name)
    run_schedule(Vector(tmp_path, "schedule", {"base_lr": 1.0, "lr": {name: first}}, {}), result)
    assert result.finish(set()).status is Status.PASSED, result.note
