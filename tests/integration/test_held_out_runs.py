"""Evaluation during training, as a user runs it: on one rank and two, in both topologies, across a resume."""

import json

import pytest
from runs import specforge, write_run

from specforge.testing.tiny_target import generated_text
from specforge.training.checkpoint import best_state, list_checkpoints


@pytest.fixture
def run_with(tmp_path, tiny_target_dir):
    """A run file with evaluation every 4 of its 12 steps, and decoding at the last."""
    lines = generated_text(6 * 8, seed=9).splitlines()
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(
        "".join(json.dumps({"text": "\n".join(lines[start : start + 8])}) + "\n" for start in range(0, 48, 8))
    )

    def write(name, **overrides):
        options = {
            "data": str(held_out), "every": 4, "best": "avg_loss", "speculative_every": 12, "num_prompts": 2,
            "max_new_tokens": 12, "cache_dir": str(tmp_path / "cache"),
        }  # fmt: skip
        return write_run(tmp_path / name, tiny_target_dir, held_out=options, **overrides)

    return write


def evaluations(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "eval/avg_loss" in row}


def test_a_run_evaluates_marks_the_best_and_a_second_one_uses_the_same_features(run_with, tmp_path):
    specforge(tmp_path / "first-out", "train", "-c", str(run_with("first")), "--json").succeed()
    found = evaluations(tmp_path / "first" / "run")
    assert sorted(found) == [4, 8, 12]
    assert found[12]["eval/accepted_length"] >= 1.0
    assert "eval/accepted_length" not in found[8]
    assert {"eval/avg_acc", "eval/simulated_acc_len", "eval/per_position_acc_0"} <= set(found[4])
    best = best_state(tmp_path / "first" / "run" / "checkpoints")
    assert best.evaluation["eval/avg_loss"] == min(row["eval/avg_loss"] for row in found.values())
    [entry] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    written = {path: path.stat().st_mtime_ns for path in entry.rglob("*")}
    specforge(tmp_path / "second-out", "train", "-c", str(run_with("second")), "--json").succeed()
    assert evaluations(tmp_path / "second" / "run")[12]["eval/avg_loss"] == found[12]["eval/avg_loss"]
    assert {path: path.stat().st_mtime_ns for path in entry.rglob("*")} == written


def test_the_best_survives_a_resume_and_is_what_the_export_takes(run_with, tmp_path):
    config = run_with("run", training__max_steps=8, training__schedule="constant")
    specforge(tmp_path / "out", "train", "-c", str(config), "--json").succeed()
    checkpoints = tmp_path / "run" / "run" / "checkpoints"
    assert list_checkpoints(checkpoints)
    best = best_state(checkpoints)
    export = specforge(
        tmp_path / "export-out", "export", "--checkpoint", str(checkpoints / "best"), "--to", "hf",
        "--out", str(tmp_path / "draft"), "--json",
    ).succeed()  # fmt: skip
    assert export["reload_difference_to_rounded"] == 0.0
    specforge(tmp_path / "again", "train", "-c", str(config), "--resume", "--json").succeed()
    assert best_state(checkpoints).position == best.position


@pytest.mark.full
@pytest.mark.parametrize("topology", ["colocated", "disaggregated"])
def test_two_ranks_evaluate_as_one_does(run_with, tmp_path, topology):
    """The first evaluation is of the same draft to rounding; what is counted is the same."""
    numbers = []
    for ranks in (1, 2):
        config = run_with(f"ranks-{ranks}", launch={"num_train_ranks": ranks}, topology=topology)
        specforge(tmp_path / f"out-{ranks}", "train", "-c", str(config), "--json").succeed()
        numbers.append(evaluations(tmp_path / f"ranks-{ranks}" / "run"))
    one, two = numbers
    assert sorted(one) == sorted(two) == [4, 8, 12]
    for step in one:
        assert two[step]["eval/num_supervised"] == one[step]["eval/num_supervised"]
        assert two[step]["eval/avg_loss"] == pytest.approx(one[step]["eval/avg_loss"], rel=1e-3)
    assert two[12]["eval/accepted_length"] == pytest.approx(one[12]["eval/accepted_length"], rel=0.2)
