"""Runs whose target answers the prompts: the weights of a run over the same answers, whoever dies on the way."""

import contextlib
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from served import Served

from specforge.config.load import load_run_config
from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.errors import StaleGeneration
from specforge.inference.engine import Generation
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch import engines
from specforge.launch.compose import build_online_runtime, run_disagg_online_interleaved
from specforge.launch.regenerate import regenerate
from specforge.testing.metadata_store import make_ref, make_task
from specforge.testing.tiny_target import generated_text

NUM_SAMPLES = 24
OPTIONS = {
    "greedy": ({"max_new_tokens": 12}, {"name": "eagle3", "ttt_steps": 3}),
    # draws anchors by the sample's id
    "drawn": (
        {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95},
        {"name": "dflash", "block_size": 4, "num_layers": 1, "num_anchors": 4},
    ),
}


def write_run(directory: Path, target: Path, kind: str = "drawn", **overrides) -> Path:
    """A run over 24 short prompts that the target answers."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = generated_text(3 * NUM_SAMPLES, seed=2).splitlines()[: 2 * NUM_SAMPLES]
    texts = ["\n".join(lines[start : start + 2])[:60] for start in range(0, 2 * NUM_SAMPLES, 2)]
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    generate, algorithm = OPTIONS[kind]
    options = {"data__path": str(prompts), "data__generate": generate, "algorithm": algorithm}
    return runs.write_run(directory, target, **(options | overrides))


def recorded(ledger: Path) -> dict[int, tuple[int, ...]]:
    """Every response that the ledger has."""
    with contextlib.closing(SqlMetadataStore(ledger, read_only=True)) as store:
        return store.responses_at(range(NUM_SAMPLES))


def run_colocated(config):
    return build_online_runtime(config).run()


@pytest.fixture(scope="module")
def over_a_file(tmp_path_factory, tiny_target_dir):
    """By kind: the weights of a colocated run over answers that ``specforge regenerate`` wrote."""
    found: dict[str, str] = {}

    def weights(kind: str) -> str:
        if kind not in found:
            directory = tmp_path_factory.mktemp(kind)
            run_yaml, answers = write_run(directory, tiny_target_dir, kind), directory / "answers.jsonl"
            assert regenerate(load_run_config(run_yaml), answers)["num_generated"] == NUM_SAMPLES
            over_it = load_run_config(run_yaml, [f"data.path={answers}", "data.generate=null"])
            found[kind] = build_online_runtime(over_it).run().draft_weights_sha256
        return found[kind]

    return weights


@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize(
    ("topology", "run"), [("colocated", run_colocated), ("disaggregated", run_disagg_online_interleaved)]
)
def test_answering_while_training_gives_the_weights_of_answering_before(
    tmp_path, tiny_target_dir, over_a_file, kind, topology, run
):
    outcome = run(load_run_config(write_run(tmp_path, tiny_target_dir, kind, topology=topology)))
    assert outcome.ledger["num_slots_trained"] == 2 * NUM_SAMPLES
    assert outcome.draft_weights_sha256 == over_a_file(kind)
    assert len(recorded(tmp_path / "run" / "ledger.sqlite")) == NUM_SAMPLES


@pytest.mark.full
@pytest.mark.parametrize("num_workers", [1, 2])
def test_processes_that_answer_while_another_trains_give_the_same_weights(
    tmp_path, tiny_target_dir, over_a_file, num_workers
):
    options = {"topology": "disaggregated", "launch__num_capture_workers": num_workers}
    run_yaml = write_run(tmp_path, tiny_target_dir, **options)
    result = runs.specforge(tmp_path, "train", "-c", str(run_yaml), "--json").succeed()
    assert result["ledger"]["num_slots_trained"] == 2 * NUM_SAMPLES
    assert result["draft_weights_sha256"] == over_a_file("drawn")


@pytest.mark.full
@pytest.mark.parametrize("point", ["worker.recorded", "worker.stored"])
def test_a_capture_process_that_dies_between_record_and_commit_does_not_show(
    tmp_path, tiny_target_dir, over_a_file, point
):
    run_yaml = write_run(tmp_path, tiny_target_dir, topology="disaggregated")
    mark = tmp_path / "killed"
    script = str(Path(__file__).with_name("killed_recorder.py"))
    result = runs.Command([script, point, str(mark), str(run_yaml)], tmp_path / "armed").succeed()
    assert mark.exists()
    assert result["draft_weights_sha256"] == over_a_file("drawn")
    assert result["ledger"]["num_slots_trained"] == 2 * NUM_SAMPLES


@pytest.mark.full
@pytest.mark.parametrize("topology", ["colocated", "disaggregated"])
def test_a_killed_run_resumes_with_the_answers_that_it_had(tmp_path, tiny_target_dir, over_a_file, topology):
    run_yaml, ledger = write_run(tmp_path, tiny_target_dir, topology=topology), tmp_path / "run" / "ledger.sqlite"
    command = runs.specforge(tmp_path / "first", "train", "-c", str(run_yaml), "--json")
    runs.wait_until(lambda: runs.num_steps(tmp_path / "run") >= 3, "three steps")
    command.process.kill()
    assert command.wait() == -signal.SIGKILL
    other = ["train", "-c", str(run_yaml), "--resume", "--json", "data.generate.temperature=0.9"]
    refused = runs.specforge(tmp_path / "other", *other)
    assert refused.wait() == 2
    said = refused.stderr.read_text()
    assert "0.8" in said
    assert "0.9" in said
    before = recorded(ledger)
    resumed = runs.specforge(tmp_path / "second", "train", "-c", str(run_yaml), "--resume", "--json").succeed()
    assert resumed["draft_weights_sha256"] == over_a_file("drawn")
    assert before
    assert before.items() <= recorded(ledger).items()


@pytest.mark.full
def test_a_killed_regeneration_goes_on_to_the_same_file(tmp_path, tiny_target_dir):
    run_yaml = str(write_run(tmp_path, tiny_target_dir))
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    runs.specforge(tmp_path / "whole", "regenerate", "-c", run_yaml, "--to", str(whole), "--json").succeed()
    arguments = ["regenerate", "-c", run_yaml, "--to", str(broken), "--json", "training.threads=1"]
    command = runs.specforge(tmp_path / "first", *arguments)
    growing = tmp_path / "broken.jsonl.partial" / "responses.jsonl"
    runs.wait_until(lambda: growing.exists() and growing.read_bytes().count(b"\n") >= 2, "two answers")
    command.process.kill()
    command.wait()
    again = runs.specforge(tmp_path / "second", *arguments).succeed()
    assert again["num_kept"] + again["num_generated"] == NUM_SAMPLES
    assert again["num_kept"] >= 2
    assert broken.read_bytes() == whole.read_bytes()


class SometimesSilent(HFTargetEngine):
    """A target that has nothing to say to most prompts."""

    num_answers = 0

    def generate(self, prompts, options):
        type(self).num_answers += 1
        if self.num_answers % 6:
            return [Generation((), True) for _ in prompts]
        return super().generate(prompts, options)


def test_prompts_without_an_answer_are_trained_past(tmp_path, tiny_target_dir, monkeypatch):
    """Whole steps without one supervised token among them."""
    monkeypatch.setattr(engines, "HFTargetEngine", SometimesSilent)
    config = load_run_config(write_run(tmp_path, tiny_target_dir, "greedy", training__global_batch_size=2))
    outcome = run_colocated(config)
    assert outcome.ledger["num_slots_trained"] == 2 * NUM_SAMPLES
    lengths = {len(response) for response in recorded(tmp_path / "run" / "ledger.sqlite").values()}
    assert min(lengths) == 0 < max(lengths)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))


def test_a_response_is_recorded_over_the_network():
    tasks = [replace(make_task(i), loss_spans=(), num_to_generate=3) for i in range(4)]
    with contextlib.closing(Served(num_samples=4, tasks=tasks)) as served:
        first, second = served.client.lease("w0", 2, 5.0).leases
        found = served.client.record("w0", first.task.sample_id, 1, [7, 8])
        assert found.input_ids == (*first.task.input_ids, 7, 8)
        assert served.client.record("w1", first.task.sample_id, 9, [1]) == found
        with pytest.raises(StaleGeneration):
            served.client.record("w0", second.task.sample_id, 2, [1])
        answered = first.task.answered([7, 8])
        assert served.client.commit([make_ref(answered, 1)]).accepted == (True,)
