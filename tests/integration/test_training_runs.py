"""One path, every topology: the same weights, whatever is killed on the way."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import runs
from safetensors.torch import load_file, save_file

from specforge.config.load import load_run_config
from specforge.launch.compose import run_disagg_online_interleaved
from specforge.launch.plan import run_id


def leftovers(run_yaml: Path) -> list[str]:
    """Shared memory of the run that is still there."""
    return [path.name for path in Path("/dev/shm").iterdir() if run_id(load_run_config(run_yaml)) in path.name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_target_dir) -> str:
    """The weights of the colocated run."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run_yaml = runs.write_run(directory, tiny_target_dir)
    result = runs.specforge(directory, "train", "-c", str(run_yaml), "--json").succeed()
    assert result["step"] == 12
    assert result["ledger"]["num_slots_trained"] == 48
    assert result["ledger"]["num_unique_samples_trained"] == 24
    return result["draft_weights_sha256"]


def test_a_disaggregated_run_gives_the_same_weights_and_trains_while_capture_goes_on(
    tmp_path, tiny_target_dir, undisturbed
):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    result = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json").succeed()
    assert result["draft_weights_sha256"] == undisturbed
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in records if record.get("event") == "first_step")
    assert first["num_captured"] < first["num_slots"] == 48
    assert leftovers(run_yaml) == []


def test_both_halves_in_one_process_give_the_same_weights(tmp_path, tiny_target_dir, undisturbed):
    config = load_run_config(runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated"))
    assert run_disagg_online_interleaved(config).draft_weights_sha256 == undisturbed


def test_the_weights_do_not_depend_on_prefetching_or_the_window(tmp_path, tiny_target_dir, undisturbed):
    config = load_run_config(
        runs.write_run(
            tmp_path,
            tiny_target_dir,
            topology="disaggregated",
            control_plane__window_steps=7,
            data_plane__prefetch_steps=0,
        )
    )
    assert run_disagg_online_interleaved(config).draft_weights_sha256 == undisturbed


def test_a_run_whose_supervisor_was_killed_resumes_to_the_same_weights(tmp_path, tiny_target_dir, undisturbed):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    family = command.family()
    runs.kill(family["parent"])
    assert command.wait() == -signal.SIGKILL
    # at once: what a killed parent left is waited for
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed
    assert resumed["ledger"]["num_slots_trained"] == 48
    assert leftovers(run_yaml) == []
    _, alive = psutil.wait_procs(family.values(), timeout=runs.DEADLINE_S)
    assert alive == []


@pytest.mark.parametrize("victim", ["train", "capture-0"])
def test_a_process_that_dies_too_often_ends_a_run_that_resumes(tmp_path, tiny_target_dir, undisturbed, victim):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated", launch__restarts__max_restarts=0)
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    runs.kill(command.family()[victim])
    assert command.wait() == 1
    assert f"the {victim} process failed: killed by SIGKILL" in command.stderr.read_text()
    assert leftovers(run_yaml) == []
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed


def test_a_capture_process_that_somebody_else_stops_is_started_again(tmp_path, tiny_target_dir, undisturbed):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 1, "one step")
    command.family()["capture-0"].terminate()
    assert command.succeed()["draft_weights_sha256"] == undisturbed
    assert "capture-0 was told to stop by another process; starting it again" in command.stderr.read_text()
    assert leftovers(run_yaml) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_colocated_run_resumes_to_the_same_weights(tmp_path, tiny_target_dir, undisturbed, number):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir)
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    command.process.send_signal(number)
    code = command.wait()
    if number != signal.SIGKILL:
        assert code == 130
        assert "--resume" in command.stderr.read_text()
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed


def test_ctrl_c_on_a_disaggregated_run_leaves_one_that_resumes(tmp_path, tiny_target_dir, undisturbed):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 130, command.stderr.read_text()
    assert leftovers(run_yaml) == []
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed


def test_an_address_that_cannot_be_listened_on_is_refused(tmp_path, tiny_target_dir):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated", control_plane__host="192.0.2.1")
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml))
    assert command.wait() == 2
    assert "cannot listen on 192.0.2.1" in command.stderr.read_text()


@pytest.mark.parametrize(("stopped", "blocked"), [("train", "capture-0"), ("capture-0", "train")])
def test_a_blocked_side_of_a_disaggregated_run_does_not_poll(tmp_path, tiny_target_dir, stopped, blocked):
    # Nothing is kept for later epochs, so that each side needs the other to the end.
    options = {"training__num_epochs": 200, "data_plane__retain_bytes": 0}
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated", **options)
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml))
    try:
        runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
        family = command.family()
        family[stopped].suspend()
        # what is in flight is used up first; from then on the other side has nothing to do
        runs.wait_until(lambda: runs.busy_share(family[blocked], 0.5) < 0.02, f"{blocked} blocks")
        assert runs.busy_share(family[blocked], 4.0) < 0.02
        assert runs.busy_share(family["parent"], 1.0) < 0.02
        family[stopped].resume()
        steps = runs.num_steps(tmp_path / "run")
        runs.wait_until(lambda: runs.num_steps(tmp_path / "run") > steps, "the run goes on")
    finally:
        for process in command.family().values():
            process.resume()
        command.process.send_signal(signal.SIGINT)
        assert command.wait() == 130
    assert leftovers(run_yaml) == []


def copy_of(target: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in target.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_a_run_is_not_resumed_on_a_target_that_changed(tmp_path, tiny_target_dir):
    target = copy_of(tiny_target_dir, tmp_path / "target")
    run_yaml = runs.write_run(tmp_path, target, training__max_steps=2)
    runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json").succeed()
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    refused = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume")
    assert refused.wait() == 2
    assert "target_revision" in refused.stderr.read_text()


@pytest.mark.parametrize("topology", ["colocated", "disaggregated"])
def test_a_target_that_gives_nans_ends_the_run_with_that_reason(tmp_path, tiny_target_dir, topology):
    target = copy_of(tiny_target_dir, tmp_path / "target")
    weights = load_file(target / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    run_yaml = runs.write_run(tmp_path, target, topology=topology)
    command = runs.specforge(tmp_path / "run-output", "train", "-c", str(run_yaml))
    assert command.wait() == 1
    complaint = command.stderr.read_text()
    assert "quarantined" in complaint
    assert "NaN or infinite values in feature 'aux'" in complaint


def test_a_directory_that_holds_a_run_is_refused_without_resume(tmp_path, tiny_target_dir):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, training__max_steps=1)
    runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json").succeed()
    again = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml))
    assert again.wait() == 2
    assert "already holds a run" in again.stderr.read_text()
    started_with = (tmp_path / "run" / "resolved.yaml").read_text()
    other = runs.specforge(tmp_path / "third", "train", "-c", str(run_yaml), "--resume", "training.lr=0.5")
    assert other.wait() == 2
    assert "was written with lr = 0.001" in other.stderr.read_text()
    assert (tmp_path / "run" / "resolved.yaml").read_text() == started_with
