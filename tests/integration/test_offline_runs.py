"""Features captured once give the draft that a run with a live target gives, in every topology."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml

from specforge.config.load import load_run_config
from specforge.errors import ConfigError
from specforge.launch import engines
from specforge.launch.compose import build_disagg_offline_runtime, build_offline_runtime
from specforge.launch.inputs import read_run_inputs
from specforge.launch.plan import run_id

KILLED = str(Path(__file__).with_name("killed_capture.py"))


def offline(run_yaml: Path, features: Path, **overrides: Any) -> Path:
    """The same run over ``features``."""
    content = yaml.safe_load(run_yaml.read_text())
    content["data"] = {"features": str(features), "max_length": content["data"]["max_length"]}
    run_yaml.write_text(yaml.safe_dump(content | overrides))
    return run_yaml


def files(directory: Path) -> dict[str, bytes]:
    """What a feature set holds."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    del found["lock"]
    return found


@pytest.fixture(scope="module")
def captured(tmp_path_factory, tiny_target_dir) -> Path:
    """A feature set of the run of ``write_run``."""
    directory = tmp_path_factory.mktemp("captured")
    run_yaml = runs.write_run(directory, tiny_target_dir)
    report = runs.specforge(
        directory / "output", "capture", "-c", str(run_yaml), "--to", str(directory / "set"), "--json"
    ).succeed()
    assert (report["num_samples"], report["num_captured"], report["num_failed"]) == (24, 24, 0)
    assert report["path"] == str(directory / "set")
    assert not (directory / "run").exists()
    return directory / "set"


@pytest.fixture(scope="module")
def online(tmp_path_factory, tiny_target_dir) -> str:
    """The weights of the run with a live target."""
    directory = tmp_path_factory.mktemp("online")
    run_yaml = runs.write_run(directory, tiny_target_dir)
    return runs.specforge(directory, "train", "-c", str(run_yaml), "--json").succeed()["draft_weights_sha256"]


@pytest.mark.parametrize("topology", ["colocated", "disaggregated"])
def test_an_offline_run_gives_the_weights_of_the_online_run(tmp_path, tiny_target_dir, captured, online, topology):
    before = files(captured)
    run_yaml = offline(runs.write_run(tmp_path, tiny_target_dir), captured, topology=topology)
    result = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json").succeed()
    assert result["draft_weights_sha256"] == online
    assert result["ledger"]["num_unique_samples_trained"] == 24
    assert files(captured) == before
    assert [path.name for path in Path("/dev/shm").iterdir() if run_id(load_run_config(run_yaml)) in path.name] == []


def test_an_offline_run_never_loads_the_target(tmp_path, tiny_target_dir, captured, online, monkeypatch):
    monkeypatch.setattr(engines, "HFTargetEngine", None)
    config = load_run_config(offline(runs.write_run(tmp_path, tiny_target_dir), captured))
    assert build_offline_runtime(config).run().draft_weights_sha256 == online


@pytest.mark.full
def test_a_run_that_began_with_a_live_target_goes_on_over_its_features(tmp_path, tiny_target_dir, captured, online):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir)
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    command.process.send_signal(signal.SIGKILL)
    command.wait()
    resumed = runs.specforge(
        tmp_path / "second", "train", "-c", str(offline(run_yaml, captured)), "--resume", "--json"
    ).succeed()
    assert resumed["draft_weights_sha256"] == online


@pytest.mark.full
def test_a_process_that_reads_features_may_be_killed(tmp_path, tiny_target_dir, captured, online):
    run_yaml = offline(runs.write_run(tmp_path, tiny_target_dir), captured, topology="disaggregated")
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    runs.kill(command.family()["capture-0"])
    assert command.succeed()["draft_weights_sha256"] == online


def test_a_killed_capture_goes_on_to_the_same_bytes(tmp_path, tiny_target_dir, captured):
    run_yaml, features = runs.write_run(tmp_path, tiny_target_dir), tmp_path / "set"
    capture = ["capture", "-c", str(run_yaml), "--to", str(features), "--json"]
    killed = runs.Command([KILLED, "7", "SIGKILL", *capture], tmp_path / "first")
    assert killed.wait() == -signal.SIGKILL, killed.stderr.read_text()
    report = runs.specforge(tmp_path / "second", *capture).succeed()
    assert (report["num_kept"], report["num_captured"]) == (6, 18)
    assert files(features) == files(captured)


def test_an_interrupted_capture_says_how_to_go_on(tmp_path, tiny_target_dir, captured):
    run_yaml, features = runs.write_run(tmp_path, tiny_target_dir), tmp_path / "set"
    capture = ["capture", "-c", str(run_yaml), "--to", str(features)]
    interrupted = runs.Command([KILLED, "5", "SIGINT", *capture], tmp_path / "first")
    assert interrupted.wait() == 130
    assert f"continue with: specforge {' '.join(capture)}" in interrupted.stderr.read_text()
    again = runs.specforge(tmp_path / "second", *capture)
    assert again.wait() == 0, again.stderr.read_text()
    assert f"specforge train -c {run_yaml} data.path=null data.features={features}" in again.stdout.read_text()
    assert files(features) == files(captured)


def test_a_damaged_file_is_named_before_anything_starts(tmp_path, tiny_target_dir, captured):
    features = tmp_path / "set"
    shutil.copytree(captured, features)
    victim = sorted((features / "features").rglob("*.safetensors"))[3]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    run_yaml = offline(runs.write_run(tmp_path, tiny_target_dir), features, topology="disaggregated")
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml))
    assert command.wait() == 2
    assert f"{victim} was damaged after the capture" in command.stderr.read_text()
    assert not (tmp_path / "run" / "ledger.sqlite").exists()


def test_an_offline_run_is_planned_without_the_weights_of_the_target(tmp_path, tiny_target_dir, captured):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir)
    live = json.loads(json.dumps(read_run_inputs(load_run_config(run_yaml)).plan.to_dict()))
    planned = runs.specforge(tmp_path, "plan", "-c", str(offline(run_yaml, captured)), "--json").succeed()
    assert live.pop("target_bytes") > planned["plan"].pop("target_bytes") == 0
    assert live.pop("processes") != planned["plan"].pop("processes")
    assert planned["plan"] == live
    assert planned["config"]["data"]["features"] == str(captured)


def test_the_builders_of_offline_runs_want_features_and_their_topology(tmp_path, tiny_target_dir, captured):
    live = load_run_config(runs.write_run(tmp_path, tiny_target_dir))
    with pytest.raises(ConfigError, match=r"a colocated offline run has data\.features"):
        build_offline_runtime(live)
    colocated = load_run_config(offline(tmp_path / "run.yaml", captured))
    with pytest.raises(ConfigError, match=r"a disaggregated offline run has .* got .* topology = colocated"):
        build_disagg_offline_runtime(colocated)
