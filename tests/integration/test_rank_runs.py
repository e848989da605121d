"""Several train ranks: the same slots, each once and in order, and the same draft, in every topology."""

import json
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs
import yaml

import chaos
from specforge.config.load import load_run_config
from specforge.launch.ledger import list_quarantined
from specforge.launch.plan import run_id
from specforge.training.checkpoint import newest_whole

NUM_EPOCHS, NUM_STEPS = 5, 30
SIZES = {"training__num_epochs": NUM_EPOCHS, "training__checkpoint_every": 5}
TWO = SIZES | {"launch__num_train_ranks": 2}
APART = TWO | {"topology": "disaggregated", "launch__num_capture_workers": 2, "data_plane__retain_bytes": 0}
QUICK = {"launch__restarts__first_backoff_s": 0.05}
POISON = str(Path(__file__).with_name("poisoned_rank.py"))
FAILING = str(Path(__file__).with_name("failing_rank.py"))
SLOW = str(Path(__file__).with_name("slow_ranks.py"))


def train(directory: Path, run_yaml: Path, *more: str) -> runs.Command:
    return runs.specforge(directory, "train", "-c", str(run_yaml), "--json", *more)


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of every step, as it was computed last."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def check_whole(result: dict[str, Any], run_yaml: Path) -> None:
    """Every slot was trained once, and nothing is left."""
    run_dir = run_yaml.parent / "run"
    assert (result["finished"], result["step"], result["num_slots"]) == (True, NUM_STEPS, 24 * NUM_EPOCHS)
    assert result["ledger"]["num_slots_trained"] == 24 * NUM_EPOCHS
    assert result["ledger"]["num_unique_samples_trained"] == 24
    assert list(losses(run_dir)) == list(range(1, NUM_STEPS + 1))
    assert [path.name for path in Path("/dev/shm").iterdir() if run_id(load_run_config(run_yaml)) in path.name] == []
    assert not (run_dir / "retained").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_target_dir) -> dict[int, float]:
    """The losses of one rank."""
    directory = tmp_path_factory.mktemp("alone")
    run_yaml = runs.write_run(directory, tiny_target_dir, **SIZES)
    train(directory, run_yaml).succeed()
    return losses(directory / "run")


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_target_dir) -> tuple[str, dict[int, float]]:
    """The weights and the losses of two ranks that nobody disturbed."""
    directory = tmp_path_factory.mktemp("together")
    run_yaml = runs.write_run(directory, tiny_target_dir, **TWO)
    result = train(directory, run_yaml).succeed()
    check_whole(result, run_yaml)
    assert result["ledger"]["num_leases_given"] == 24  # what one epoch captured is kept for the next, in files
    return result["draft_weights_sha256"], losses(directory / "run")


def test_two_ranks_train_what_one_trains(alone, together):
    _, found = together
    assert found[1] == pytest.approx(alone[1], rel=1e-5)
    assert list(found.values()) == pytest.approx(list(alone.values()), rel=1e-3)


@pytest.mark.full
def test_two_ranks_apart_from_capture_give_the_same_draft(tmp_path, tiny_target_dir, together):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **APART)
    result = train(tmp_path, run_yaml).succeed()
    assert (result["draft_weights_sha256"], losses(tmp_path / "run")) == together
    check_whole(result, run_yaml)
    chaos.check_account(run_yaml, NUM_EPOCHS)


@pytest.mark.full
@pytest.mark.parametrize("topology", ["colocated", "disaggregated"])
def test_two_ranks_over_captured_features_give_the_same_draft(tmp_path, tiny_target_dir, together, topology):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology=topology, **TWO)
    features = tmp_path / "set"
    runs.specforge(tmp_path / "capture", "capture", "-c", str(run_yaml), "--to", str(features), "--json").succeed()
    content = yaml.safe_load(run_yaml.read_text())
    content["data"] = {"features": str(features), "max_length": content["data"]["max_length"]}
    run_yaml.write_text(yaml.safe_dump(content))
    result = train(tmp_path, run_yaml).succeed()
    assert (result["draft_weights_sha256"], losses(tmp_path / "run")) == together
    check_whole(result, run_yaml)


@pytest.mark.parametrize("victim", ["train-1", pytest.param("train", marks=pytest.mark.full)])
def test_a_rank_that_is_killed_does_not_show(tmp_path, tiny_target_dir, together, victim):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **TWO, **QUICK)
    command = train(tmp_path, run_yaml)
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 7, "seven steps")
    runs.kill(command.family()[victim])
    result = command.succeed()
    assert result["draft_weights_sha256"] == together[0]
    assert f"{victim} was killed by SIGKILL; starting all 2 train ranks again" in command.stderr.read_text()
    check_whole(result, run_yaml)


@pytest.mark.full
@pytest.mark.parametrize("victim", ["train", "train-1", "capture-1"])
def test_a_process_that_is_killed_in_a_disaggregated_run_does_not_show(tmp_path, tiny_target_dir, together, victim):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **APART, **QUICK)
    command = train(tmp_path, run_yaml)
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 7, "seven steps")
    runs.kill(command.family()[victim])
    result = command.succeed()
    assert result["draft_weights_sha256"] == together[0]
    assert f"{victim} was killed by SIGKILL" in command.stderr.read_text()
    chaos.check_account(run_yaml, NUM_EPOCHS)
    chaos.check_nothing_left(run_yaml)


@pytest.mark.full
def test_a_prompt_that_kills_its_process_is_set_aside(tmp_path, tiny_target_dir):
    options = QUICK | {"launch__num_train_ranks": 2, "training__num_epochs": 1, "training__checkpoint_every": 1000}
    once = {
        "control_plane__ledger__kind": "sqlite",
        "control_plane__max_quarantined": 1,
        "control_plane__max_crash_attempts": 1,
    }
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **options, **once)
    command = runs.Command([POISON, str(run_yaml)], tmp_path / "output")
    assert command.process.wait(timeout=3 * runs.DEADLINE_S) == 0, command.stderr.read_text()  # four starts
    assert command.stderr.read_text().count("was killed by SIGKILL; starting all 2 train ranks again") == 3
    (found,) = list_quarantined(tmp_path / "run")
    assert "3 workers died while they held it, 1 of them while they held nothing else" in found["reason"]
    saved = newest_whole(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.position.step == 6


@pytest.mark.full
def test_a_rank_that_dies_too_often_ends_a_run_that_resumes(tmp_path, tiny_target_dir, together):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **TWO, launch__restarts__max_restarts=0)
    command = train(tmp_path / "first", run_yaml)
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 7, "seven steps")
    family = command.family()
    runs.kill(family["train-1"])
    assert command.wait() == 1
    assert "the train-1 process failed: killed by SIGKILL (log: " in command.stderr.read_text()
    _, alive = psutil.wait_procs(family.values(), timeout=0)
    assert alive == []
    resumed = train(tmp_path / "second", run_yaml, "--resume").succeed()
    assert resumed["draft_weights_sha256"] == together[0]
    check_whole(resumed, run_yaml)


@pytest.mark.full
@pytest.mark.parametrize("name", ["train", "train-1"])
def test_an_exception_of_one_rank_is_what_ends_the_run(tmp_path, tiny_target_dir, name):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **TWO)
    command = runs.Command([FAILING, name, str(run_yaml)], tmp_path / "output")
    assert command.wait() == 1
    complaint = command.stderr.read_text()
    assert f"the {name} process failed: ValueError: odd hidden states" in complaint
    assert 'raise ValueError("odd hidden states")' in complaint
    assert "Connection" not in complaint.partition("RunFailed")[2]


@pytest.mark.full
@pytest.mark.parametrize("options", [TWO, APART], ids=["colocated", "disaggregated"])
def test_a_signal_stops_all_ranks_at_one_step(tmp_path, tiny_target_dir, together, options):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **options)
    command = train(tmp_path / "first", run_yaml)
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 7, "seven steps")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130, command.stderr.read_text()
    saved = newest_whole(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.position.step == max(losses(tmp_path / "run"))
    resumed = train(tmp_path / "second", run_yaml, "--resume").succeed()
    assert resumed["draft_weights_sha256"] == together[0]
    check_whole(resumed, run_yaml)


def num_captured(directory: Path) -> dict[str, int]:
    """Samples that each rank of a slow run captured so far."""
    return {path.name: path.stat().st_size for path in directory.iterdir() if path.name in {"train", "train-1"}}


def test_ranks_share_the_capture_of_every_step(tmp_path, tiny_target_dir):
    batches = {"training__global_batch_size": 8, "data_plane__retain_bytes": 0}
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **TWO, **batches)
    command = runs.Command([SLOW, "0.05", str(tmp_path), str(run_yaml)], tmp_path / "output")
    assert command.wait() == 0, command.stderr.read_text()
    captured = num_captured(tmp_path)
    assert sum(captured.values()) == 24 * NUM_EPOCHS
    assert min(captured["train"], captured["train-1"]) >= 0.3 * sum(captured.values())
    assert list(losses(tmp_path / "run")) == list(range(1, 24 * NUM_EPOCHS // 8 + 1))


@pytest.mark.full
def test_a_signal_during_capture_leaves_a_checkpoint_of_the_last_step(tmp_path, tiny_target_dir):
    # A rank leases eight samples at a time: more than it could capture before it is killed.
    options = TWO | {"training__global_batch_size": 16, "training__checkpoint_every": 1000}
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **options)
    command = runs.Command([SLOW, "1.2", str(tmp_path), str(run_yaml)], tmp_path / "output")
    # Whoever is first takes the share of the second step that is captured; the other waits for it.
    runs.wait_until(lambda: sum(num_captured(tmp_path).values()) > 16, "capture for the second step")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130, command.stderr.read_text()
    saved = newest_whole(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.position.step == max(losses(tmp_path / "run")) == 1
    assert sum(num_captured(tmp_path).values()) < 32


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, tiny_target_dir, alone, first, second):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **SIZES)
    command = train(tmp_path / "first", run_yaml, f"launch.num_train_ranks={first}")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 7, "seven steps")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130, command.stderr.read_text()
    resumed = train(tmp_path / "second", run_yaml, "--resume", f"launch.num_train_ranks={second}").succeed()
    check_whole(resumed, run_yaml)
    assert list(losses(tmp_path / "run").values()) == pytest.approx(list(alone.values()), rel=1e-3)


def torchrun(directory: Path, *arguments: str) -> runs.Command:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return runs.Command([*launcher, "-m", "specforge", "train", *arguments], directory)


@pytest.mark.full
def test_ranks_that_torchrun_started_give_the_same_draft_and_resume(tmp_path, tiny_target_dir, together):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **SIZES)
    command = torchrun(tmp_path / "first", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 7, "seven steps")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() != 0
    result = torchrun(tmp_path / "second", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert result["draft_weights_sha256"] == together[0]
    check_whole(result, run_yaml)


@pytest.mark.full
def test_torchrun_does_not_start_a_disaggregated_run(tmp_path, tiny_target_dir):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    command = torchrun(tmp_path, "-c", str(run_yaml))
    assert command.wait() == 1
    assert "launch.num_train_ranks=2, or use topology=colocated" in command.stderr.read_text()
    assert not (tmp_path / "run").exists()
