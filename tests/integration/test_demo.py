"""The demo: what it reports, and that killing it anywhere does not change what it trains."""

import json
from pathlib import Path

import psutil
import pytest
import runs

from specforge.algorithms.catalog import ALGORITHMS

SMALL_DEMO = str(Path(__file__).parent / "small_demo.py")

REPORT_KEYS = {
    "accepted_length_mean", "acceptance_per_position", "lossless", "num_prompts_compared", "tokens_per_second_plain",
    "tokens_per_second_speculative", "num_samples_trained", "num_samples_unique", "num_steps", "num_near_ties",
    "accepted_length_untrained", "distinct_4grams", "draft_weights_sha256", "topology", "algorithm", "seed",
    "wall_seconds",
}  # fmt: skip


def small_demo(directory: Path, out: Path, topology: str, *flags: str) -> runs.Command:
    return runs.Command([SMALL_DEMO, str(out), topology, *flags], directory)


def in_phase(out: Path, phase: str) -> bool:
    """Whether the demo in ``out`` is well inside ``phase``."""
    if phase == "responses":
        responses = out / "responses.jsonl"
        return responses.exists() and responses.read_bytes().count(b"\n") >= 16
    if phase == "training":
        return runs.num_steps(out / "train") >= 4
    phases = out / "phases.json"
    return phases.exists() and "training" in json.loads(phases.read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("undisturbed")
    report = small_demo(directory, directory / "demo", "colocated").succeed()
    assert json.loads((directory / "demo" / "report.json").read_text()) == report
    return report


def test_the_report_has_what_it_promises_and_the_export_is_loadable(undisturbed):
    assert undisturbed.keys() >= REPORT_KEYS
    assert undisturbed["lossless"] is True
    assert undisturbed["num_prompts_compared"] == 6
    assert undisturbed["num_samples_trained"] == undisturbed["num_samples_unique"] == 48
    assert undisturbed["num_steps"] == 12
    assert undisturbed["export"]["reload_difference_to_rounded"] == 0.0
    assert undisturbed["wall_seconds"].keys() == {"responses", "training", "evaluation", "export"}


@pytest.mark.parametrize(
    ("topology", "phase", "victim"),
    [
        ("disaggregated", "training", "parent"),
        pytest.param("colocated", "responses", "parent", marks=pytest.mark.full),
        pytest.param("colocated", "training", "parent", marks=pytest.mark.full),
        pytest.param("colocated", "evaluation", "parent", marks=pytest.mark.full),
        pytest.param("disaggregated", "training", "train", marks=pytest.mark.full),
        pytest.param("disaggregated", "training", "capture-0", marks=pytest.mark.full),
        pytest.param("disaggregated", "responses", "parent", marks=pytest.mark.full),
        pytest.param("disaggregated", "evaluation", "parent", marks=pytest.mark.full),
    ],
)
def test_a_demo_killed_in_any_phase_ends_with_the_same_weights(tmp_path, undisturbed, topology, phase, victim):
    """Killed itself it resumes; a child of it is started again."""
    out = tmp_path / "demo"
    command = small_demo(tmp_path / "first", out, topology)
    runs.wait_until(lambda: in_phase(out, phase) or command.process.poll() is not None, f"the {phase} phase")
    family = command.family()
    runs.kill(family[victim])
    if victim == "parent":
        assert command.wait() != 0
        psutil.wait_procs(family.values(), timeout=runs.DEADLINE_S)
        command = small_demo(tmp_path / "second", out, topology, "--resume")
    report = command.succeed()
    assert report["draft_weights_sha256"] == undisturbed["draft_weights_sha256"]
    assert report["num_samples_trained"] == 48


@pytest.mark.full
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "eagle3"])
def test_every_algorithm_has_a_demo(tmp_path, undisturbed, algorithm):
    report = small_demo(tmp_path, tmp_path / "demo", "disaggregated", algorithm).succeed()
    assert report.keys() == undisturbed.keys()
    assert report["algorithm"] == algorithm
    assert report["lossless"] is True
    assert (report["num_steps"], report["num_samples_trained"]) == (12, 48)
    assert report["export"]["format"] == {"mtp": "hf", "medusa": "vllm"}.get(algorithm, "sglang")
    assert report["export"]["reload_difference_to_rounded"] == 0.0


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_demo_learns_and_both_topologies_give_the_same_weights(tmp_path):
    reports = {}
    for topology in ("colocated", "disaggregated"):
        command = runs.specforge(tmp_path / topology, "demo", "--out", str(tmp_path / f"{topology}-demo"), "--json",
                                 "--topology", topology)  # fmt: skip
        assert command.process.wait(timeout=700) == 0, command.stderr.read_text()
        reports[topology] = json.loads(command.stdout.read_text())
    for report in reports.values():
        assert report["lossless"] is True
        assert report["num_prompts_compared"] >= 32
        assert report["accepted_length_mean"] >= 2.0
        assert report["accepted_length_untrained"] < 1.1
        assert report["distinct_4grams"] >= 0.5
    together, apart = reports["colocated"], reports["disaggregated"]
    assert together["draft_weights_sha256"] == apart["draft_weights_sha256"]
    assert apart["num_samples_captured_at_first_step"] < apart["num_samples_trained"]
