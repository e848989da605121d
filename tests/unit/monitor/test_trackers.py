"""Trackers: TensorBoard reads what was written, a resumed run repeats nothing, and no failure ends a run."""

import json
import logging
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from specforge.errors import MissingExtraError
from specforge.monitor.config import TensorBoardTracker, WandbTracker
from specforge.monitor.jsonl import JsonlMonitor
from specforge.monitor.naming import hyperparameters, tracked_name
from specforge.monitor.tensorboard import TensorBoardMonitor
from specforge.monitor.trackers import TrackedRun, UnfailingMonitor, open_trackers


def read(directory):
    """What TensorBoard itself makes of the event files."""
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def curve(directory, tag):
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


@contextmanager
def files_of_at_most(num_bytes):
    """No file of this process grows beyond ``num_bytes``: what a full disk is to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_tensorboard_shows_scalars_in_groups_and_events_as_text(tmp_path):
    monitor = TensorBoardMonitor(tmp_path, 0, {})
    monitor.event("first_step", step=1, num_captured=4, note=None)
    monitor.log(1, {"loss": 2.0, "eval/avg_loss": 3.0})
    monitor.log(2, {"loss": 1.5})
    monitor.event("checkpoint")
    # visible while the run goes on
    assert curve(tmp_path, "train/loss") == [(1, 2.0), (2, 1.5)]
    monitor.close()
    monitor.close()
    assert curve(tmp_path, "eval/avg_loss") == [(1, 3.0)]
    (first,) = read(tmp_path).Tensors("events/first_step/text_summary")
    assert first.step == 1
    assert first.tensor_proto.string_val == [b"step: 1, num_captured: 4, note: null"]
    assert [event.step for event in read(tmp_path).Tensors("events/checkpoint/text_summary")] == [2]


def test_tensorboard_shows_the_options_as_hyperparameters(tmp_path):
    TensorBoardMonitor(tmp_path, 0, {"training.lr": 0.5, "algorithm.name": "eagle3", "a": True, "none": None}).close()
    metadata = read(tmp_path).SummaryMetadata("_hparams_/session_start_info")
    assert metadata.plugin_data.plugin_name == "hparams"
    shown = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert {name: shown[name].WhichOneof("kind") for name in shown} == {
        "training.lr": "number_value",
        "algorithm.name": "string_value",
        "a": "bool_value",
    }
    assert shown["training.lr"].number_value == 0.5
    assert shown["algorithm.name"].string_value == "eagle3"


def test_event_file_is_for_its_owner_alone(tmp_path):
    TensorBoardMonitor(tmp_path / "tensorboard", 0, {}).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("torn", [b"", b"\x30\0\0"], ids=["whole", "torn"])
def test_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path, torn):
    """Even where the killed run left half a record, and within the same second."""
    first = TensorBoardMonitor(tmp_path, 0, {})
    for step in range(1, 6):
        first.log(step, {"loss": float(step)})
    first.close()
    (file,) = tmp_path.iterdir()
    with file.open("ab") as end:
        end.write(torn)
    resumed = TensorBoardMonitor(tmp_path, 3, {})
    resumed.log(4, {"loss": 40.0})
    resumed.close()
    assert curve(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_full_disk_costs_the_tracker_and_not_the_run(tmp_path, caplog):
    monitor = UnfailingMonitor("tensorboard", lambda: TensorBoardMonitor(tmp_path / "tb", 0, {}))
    log = JsonlMonitor(tmp_path / "metrics.jsonl")
    monitor.log(1, {"loss": 1.0})
    (file,) = (tmp_path / "tb").iterdir()
    # room for a part of the next record: what is left of it must not hide what was written before
    with files_of_at_most(file.stat().st_size + 20), caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            monitor.log(step, {"loss": 1.0})
            monitor.event("checkpoint")
    monitor.log(5, {"loss": 1.0})
    log.log(5, {"loss": 1.0})
    monitor.close()
    log.close()
    (warning,) = caplog.messages
    assert "tensorboard could not be written to" in warning
    assert "20 of" in warning
    assert curve(tmp_path / "tb", "train/loss") == [(1, 1.0)]


def test_tracker_that_cannot_start_is_warned_about_and_left_out(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    (monitor,) = open_trackers([TensorBoardTracker(kind="tensorboard")], TrackedRun(tmp_path, 0, {}))
    monitor.log(1, {"loss": 1.0})
    monitor.close()
    (warning,) = caplog.messages
    assert "tensorboard could not be started (FileExistsError" in warning


def test_tracker_that_cannot_be_closed_is_warned_about(tmp_path, caplog):
    class Unsent(JsonlMonitor):
        def close(self):
            super().close()
            raise TimeoutError("nothing was sent")

    monitor = UnfailingMonitor("remote", lambda: Unsent(tmp_path / "m.jsonl"))
    monitor.close()
    monitor.close()
    (warning,) = caplog.messages
    assert "remote could not be closed (TimeoutError: nothing was sent)" in warning


@pytest.mark.parametrize(
    ("module", "tracker", "extra"),
    [
        ("tensorboardX", TensorBoardTracker(kind="tensorboard"), "tensorboard"),
        ("wandb", WandbTracker(kind="wandb", mode="offline"), "wandb"),
    ],
)
def test_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch, module, tracker, extra):
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"specforge\[{extra}\]"):
        open_trackers([tracker], TrackedRun(tmp_path, 0, {}))


def test_trackers_opened_before_a_refused_one_are_closed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = [TensorBoardTracker(kind="tensorboard"), WandbTracker(kind="wandb")]
    opened = []
    original = TensorBoardMonitor.close
    monkeypatch.setattr(TensorBoardMonitor, "close", lambda self: (opened.append(self), original(self))[1])
    with pytest.raises(MissingExtraError):
        open_trackers(trackers, TrackedRun(tmp_path, 0, {}))
    (monitor,) = opened
    with pytest.raises(ValueError, match="closed file"):
        monitor.log(1, {})


def test_nothing_is_imported_before_a_run_asks_for_it():
    script = """
import sys
import specforge.config.load, specforge.monitor.trackers
from specforge.cli.main import main
for verb in ("train", "plan"):
    try:
        main([verb, "--help"])
    except SystemExit:
        pass
heavy = {"tensorboardX", "tensorboard", "wandb", "google.protobuf", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_metrics_are_grouped_by_what_they_measure():
    assert tracked_name("loss") == "train/loss"
    assert tracked_name("eval/avg_loss") == "eval/avg_loss"


def test_options_are_flat_and_hold_no_password():
    nested = {
        "training": {"lr": 1e-3, "betas": [0.9, 0.95], "note": None},
        "plugin": {"url": "postgresql://me:secret@host:5432/db", "hosts": ["http://me:secret@a/", "http://b:80/x@y"]},
        "url": "https://me:half@secret@host/a?design=1&api_token=secret&key=secret#end",
        "user": "https://secret@host",
    }
    flat = hyperparameters(nested)
    assert flat["training.lr"] == 1e-3
    assert flat["training.betas"] == "[0.9, 0.95]"
    assert flat["training.note"] is None
    assert flat["plugin.url"] == "postgresql://***@host:5432/db"
    assert json.loads(flat["plugin.hosts"]) == ["http://***@a/", "http://b:80/x@y"]
    assert flat["url"] == "https://***@host/a?design=1&api_token=***&key=***#end"
    assert flat["user"] == "https://***@host"
