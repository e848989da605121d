"""Crash anywhere: whoever is killed, and whenever, the weights are those of an undisturbed run."""

import signal
from pathlib import Path

import psutil
import pytest
import runs
from armed_role import points_of

import chaos
from specforge.testing.postgres import temporary_server

SHORT_EPOCHS = 20
LONG_EPOCHS = 100


def num_steps(num_epochs: int) -> int:
    return num_epochs * chaos.NUM_SAMPLES // chaos.BATCH


def weights_of_undisturbed_run(directory: Path, target: Path, num_epochs: int, **overrides) -> str:
    options = {"training__num_epochs": num_epochs, "training__checkpoint_every": 5} | overrides
    run_yaml = runs.write_run(directory, target, **options)
    command = runs.specforge(directory, "train", "-c", str(run_yaml), "--json")
    command.process.wait(chaos.DEADLINE_S)
    return command.succeed()["draft_weights_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_target_dir) -> str:
    return weights_of_undisturbed_run(tmp_path_factory.mktemp("undisturbed"), tiny_target_dir, SHORT_EPOCHS)


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory, tiny_target_dir) -> str:
    return weights_of_undisturbed_run(tmp_path_factory.mktemp("undisturbed"), tiny_target_dir, LONG_EPOCHS)


def test_a_few_random_kills_do_not_show(tmp_path, tiny_target_dir, undisturbed):
    run_yaml = chaos.write_run(tmp_path, tiny_target_dir, num_epochs=SHORT_EPOCHS)
    result = chaos.Chaos(run_yaml, seed=1).run(4, num_steps(SHORT_EPOCHS))
    assert result["draft_weights_sha256"] == undisturbed
    chaos.check_account(run_yaml, SHORT_EPOCHS)
    chaos.check_nothing_left(run_yaml)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("release", "kept"), [("at_step", 0), ("at_checkpoint", 0), ("at_checkpoint", "300kB")])
def test_twenty_random_kills_do_not_show(tmp_path, tiny_target_dir, long_undisturbed, release, kept):
    kept_options = {"data_plane__retain_bytes": kept, "data_plane__retain_memory_bytes": "100kB"}
    run_yaml = chaos.write_run(
        tmp_path, tiny_target_dir, num_epochs=LONG_EPOCHS, control_plane__release=release, **kept_options
    )
    result = chaos.Chaos(run_yaml, seed=2).run(20, num_steps(LONG_EPOCHS))
    assert result["draft_weights_sha256"] == long_undisturbed
    chaos.check_account(run_yaml, LONG_EPOCHS)
    chaos.check_nothing_left(run_yaml)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_twenty_random_kills_and_a_restart_of_postgresql_do_not_show(tmp_path, tiny_target_dir, long_undisturbed):
    with temporary_server() as server:
        ledger = {"kind": "postgres", "url": server.url, "name": "chaos"}
        run_yaml = chaos.write_run(tmp_path, tiny_target_dir, num_epochs=LONG_EPOCHS, control_plane__ledger=ledger)
        result = chaos.Chaos(run_yaml, seed=3).run(20, num_steps(LONG_EPOCHS), lambda: server.restart(kill=True))
        assert result["draft_weights_sha256"] == long_undisturbed
        chaos.check_account(run_yaml, LONG_EPOCHS, server.url, name="chaos")
        chaos.check_nothing_left(run_yaml)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_kill_between_any_two_steps_of_a_samples_life_does_not_show(tmp_path, tiny_target_dir):
    """The target answers the prompts, so that samples pass all of them."""
    answers = {"data__max_length": 512, "data__generate": {"max_new_tokens": 8, "temperature": 0.8}}
    undisturbed = weights_of_undisturbed_run(tmp_path / "undisturbed", tiny_target_dir, SHORT_EPOCHS, **answers)
    run_yaml = chaos.write_run(tmp_path / "armed", tiny_target_dir, num_epochs=SHORT_EPOCHS, **answers)
    fired = tmp_path / "fired"
    fired.mkdir()
    script = str(Path(__file__).with_name("armed_run.py"))
    command = runs.Command([script, str(fired), str(run_yaml)], tmp_path / "output")
    command.process.wait(chaos.DEADLINE_S)
    result = command.succeed()
    assert {path.name for path in fired.iterdir()} == {*points_of("train"), *points_of("capture")}
    assert result["draft_weights_sha256"] == undisturbed
    chaos.check_account(run_yaml, SHORT_EPOCHS)
    chaos.check_nothing_left(run_yaml)


def test_a_sigterm_while_children_are_restarted_ends_the_run_in_order(tmp_path, tiny_target_dir, undisturbed):
    run_yaml = chaos.write_run(
        tmp_path, tiny_target_dir, num_epochs=SHORT_EPOCHS, launch__restarts__first_backoff_s=30.0,
        launch__restarts__longest_backoff_s=30.0,
    )  # fmt: skip
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    family = command.family()
    runs.kill(family["capture-0"])
    runs.wait_until(lambda: "starting it again in 30 s" in command.stderr.read_text(), "the restart is announced")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130
    _, alive = psutil.wait_procs(family.values(), timeout=0)
    assert alive == []
    chaos.check_nothing_left(run_yaml)
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed
