"""Weights & Biases without a network: what an offline run wrote is read back with W&B's own reader."""

import json
import logging
import math
import subprocess
import sys

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from specforge.errors import ConfigError
from specforge.monitor.config import WandbTracker
from specforge.monitor.trackers import TrackedRun, open_trackers
from specforge.monitor.wandb import RUN_ID_FILE, WandbMonitor, run_id

OFFLINE = WandbTracker(kind="wandb", mode="offline", project="drafts", entity="us", group="tiny", tags=("a", "b"))


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(monkeypatch, tmp_path_factory):
    """No key, no settings of the person who runs the tests; what W&B started ends with the test."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield
    wandb.teardown()


def written(run_dir):
    """Every record of every part of the W&B run, in order. W&B's process has to end first: it writes until then."""
    wandb.teardown()
    records = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            records.append(Record.FromString(data))
        store._fp.close()
    return records


def history(run_dir):
    """The logged values, a dictionary a call."""
    rows = [record.history for record in written(run_dir) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def test_offline_run_holds_scalars_events_and_options(tmp_path):
    monitor = WandbMonitor(OFFLINE, tmp_path, 0, {"training.lr": 0.5, "algorithm.name": "eagle3"})
    monitor.event("first_step", step=1, num_slots=8)
    monitor.log(1, {"loss": 2.0, "eval/avg_loss": 3.0})
    monitor.log(2, {"loss": float("nan")})
    monitor.close()
    monitor.close()
    rows = history(tmp_path)
    assert rows[0]["events/first_step"] == "step: 1, num_slots: 8"
    assert (rows[1]["optimizer_step"], rows[1]["train/loss"], rows[1]["eval/avg_loss"]) == (1, 2.0, 3.0)
    assert rows[2]["optimizer_step"] == 2
    assert math.isnan(rows[2]["train/loss"])
    (run,) = [record.run for record in written(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.entity, run.display_name, run.run_group) == ("drafts", "us", tmp_path.name, "tiny")
    assert list(run.tags) == ["a", "b"]
    options = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (options["training.lr"], options["algorithm.name"]) == (0.5, "eagle3")


def test_resumed_run_continues_the_same_wandb_run_and_may_repeat_steps(tmp_path):
    for first_step, last_step in ((0, 3), (2, 4)):
        monitor = WandbMonitor(OFFLINE, tmp_path, first_step, {"a": first_step})
        for step in range(first_step + 1, last_step + 1):
            monitor.log(step, {"loss": float(step)})
        monitor.close()
    assert [row["optimizer_step"] for row in history(tmp_path)] == [1, 2, 3, 3, 4]
    ids = {record.run.run_id for record in written(tmp_path) if record.WhichOneof("record_type") == "run"}
    assert ids == {(tmp_path / RUN_ID_FILE).read_text().strip()} == {run_id(tmp_path)}
    assert run_id(tmp_path / "another") not in ids


def test_online_without_a_key_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="set WANDB_API_KEY") as refused:
        open_trackers([WandbTracker(kind="wandb")], TrackedRun(tmp_path, 0, {}))
    assert "mode: offline" in str(refused.value)


@pytest.mark.full
def test_server_that_cannot_be_reached_costs_the_tracker_and_not_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    # the discard port: nothing listens there
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    monkeypatch.setattr("specforge.monitor.wandb.START_S", 1.0)
    wandb.teardown()
    with caplog.at_level(logging.WARNING, logger="specforge"):
        (monitor,) = open_trackers([WandbTracker(kind="wandb")], TrackedRun(tmp_path, 0, {}))
    monitor.log(1, {"loss": 1.0})
    monitor.close()
    (warning,) = [record.message for record in caplog.records if record.name.startswith("specforge")]
    assert "wandb could not be started" in warning


KILLED = """
import logging
import sys
from pathlib import Path

import psutil

from specforge.monitor.config import WandbTracker
from specforge.monitor.trackers import TrackedRun, open_trackers

if __name__ == "__main__":
    logging.basicConfig(format="%(name)s: %(message)s")
    tracker = WandbTracker(kind="wandb", mode="offline")
    (monitor,) = open_trackers([tracker], TrackedRun(Path(sys.argv[1]), 0, {}))
    monitor.log(1, {"loss": 1.0})
    started = psutil.Process().children(recursive=True)
    assert started
    for process in started:
        process.kill()
    psutil.wait_procs(started, timeout=60)
    for step in range(2, 100):
        monitor.log(step, {"loss": 1.0})
    monitor.close()
    print("trained to the end")
"""


def test_death_of_the_wandb_process_costs_the_tracker_and_not_the_run(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "trained to the end"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("specforge.monitor.trackers: ")]
    assert len(warnings) == 1, done.stderr
    assert "wandb could not be" in warnings[0]
