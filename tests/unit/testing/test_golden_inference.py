"""The vectors of decoding and verification: recognised by their keys, and noticed when something is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from specforge.testing.golden.report import Status
from specforge.testing.golden.run import run_vector


@pytest.fixture
def folder(golden_dir: Path, tmp_path: Path) -> Path:
    """The inference vectors without their jsons, and the target of the traces."""
    copy = tmp_path / "inference"
    copy.mkdir()
    for path in (*(golden_dir / "inference").glob("*.safetensors"), golden_dir / "inference" / "target_config.json"):
        shutil.copy(path, copy)
    return copy


def status_of(path: Path) -> tuple[Status, str]:
    (result,) = run_vector(path, "vector")
    return result.status, result.note


def changed(golden_dir: Path, folder: Path, name: str, change: Callable[[Any], None]) -> Path:
    facts = json.loads((golden_dir / "inference" / f"{name}.json").read_text())
    change(facts)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(facts))
    return path


def test_trace_without_a_twin_takes_the_weights_that_its_name_begins_with(golden_dir: Path, folder: Path):
    shutil.copy(golden_dir / "inference" / "dspark_greedy.json", folder / "dspark_greedy_again.json")
    assert status_of(folder / "dspark_greedy_again.json")[0] is Status.PASSED


def _accepted(facts: Any) -> None:
    facts["samples"][1]["steps"][2]["accepted"] += 1


def _proposal(facts: Any) -> None:
    facts["samples"][0]["steps"][1]["verify_ids"][1] ^= 1


def _output(facts: Any) -> None:
    facts["samples"][3]["output"][-1] ^= 1


def _confidence(facts: Any) -> None:
    facts["samples"][0]["steps"][0]["confidence_logits"][2] += 1e-3


@pytest.mark.parametrize("change", [_accepted, _proposal, _output, _confidence])
def test_changed_round_of_a_trace_is_noticed(golden_dir: Path, folder: Path, change: Callable[[Any], None]):
    path = changed(golden_dir, folder, "dspark_greedy", change)
    assert status_of(path)[0] is Status.OVER


def test_other_weights_are_noticed(golden_dir: Path, folder: Path):
    path = changed(golden_dir, folder, "eagle3_chain_greedy", lambda _facts: None)
    twin = path.with_suffix(".safetensors")
    tensors = load_file(twin)
    save_file({**tensors, "w.fc.weight": -tensors["w.fc.weight"]}, twin)
    assert status_of(path)[0] is Status.OVER


@pytest.mark.parametrize("key", ["residual", "alpha", "expected_committed", "accept_prob_by_token"])
def test_changed_rule_of_acceptance_is_noticed(golden_dir: Path, folder: Path, key: str):
    def change(facts: Any) -> None:
        value = facts["chain"][1][key]
        if key == "expected_committed":
            facts["chain"][1][key] = value + 1e-3
        elif key == "alpha":
            value[0] += 1e-3
        else:
            value[0][1] += 1e-3

    path = changed(golden_dir, folder, "verify_vectors", change)
    assert status_of(path)[0] is Status.OVER


def test_changed_marginal_of_siblings_is_noticed(golden_dir: Path, folder: Path):
    def change(facts: Any) -> None:
        facts["siblings"][0]["final_residual"][1] += 1e-3

    path = changed(golden_dir, folder, "verify_vectors", change)
    assert "siblings[0].final_residual" in status_of(path)[1]


def test_vector_with_unknown_keys_is_not_built(folder: Path):
    (folder / "other.json").write_text('{"project": "another one"}')
    assert status_of(folder / "other.json")[0] is Status.NOT_BUILT
