"""One seed, every feature store, features kept between epochs or not: the same weights."""

import signal
from pathlib import Path

import psutil
import pytest
import runs
from test_training_runs import leftovers

STORES = {
    "local": {},
    "shared_memory": {"topology": "disaggregated"},
    "shared_dir": {"topology": "disaggregated", "data_plane__store": {"kind": "shared_dir"}},
    "mooncake": {"topology": "disaggregated", "data_plane__store": {"kind": "mooncake"}},
    "shared_memory in one process": {"data_plane__store": {"kind": "shared_memory"}},
    "shared_dir in one process": {"data_plane__store": {"kind": "shared_dir"}},
    "mooncake in one process": {"data_plane__store": {"kind": "mooncake"}},
}
MEMORY_ONLY, FILES_ONLY = {}, {"data_plane__retain_memory_bytes": 0}
A_THIRD = {"data_plane__retain_bytes": "256kB", "data_plane__retain_memory_bytes": "128kB"}
NOTHING = {"data_plane__retain_bytes": 0}


def train(directory: Path, target: Path, **overrides) -> dict:
    run_yaml = runs.write_run(directory, target, **overrides)
    result = runs.specforge(directory, "train", "-c", str(run_yaml), "--json").succeed()
    assert leftovers(run_yaml) == []
    assert [path.name for path in (directory / "run").iterdir() if path.name in {"features", "retained"}] == []
    return result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_target_dir) -> str:
    """The weights of the colocated run that captures everything twice."""
    result = train(tmp_path_factory.mktemp("undisturbed"), tiny_target_dir, **NOTHING)
    assert result["ledger"]["num_commits"] > 24
    return result["draft_weights_sha256"]


@pytest.mark.parametrize(
    "store", [pytest.param(name, marks=pytest.mark.full) if "one process" in name else name for name in STORES]
)
def test_every_store_gives_the_same_weights(tmp_path, tiny_target_dir, undisturbed, store):
    result = train(tmp_path, tiny_target_dir, **STORES[store])
    assert result["draft_weights_sha256"] == undisturbed
    assert result["ledger"]["num_slots_trained"] == 48
    # There is room for everything: the target ran once over each of the 24 samples.
    assert result["ledger"]["num_commits"] == 24


@pytest.mark.parametrize(
    ("release", "kept"),
    [
        pytest.param("at_step", A_THIRD, id="at_step, a third"),
        pytest.param("at_checkpoint", FILES_ONLY, id="at_checkpoint, files"),
        pytest.param("at_checkpoint", A_THIRD, id="at_checkpoint, a third", marks=pytest.mark.full),
        pytest.param("at_step", FILES_ONLY, id="at_step, files", marks=pytest.mark.full),
        pytest.param("at_checkpoint", NOTHING, id="at_checkpoint, nothing", marks=pytest.mark.full),
    ],
)
def test_what_is_kept_for_later_epochs_does_not_change_the_weights(
    tmp_path, tiny_target_dir, undisturbed, kept, release
):
    result = train(tmp_path, tiny_target_dir, topology="disaggregated", control_plane__release=release, **kept)
    assert result["draft_weights_sha256"] == undisturbed
    num_commits = result["ledger"]["num_commits"]
    assert num_commits == 24 if kept is FILES_ONLY else 24 < num_commits <= 48


def test_a_killed_run_takes_up_what_was_kept_in_files(tmp_path, tiny_target_dir, undisturbed):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated", **FILES_ONLY)
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 8, "eight steps: the second epoch has begun")
    runs.kill(command.family()["parent"])
    assert command.wait() == -signal.SIGKILL
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed
    # Everything had been captured when the first process died; at most the window was in shared memory, and is lost.
    assert resumed["ledger"]["num_commits"] <= 16
    assert leftovers(run_yaml) == []
    assert not (tmp_path / "run" / "retained").exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FILES_ONLY, id="kept in files"),
        *(
            pytest.param(
                {"data_plane__store": {"kind": kind}, "control_plane__release": "at_checkpoint"},
                id=kind,
                marks=pytest.mark.full,
            )
            for kind in ("shared_dir", "shared_memory")
        ),
    ],
)
def test_a_killed_run_in_one_process_resumes_beside_features_that_outlived_it(
    tmp_path, tiny_target_dir, undisturbed, options
):
    """Its ledger has forgotten them, and generations begin at 1 again."""
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **options)
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 5, "five steps")
    runs.kill(psutil.Process(command.process.pid))
    assert command.wait() == -signal.SIGKILL
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed
    assert leftovers(run_yaml) == []
    assert not (tmp_path / "run" / "retained").exists()
    assert not (tmp_path / "run" / "features").exists()


@pytest.mark.full
def test_a_resumed_run_may_keep_and_store_features_elsewhere(tmp_path, tiny_target_dir, undisturbed):
    shared = tmp_path / "shared"
    store = {"kind": "shared_dir", "path": str(shared)}
    # One directory for both: they stay apart in it.
    run_yaml = runs.write_run(
        tmp_path,
        tiny_target_dir,
        topology="disaggregated",
        data_plane__store=store,
        data_plane__retain_dir=str(shared),
        **FILES_ONLY,
    )
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 5, "five steps")
    runs.kill(command.family()["parent"])
    assert command.wait() == -signal.SIGKILL
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json")
    assert resumed.succeed()["draft_weights_sha256"] == undisturbed
    assert list(shared.iterdir()) == []
    assert leftovers(run_yaml) == []


@pytest.mark.parametrize(
    ("store", "victim"),
    [
        ("mooncake", "mooncake_master"),
        pytest.param("mooncake", "mooncake_client", marks=pytest.mark.full),
        pytest.param("mooncake in one process", "mooncake_master", marks=pytest.mark.full),
        pytest.param("mooncake in one process", "mooncake_client", marks=pytest.mark.full),
    ],
)
def test_a_run_goes_on_when_mooncake_loses_everything(tmp_path, tiny_target_dir, undisturbed, store, victim):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, **STORES[store], **NOTHING, training__checkpoint_every=1)
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    services = {process.name(): process for process in psutil.Process(command.process.pid).children()}
    runs.kill(services[victim])
    result = command.succeed()
    assert result["draft_weights_sha256"] == undisturbed
    assert result["ledger"]["num_slots_trained"] == 48
    assert result["ledger"]["num_quarantined"] == 0
    assert [process for process in services.values() if process.is_running()] == []
