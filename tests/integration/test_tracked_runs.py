"""A run with both trackers, killed and resumed: TensorBoard shows every step once, W&B one run."""

import json

import psutil
import pytest
import runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from specforge.monitor.jsonl import read_records, read_scalars

TRACKERS = [{"kind": "tensorboard"}, {"kind": "wandb", "mode": "offline", "project": "drafts"}]


def tensorboard_curve(run_dir, tag):
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def wandb_curve(run_dir, tag):
    """(W&B run id, step) -> value, of the last time that a step was logged."""
    curve = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        run = path.stem
        while True:
            # what a killed run left torn at the end is what W&B's own reader stops at
            try:
                data = store.scan_data()
            except AssertionError:
                break
            if data is None:
                break
            record = Record.FromString(data)
            items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if tag in items:
                curve[run, items["optimizer_step"]] = items[tag]
        store._fp.close()
    return curve


@pytest.mark.parametrize("topology", ["colocated", pytest.param("disaggregated", marks=pytest.mark.full)])
def test_a_killed_and_resumed_run_is_tracked_as_one(tmp_path, tiny_target_dir, topology):
    run_yaml = runs.write_run(tmp_path, tiny_target_dir, topology=topology, monitor__trackers=TRACKERS)
    run_dir = tmp_path / "run"
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(run_dir) >= 4, "four steps")
    for process in [*psutil.Process(command.process.pid).children(recursive=True), command.process]:
        process.kill()
    command.wait()
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["step"] == 12
    logged = {record["step"]: record["loss"] for record in read_scalars(run_dir / "metrics.jsonl")}
    assert list(logged) == list(range(1, 13))
    assert tensorboard_curve(run_dir, "train/loss") == [(step, pytest.approx(loss)) for step, loss in logged.items()]
    tracked = wandb_curve(run_dir, "train/loss")
    assert {run for run, _ in tracked} == {f"run-{(run_dir / 'wandb_run_id').read_text().strip()}"}
    # what W&B's process had not written yet when it was killed is gone; what the resumed run logged is not
    resumed_at = [record["step"] for record in read_records(run_dir / "metrics.jsonl") if "event" in record][-1]
    assert resumed_at > 1
    assert {step: loss for (_, step), loss in tracked.items()}.items() <= logged.items()
    assert set(range(resumed_at, 13)) <= {step for _, step in tracked}
