"""Options of an evaluation, from the configuration and the command line to the decoder."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from specforge.cli.evaluate import tree_shape
from specforge.errors import ConfigError, UserError
from specforge.evaluation.config import EvaluationConfig
from specforge.evaluation.report import SpeculativeReport
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch.evaluate import decode, sampling_of
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


def test_tree_of_the_command_line():
    assert tree_shape("8,5,63") == {"top_k": 8, "depth": 5, "num_nodes": 63}
    for wrong in ("8", "8,5", "a,b,c", "8,-5,63"):
        with pytest.raises(UserError, match="TOP_K,DEPTH,NODES"):
            tree_shape(wrong)
