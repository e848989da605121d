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
from specforge.launch.evaluate import check_batch_sizes, decode, default_categories, load_prompts, sampling_of
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


def room_for(num_tokens: int) -> Any:
    return SimpleNamespace(max_position_embeddings=num_tokens, vocab_size=100_000)


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(
    tmp_path: Path, tiny_target_dir: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"instruction": "add " * count}) + "\n" for count in (1, 90, 2)))
    tokenizer = load_tokenizer(tiny_target_dir)
    options = EvaluationConfig(prompts=file, max_new_tokens=10)
    longest = max(len(prompt.input_ids) for prompt in load_prompts(options, tokenizer, room_for(10_000)))
    found = load_prompts(options, tokenizer, room_for(longest + 9))
    assert [(prompt.line, prompt.category) for prompt in found] == [(1, "prompts"), (3, "prompts")]
    assert "1 prompts were left out: with 10 new tokens" in caplog.text
    assert len(load_prompts(options, tokenizer, room_for(longest + 10))) == 3
    with pytest.raises(DataError, match="no prompt is left, 3 prompts were left out"):
        load_prompts(options, tokenizer, room_for(12))


def test_token_ids_that_the_target_does_not_know_are_named_with_their_place(tmp_path: Path, tiny_target_dir: Path):
    file = tmp_path / "recorded.jsonl"
    rows = [{"input_ids": ids, "loss_spans": []} for ids in ([1, 2], [3, 512, 4])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = SimpleNamespace(max_position_embeddings=100, vocab_size=512)
    with pytest.raises(DataError, match=r"recorded\.jsonl line 2: .* token id 512, .* vocabulary of 512 tokens"):
        load_prompts(EvaluationConfig(prompts=file), load_tokenizer(tiny_target_dir), target)  # type: ignore[arg-type]


def test_files_of_one_name_have_categories_of_their_own_and_no_file_counts_twice(tmp_path: Path):
    paths = [tmp_path / name for name in ("a/test.jsonl", "b/test.jsonl", "other.jsonl", "b/test.json")]
    assert default_categories(paths[1:3]) == ["test", "other"]
    assert default_categories(paths[:3]) == ["a/test", "b/test", "other"]
    assert default_categories([paths[1], paths[3]]) == [str(paths[1]), str(paths[3])]
    with pytest.raises(ConfigError, match=r"test\.jsonl is given twice"):
        default_categories([paths[0], tmp_path / "b/../a/test.jsonl"])


def test_batch_that_could_never_be_full_is_refused_before_anything_is_built(evaluated: Callable[..., Any]):
    check_batch_sizes((1, 32), 32)
    with pytest.raises(ConfigError, match="batch size of 1000000000 was asked for, but there are 1 prompts"):
        evaluated("eagle3", batch_sizes=10**9)


def test_tree_of_the_command_line():
    assert tree_shape("8,5,63") == {"top_k": 8, "depth": 5, "num_nodes": 63}
    for wrong in ("8", "8,5", "a,b,c", "8,-5,63"):
        with pytest.raises(UserError, match="TOP_K,DEPTH,NODES"):
            tree_shape(wrong)
