"""Runs whose target is in capture servers: the bits of one process, whatever happens to a server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import serving

from specforge.config.load import load_run_config
from specforge.demo.run import PACKAGED_TARGET
from specforge.launch.plan import run_id

ALGORITHMS: dict[str, dict[str, Any]] = {
    "eagle3": {"name": "eagle3", "ttt_steps": 3},
    "dflash": {"name": "dflash", "block_size": 4, "num_layers": 1},
}


def arenas(run_yaml: Path) -> list[str]:
    """Shared memory of the run that is still there."""
    return [path.name for path in Path("/dev/shm").iterdir() if run_id(load_run_config(run_yaml)) in path.name]


def served_run(directory: Path, target: Path, urls: list[str], **overrides: Any) -> Path:
    return runs.write_run(
        directory,
        target,
        topology="disaggregated",
        target__servers={"urls": urls, "longest_backoff_s": 0.5},
        **overrides,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_target_dir: Path) -> dict[str, str]:
    """The weights of the run in one process, by algorithm; each trained the first time that it is asked for."""

    class Weights(dict[str, str]):
        def __missing__(self, algorithm: str) -> str:
            directory = tmp_path_factory.mktemp(f"one-process-{algorithm}")
            run_yaml = runs.write_run(directory, tiny_target_dir, algorithm=ALGORITHMS[algorithm])
            result = runs.specforge(directory, "train", "-c", str(run_yaml), "--json").succeed()
            self[algorithm] = result["draft_weights_sha256"]
            return self[algorithm]

    return Weights()


@pytest.fixture
def server(tmp_path: Path, tiny_target_dir: Path) -> Iterator[serving.ServedTarget]:
    served = serving.ServedTarget(tmp_path / "a", tiny_target_dir)
    yield served
    served.stop()


@pytest.fixture
def other(tmp_path: Path, tiny_target_dir: Path) -> Iterator[serving.ServedTarget]:
    served = serving.ServedTarget(tmp_path / "b", tiny_target_dir)
    yield served
    served.stop()


def trained(directory: Path, run_yaml: Path) -> dict[str, Any]:
    result = runs.specforge(directory, "train", "-c", str(run_yaml), "--json").succeed()
    assert result["step"] == 12
    assert result["ledger"]["num_slots_trained"] == 48
    assert result["ledger"]["num_unique_samples_trained"] == 24
    return result


@pytest.mark.parametrize(("algorithm", "transport"), [("eagle3", "store"), ("eagle3", "inline"), ("dflash", "store")])
def test_a_served_target_gives_the_bits_of_one_process(
    tmp_path, tiny_target_dir, server, undisturbed, algorithm, transport
):
    url = server.start()
    run_yaml = served_run(
        tmp_path, tiny_target_dir, [url], algorithm=ALGORITHMS[algorithm], target__servers__transport=transport
    )
    result = trained(tmp_path, run_yaml)
    assert result["draft_weights_sha256"] == undisturbed[algorithm]
    # the server lives on, and holds nothing of the run
    assert server.command.process.poll() is None
    assert arenas(run_yaml) == []


def test_one_process_may_ask_servers_too(tmp_path, tiny_target_dir, server, undisturbed):
    url = server.start()
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, target__servers={"urls": [url], "transport": "inline"})
    assert trained(tmp_path, run_yaml)["draft_weights_sha256"] == undisturbed["eagle3"]


@pytest.mark.full
@pytest.mark.parametrize("store", ["shared_dir", "mooncake"])
def test_a_served_target_writes_to_every_store(tmp_path, tiny_target_dir, undisturbed, store):
    features = tmp_path / "features"
    served = serving.ServedTarget(tmp_path / "a", tiny_target_dir, ("--feature-dir", str(features)))
    try:
        kind = {"kind": store} | ({"path": str(features)} if store == "shared_dir" else {})
        run_yaml = served_run(tmp_path, tiny_target_dir, [served.start()], data_plane__store=kind)
        assert trained(tmp_path, run_yaml)["draft_weights_sha256"] == undisturbed["eagle3"]
    finally:
        served.stop()


def test_a_server_that_is_killed_costs_nothing_but_time(tmp_path, tiny_target_dir, server, other, undisturbed):
    """SIGKILL in the middle, and a restart on the same port: every sample once, and the undisturbed bits."""
    urls = [server.start(), other.start()]
    run_yaml = served_run(tmp_path, tiny_target_dir, urls, training__num_epochs=2, data_plane__retain_bytes=0)
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    server.kill()
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 6, "steps without the dead server")
    assert server.start() == urls[0]
    result = command.succeed()
    assert result["draft_weights_sha256"] == undisturbed["eagle3"]
    assert result["ledger"]["num_slots_trained"] == 48
    assert result["ledger"]["num_quarantined"] == 0
    assert arenas(run_yaml) == []


def test_another_target_is_refused_before_the_first_step(tmp_path, server):
    url = server.start()
    run_yaml = served_run(tmp_path, PACKAGED_TARGET, [url])
    command = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json")
    assert command.wait() == 2
    said = command.stderr.read_text()
    assert url in said
    assert "revision" in said
    assert runs.num_steps(tmp_path / "run") == 0


def test_a_run_that_is_stopped_lets_go_of_its_servers(tmp_path, tiny_target_dir, server, undisturbed):
    """SIGTERM in the middle; then --resume ends with the undisturbed bits."""
    url = server.start()
    run_yaml = served_run(tmp_path, tiny_target_dir, [url])
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 130
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == undisturbed["eagle3"]


def test_features_are_captured_once_from_servers_for_later(tmp_path, tiny_target_dir, server, undisturbed):
    """specforge capture over servers, then an offline run."""
    url = server.start()
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, target__servers={"urls": [url], "transport": "inline"})
    features = tmp_path / "set"
    said = runs.specforge(tmp_path / "capture", "capture", "-c", str(run_yaml), "--to", str(features), "--json")
    assert said.succeed()["num_captured"] == 24
    offline = runs.write_run(tmp_path / "offline", tiny_target_dir, data={"features": str(features)})
    result = runs.specforge(tmp_path / "offline", "train", "-c", str(offline), "--json").succeed()
    assert result["draft_weights_sha256"] == undisturbed["eagle3"]
