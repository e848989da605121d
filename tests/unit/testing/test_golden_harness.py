"""The golden vectors pass, and the harness notices when something is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from specforge.testing.golden.report import Status
from specforge.testing.golden.run import main, run_directory


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


def test_every_vector_of_what_exists_agrees(golden_dir):
    results = run_directory(golden_dir)
    assert [(r.name, r.note) for r in results if r.status in {Status.OVER, Status.FAILED}] == []
    built = {r.name for r in results if r.status is Status.PASSED}
    expected = {p.stem for p in (golden_dir / "eagle3").glob("*.json") if "lk_loss_type" not in p.read_text()}
    assert {f"eagle3/{name}" for name in expected} <= built
    assert {"masks_and_tables:vocab_map_prune", "masks_and_tables:eagle3_default_aux_ids"} <= built


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
