import json
from pathlib import Path
from typing import Any

import pytest

from specforge.config.load import run_config_from
from specforge.config.run import RunConfig
from specforge.errors import ConfigError, RunFailed
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch import engines
from specforge.launch.capture import capture
from specforge.launch.inputs import read_run_inputs
from specforge.launch.plan import ledger_kind
from specforge.launch.regenerate import regenerate
from specforge.launch.vocabulary import draft_vocabulary
from specforge.prompts.recorded import read_recorded

NUM_SAMPLES = 6


@pytest.fixture
def run(tmp_path: Path, tiny_target_dir: Path):
    """A run of six prompts, answered with 5 tokens at most; keywords replace sections."""
    data = tmp_path / "tokens.jsonl"
    rows = [{"input_ids": list(range(3, 9 + number)), "loss_spans": []} for number in range(NUM_SAMPLES)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(generate: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        content = {
            "run_dir": str(tmp_path / "run"),
            "target": {"path": str(tiny_target_dir), "device": "cpu"},
            "data": {"path": str(data), "generate": {"max_new_tokens": 5, **(generate or {})}},
            "training": {"global_batch_size": 2, "device": "cpu"},
        }
        return run_config_from(content | sections, tmp_path)

    return make


class Failing(HFTargetEngine):
    """The real engine, except that its fourth answer fails."""

    calls = 0
    error: BaseException = KeyboardInterrupt()

    def generate(self, prompts, options):
        type(self).calls += 1
        if self.calls == 4:
            raise self.error
        return super().generate(prompts, options)


@pytest.fixture
def failing(monkeypatch):
    monkeypatch.setattr(Failing, "calls", 0)
    monkeypatch.setattr(engines, "HFTargetEngine", Failing)
    return Failing


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name.startswith("answers")}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_prompt_is_answered_by_the_target(run, tmp_path, temperature):
    config, to = run({"temperature": temperature}), tmp_path / "answers.jsonl"
    written = regenerate(config, to)
    assert (written["num_samples"], written["num_generated"], written["num_kept"]) == (6, 6, 0)
    inputs = read_run_inputs(config)
    engine = engines.make_engine(config, inputs.target)
    tasks = read_recorded(to)
    for prompt, task in zip(inputs.tasks, tasks, strict=True):
        (alone,) = engine.generate([prompt.input_ids], inputs.responses.of(prompt))
        assert (task.sample_id, task.input_ids) == (prompt.sample_id, (*prompt.input_ids, *alone.token_ids))
    assert written["num_loss_tokens"] == sum(task.num_loss_tokens for task in tasks) > 0
    assert names(tmp_path) == {"answers.jsonl", "answers.jsonl.origin.json"}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_interrupted_file_goes_on_and_ends_the_same(run, tmp_path, failing, monkeypatch, temperature):
    config, to = run({"temperature": temperature}), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(config, to)
    assert not to.exists()
    written = regenerate(config, to)
    assert (written["num_generated"], written["num_kept"]) == (3, 3)
    assert failing.calls == 4 + 3
    undisturbed = tmp_path / "undisturbed.jsonl"
    regenerate(config, undisturbed)
    assert to.read_bytes() == undisturbed.read_bytes()


def test_a_whole_file_is_left_as_it_is(run, tmp_path, failing):
    config, to = run(), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(config, to)
    regenerate(config, to)
    before, calls = to.read_bytes(), failing.calls
    assert regenerate(config, to)["num_kept"] == NUM_SAMPLES
    assert (to.read_bytes(), failing.calls) == (before, calls)


@pytest.mark.parametrize("whole", [True, False])
def test_another_configuration_does_not_go_on_with_a_file(run, tmp_path, failing, whole):
    to = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(run(), to)
    if whole:
        regenerate(run(), to)
    with pytest.raises(ConfigError, match=r"was begun with generate = .*temperature"):
        regenerate(run({"temperature": 0.3}), to)
    with pytest.raises(ConfigError, match=r"was begun with batch_size = 1, but this run has 2"):
        regenerate(run(), to, batch_size=2)


def test_a_file_of_somebody_else_is_not_written_to(run, tmp_path):
    to = tmp_path / "answers.jsonl"
    to.write_text("mine")
    with pytest.raises(ConfigError, match="does not say that specforge regenerate wrote it"):
        regenerate(run(), to)
    assert to.read_text() == "mine"


def test_a_prompt_that_the_target_fails_at_is_named_and_the_rest_kept(run, tmp_path, failing, monkeypatch):
    config, to = run(), tmp_path / "answers.jsonl"
    monkeypatch.setattr(Failing, "error", RuntimeError("odd prompt"))
    name = read_run_inputs(config).tasks[3].sample_id
    with pytest.raises(RunFailed, match=rf"sample {name} \(RuntimeError: odd prompt\)"):
        regenerate(config, to)
    assert regenerate(config, to)["num_kept"] == 3


def test_a_run_without_options_of_generation_is_refused(run, tmp_path):
    config = run()
    config = config.model_copy(update={"data": config.data.model_copy(update={"generate": None})})
    with pytest.raises(ConfigError, match=r"set data\.generate"):
        regenerate(config, tmp_path / "answers.jsonl")


# What a run that generates needs


def test_a_run_that_generates_keeps_a_ledger_that_lasts(run):
    assert ledger_kind(run()) == "sqlite"
    for kind in ("none", "memory"):
        with pytest.raises(ConfigError, match=rf"ledger.kind is {kind}; use sqlite, postgres or auto"):
            run(control_plane={"ledger": {"kind": kind}})


def test_the_plan_counts_the_longest_response(run):
    inputs = read_run_inputs(run())
    longest = max(task.num_tokens for task in inputs.tasks) + 5
    assert inputs.plan.max_sample_bytes >= longest * (inputs.plan.bytes_per_token - 1)
    assert inputs.plan.total_feature_bytes == inputs.plan.bytes_per_token * sum(
        task.num_tokens + 5 for task in inputs.tasks
    )


def test_how_it_generates_belongs_to_the_identity_of_a_run(run):
    identities = [
        read_run_inputs(run(options)).identity()
        for options in ({}, {"temperature": 0.8}, {"temperature": 0.8, "seed": 3}, {"max_new_tokens": 4})
    ]
    assert all(identities.count(identity) == 1 for identity in identities)
    assert identities[0]["data_sha256"] == identities[1]["data_sha256"] != identities[3]["data_sha256"]


def test_what_needs_the_answers_first_says_so(run, tmp_path):
    with pytest.raises(ConfigError, match="write them with specforge regenerate"):
        capture(run(), tmp_path / "features")
    pruned = run(algorithm={"name": "eagle3", "draft_vocab_size": 128})
    with pytest.raises(ConfigError, match="counted in the answers"):
        draft_vocabulary(read_run_inputs(pruned))
