"""Options of an evaluation, from the configuration and the command line to the decoder."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from specforge.cli.evaluate import tree_shape
from specforge.config.load import section_from
from specforge.errors import ConfigError, DataError, UserError
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.report import SpeculativeReport
from specforge.inference.huggingface import HFTargetEngine
from specforge.inference.target import load_tokenizer
from specforge.launch.evaluate import decode, load_prompts, sampling_of
from specforge.testing.drafting import make_drafting

TREE = {"top_k": 2, "depth": 1, "num_nodes": 6}


@pytest.fixture
def evaluated(make_target: Callable[[int], HFTargetEngine]) -> Callable[..., SpeculativeReport]:
    def run(case: str, **values: Any) -> SpeculativeReport:
        engine = make_target(8)
        drafting = make_drafting(engine, case)
        algorithm = SimpleNamespace(name=case, proposer=lambda *_: drafting.proposer)
        loaded: Any = SimpleNamespace(algorithm=algorithm, draft=None, spec=drafting.spec)
        options = EvaluationConfig(max_new_tokens=6, num_proposals=2, **values)
        return decode(engine, engine.tables, loaded, [[1, 2, 3]], options)

    return run


def test_defaults_are_greedy_chains_that_are_judged(evaluated: Callable[..., SpeculativeReport]):
    report = evaluated("eagle3")
    assert report.lossless
    assert len(report.acceptance_per_position) == 2


def test_temperature_samples_with_the_seed(evaluated: Callable[..., SpeculativeReport]):
    outputs = [evaluated("eagle3", temperature=1.0, top_p=0.95, seed=seed) for seed in (4, 4, 5)]
    assert all(report.lossless is None for report in outputs)
    first, second, third = (report.prompts[0].speculative_tokens for report in outputs)
    assert first == second != third


def test_tree_is_decoded_where_the_algorithm_drafts_one(evaluated: Callable[..., SpeculativeReport]):
    assert evaluated("medusa", tree=TREE).lossless
    assert evaluated("eagle3", tree=TREE, temperature=0.5).lossless is None


def test_tree_of_another_algorithm_is_refused_and_names_those_that_draft_them(
    evaluated: Callable[..., SpeculativeReport],
):
    with pytest.raises(ConfigError, match=r"--tree 2,1,6 .*dflash, which drafts chains only; .*: eagle3 and medusa"):
        evaluated("dflash", tree=TREE)


def test_options_of_sampling_reach_the_draws():
    assert sampling_of(EvaluationConfig()) is None
    found = sampling_of(EvaluationConfig(temperature=0.5, top_k=3, top_p=0.5, seed=9))
    assert found is not None
    assert (found.temperature, found.top_k, found.top_p) == (0.5, 3, 0.5)
    assert torch.rand(1, generator=found.generator) == torch.rand(1, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}, {"tree": {"depth": -1}}]
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        EvaluationConfig(**wrong)


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.9}, {"seed": 1}])
def test_sampling_without_a_temperature_is_refused(sampling: dict[str, Any]):
    with pytest.raises(ValidationError, match=f"{next(iter(sampling))} would do nothing.*set a temperature above 0"):
        EvaluationConfig(**sampling)
    assert EvaluationConfig(temperature=0.1, **sampling)
    assert EvaluationConfig(**EvaluationConfig().model_dump()) == EvaluationConfig()


def test_files_of_prompts_are_taken_from_the_folder_of_the_run(tmp_path: Path):
    for given, expected in (("a.jsonl", ["a.jsonl"]), (["a.jsonl", "b/c.json"], ["a.jsonl", "b/c.json"])):
        options = section_from(EvaluationConfig, "evaluation", {"prompts": given}, tmp_path)
        assert options.prompts == tuple(tmp_path / name for name in expected)
    assert EvaluationConfig(batch_sizes=4).batch_sizes == (4,)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(
    tmp_path: Path, tiny_target_dir: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"instruction": "add " * count}) + "\n" for count in (1, 90, 2)))
    tokenizer = load_tokenizer(tiny_target_dir)
    options = EvaluationConfig(prompts=file, max_new_tokens=10)
    longest = max(len(prompt.input_ids) for prompt in load_prompts(options, tokenizer, 10_000))
    found = load_prompts(options, tokenizer, longest + 9)
    assert [(prompt.line, prompt.category) for prompt in found] == [(1, "prompts"), (3, "prompts")]
    assert "1 prompts were left out: with 10 new tokens" in caplog.text
    assert len(load_prompts(options, tokenizer, longest + 10)) == 3
    with pytest.raises(DataError, match="no prompt is left, 3 prompts were left out"):
        load_prompts(options, tokenizer, 12)


def test_tree_of_the_command_line():
    assert tree_shape("8,5,63") == {"top_k": 8, "depth": 5, "num_nodes": 63}
    for wrong in ("8", "8,5", "a,b,c", "8,-5,63"):
        with pytest.raises(UserError, match="TOP_K,DEPTH,NODES"):
            tree_shape(wrong)
