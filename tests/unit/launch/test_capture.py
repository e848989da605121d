import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specforge.config.load import run_config_from
from specforge.config.run import RunConfig
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.tasks import PromptTask
from specforge.data_plane import offline_writer
from specforge.errors import ConfigError, DataError, EngineError, RunFailed
from specforge.inference.engine import CapturedSample
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch import engines
from specforge.launch.capture import capture
from specforge.launch.compose import build_online_runtime
from specforge.launch.inputs import read_run_inputs
from specforge.launch.offline import verify_features

NUM_SAMPLES = 8


@pytest.fixture
def run(tmp_path: Path, tiny_target_dir: Path) -> Callable[..., RunConfig]:
    """A run of eight samples; keywords replace sections."""
    data = tmp_path / "tokens.jsonl"
    rows = [{"input_ids": list(range(3, 12 + number)), "loss_spans": [[4, 9]]} for number in range(NUM_SAMPLES)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**sections: Any) -> RunConfig:
        content = {
            "run_dir": str(tmp_path / "run"),
            "target": {"path": str(tiny_target_dir), "device": "cpu"},
            "data": {"path": str(data)},
            "training": {"global_batch_size": 2, "device": "cpu"},
        }
        return run_config_from(content | sections, tmp_path)

    return make


def failing(sample_index: int, error: Exception) -> type[HFTargetEngine]:
    """The real engine, except that it fails at one prompt."""

    class Failing(HFTargetEngine):
        def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
            for task in tasks:
                if task.index == sample_index:
                    raise error
                yield from super().capture([task], spec)

    return Failing


def test_a_prompt_that_fails_is_recorded_and_set_aside_like_in_the_online_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "HFTargetEngine", failing(5, RuntimeError("odd prompt")))
    tolerant = {"control_plane": {"max_quarantined": 1}}
    report = capture(run(**tolerant), tmp_path / "set")
    assert (report["num_captured"], report["num_failed"]) == (7, 1)
    online = build_online_runtime(run(**tolerant)).run()
    assert online.ledger["num_quarantined"] == 1
    offline = run(**tolerant, data={"features": str(tmp_path / "set")}, run_dir=str(tmp_path / "offline"))
    outcome = build_online_runtime(offline).run()
    assert outcome.ledger["num_quarantined"] == 1
    assert outcome.draft_weights_sha256 == online.draft_weights_sha256
    assert [task.sample_id for task in read_run_inputs(offline).tasks] == [
        task.sample_id for task in read_run_inputs(run()).tasks
    ]


def test_more_failures_than_are_tolerated_end_the_capture_and_the_next_one_tries_them_again(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engines, "HFTargetEngine", failing(5, RuntimeError("odd prompt")))
        with pytest.raises(
            RunFailed, match=r"1 samples failed, more than .*max_quarantined = 0.*RuntimeError: odd pro"
        ):
            capture(run(), tmp_path / "set")
    with pytest.raises(DataError, match="did not finish"):
        read_run_inputs(run(data={"features": str(tmp_path / "set")}))
    report = capture(run(), tmp_path / "set")
    assert (report["num_kept"], report["num_captured"], report["num_failed"]) == (5, 3, 0)


def test_a_share_of_failures_can_be_tolerated(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "HFTargetEngine", failing(0, ValueError("odd prompt")))
    assert capture(run(control_plane={"max_quarantined": 0.13}), tmp_path / "set")["num_failed"] == 1


def test_damaged_features_are_a_failure(run, tmp_path, monkeypatch):
    class Damaging(HFTargetEngine):
        def capture(self, tasks: Sequence[PromptTask], spec: CaptureSpec) -> Iterator[CapturedSample]:
            for task, sample in zip(tasks, super().capture(tasks, spec), strict=True):
                if task.index == 3:
                    self._damage(sample)
                yield sample

        def _damage(self, sample: CapturedSample) -> None:
            source = sample.tensors["last"]
            part = source if not hasattr(source, "parts") else source.parts[0]
            part[1, 3] = float("nan")

    monkeypatch.setattr(engines, "HFTargetEngine", Damaging)
    assert capture(run(control_plane={"max_quarantined": 1}), tmp_path / "set")["num_failed"] == 1
    assert "NaN or infinite values in feature 'last'" in (tmp_path / "set" / "index.jsonl").read_text()


def test_an_engine_that_breaks_ends_the_capture(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "HFTargetEngine", failing(5, EngineError("gone")))
    with pytest.raises(EngineError, match="gone"):
        capture(run(control_plane={"max_quarantined": 8}), tmp_path / "set")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_what_was_captured_and_says_how_to_go_on(run, tmp_path, monkeypatch, number):
    write_file, num_written = offline_writer.write_file, 0

    def full(*arguments: Any, **options: Any) -> int:
        nonlocal num_written
        num_written += 1
        if num_written > 3:
            raise OSError(number, "No space left on device")
        return write_file(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(offline_writer, "write_file", full)
        with pytest.raises(DataError, match=r"set: No space left .*run the same command again"):
            capture(run(), tmp_path / "set")
    assert capture(run(), tmp_path / "set")["num_kept"] == 3


def test_a_disk_without_room_is_refused_before_the_target_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**6, free=1000))
    monkeypatch.setattr(engines, "HFTargetEngine", None)
    with pytest.raises(DataError, match=r"the features of 8 samples take up to [\d,]+ bytes, but 1,000 are free"):
        capture(run(), tmp_path / "set")


def test_a_capture_needs_prompts_and_a_directory_of_its_own(run, tmp_path, tiny_target_dir):
    capture(run(), tmp_path / "set")
    with pytest.raises(ConfigError, match=r"reads prompts from data\.path"):
        capture(run(data={"features": str(tmp_path / "set")}), tmp_path / "other")
    with pytest.raises(DataError, match=r"was begun with aux_layers .* \(set algorithm\.aux_layers to"):
        capture(run(algorithm={"name": "eagle3", "aux_layers": [0, 2]}), tmp_path / "set")
    with pytest.raises(DataError, match=r"was begun with prompts with the sha256 .* \(data\)"):
        capture(run(data={"path": str(tmp_path / "tokens.jsonl"), "limit": 3}), tmp_path / "set")
    other = tmp_path / "target"
    shutil.copytree(tiny_target_dir, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    with pytest.raises(DataError, match=r"was begun with target revision .* \(target\.path\)"):
        capture(run(target={"path": str(other), "device": "cpu"}), tmp_path / "set")
    offline = {"features": str(tmp_path / "set")}
    with pytest.raises(DataError, match=r"manifest\.json: captured from revision \w+, the target at .*target has"):
        read_run_inputs(run(target={"path": str(other), "device": "cpu"}, data=offline))
    with pytest.raises(DataError, match=r"manifest\.json: captured with aux_layers .* set algorithm\.aux_layers to"):
        read_run_inputs(run(algorithm={"name": "eagle3", "aux_layers": [0, 2]}, data=offline))
    with pytest.raises(DataError, match=r"set data_plane\.capture_dtype to bfloat16"):
        read_run_inputs(run(data_plane={"capture_dtype": "float32"}, data=offline))


def test_options_that_would_change_the_prompts_are_refused(run, tmp_path):
    capture(run(), tmp_path / "set")
    features = str(tmp_path / "set")
    assert len(read_run_inputs(run(data={"features": features, "limit": 3})).tasks) == 3
    with pytest.raises(DataError, match=r"max_length is 10, but .* of up to 16 tokens"):
        read_run_inputs(run(data={"features": features, "max_length": 10}))
    with pytest.raises(DataError, match=r"min_loss_tokens is 6, but .* samples with 5"):
        read_run_inputs(run(data={"features": features, "min_loss_tokens": 6}))


def test_only_what_a_run_trains_is_verified(run, tmp_path):
    capture(run(), tmp_path / "set")
    offline = run(data={"features": str(tmp_path / "set"), "limit": 3})
    tasks = read_run_inputs(offline).tasks
    (_, *lines) = (tmp_path / "set" / "index.jsonl").read_text().splitlines()
    (tmp_path / "set" / json.loads(lines[-1])["path"]).unlink()
    verify_features(offline, tasks)
    (tmp_path / "set" / json.loads(lines[0])["path"]).unlink()
    with pytest.raises(DataError, match=r"\.safetensors is missing"):
        verify_features(offline, tasks)


def test_a_prompt_that_the_index_lacks_is_named(run, tmp_path):
    capture(run(), tmp_path / "set")
    index = tmp_path / "set" / "index.jsonl"
    first = json.loads(index.read_text().splitlines()[0])["sample_id"]
    index.write_text(index.read_text().replace(f'"sample_id":"{first}"', '"sample_id":"other"'))
    offline = run(data={"features": str(tmp_path / "set")})
    with pytest.raises(DataError, match=rf"index\.jsonl: sample '{first}' of prompts\.jsonl is not listed"):
        verify_features(offline, read_run_inputs(offline).tasks)
