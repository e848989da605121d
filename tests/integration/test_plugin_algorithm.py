"""An algorithm of another package: installed, trained, decoded with, exported. SpecForge is not told about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_run

DEADLINE_S = 120


@pytest.fixture(scope="module")
def plugin(tmp_path_factory, repository: Path) -> Path:
    """A directory with the example package installed, as pip lays it out."""
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"
    subprocess.run(["cp", "-r", repository / "examples" / "plugin-algorithm", source], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", site, source], check=True, timeout=DEADLINE_S)
    return site


def specforge(plugin: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(plugin), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "specforge", *map(str, arguments)]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)


def succeed(plugin: Path, *arguments: object) -> dict:
    done = specforge(plugin, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.full
def test_an_installed_algorithm_is_trained_decoded_with_and_exported(tmp_path, tiny_target_dir, plugin):
    run = write_run(tmp_path, tiny_target_dir, algorithm={"name": "linear-hop", "num_hops": 2}, training__lr=1e-2)
    outcome = succeed(plugin, "train", "-c", run)
    assert (outcome["finished"], outcome["step"]) == (True, 12)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in steps if "loss" in record]
    assert losses[-1] < losses[0]
    assert "accuracy_1" in steps[-1]
    exported = succeed(plugin, "export", "--checkpoint", tmp_path / "run", "--to", "hf", "--out", tmp_path / "draft")
    assert (exported["algorithm"], exported["reload_difference_to_rounded"]) == ("linear-hop", 0.0)
    for draft in ("run", "draft"):
        options = ("--prompts", tmp_path / "texts.jsonl", "--num-prompts", 2, "--max-new-tokens", 8)
        report = succeed(plugin, "eval", "--target", tiny_target_dir, "--draft", tmp_path / draft, *options)
        assert report["lossless"] is True
    refused = specforge(plugin, "export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "other")
    assert refused.returncode == 2
    assert "SGLang serves no linear-hop drafts" in " ".join(refused.stderr.split())


def test_its_options_are_checked_like_any_others(tmp_path, tiny_target_dir, plugin):
    run = write_run(tmp_path, tiny_target_dir, algorithm={"name": "linear-hop"})
    done = specforge(plugin, "plan", "-c", run, "algorithm.num_hops=0")
    assert done.returncode == 2
    assert "algorithm.num_hops should be greater than 0" in " ".join(done.stderr.split())
    without = specforge(Path("nowhere"), "plan", "-c", run)
    assert without.returncode == 2
    assert "algorithm.name should be one of eagle3" in " ".join(without.stderr.split())
