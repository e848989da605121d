"""Batches decode what each prompt decodes alone, with every algorithm's proposer, as chains, trees and samples."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specforge.algorithms.base import Proposer, Sampling, TreeShape
from specforge.algorithms.catalog import algorithm_names
from specforge.errors import TargetError
from specforge.evaluation import lanes as lanes_module
from specforge.evaluation.outcome import measure, report_of
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.batch import HFBatchSession
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch.evaluate import TREE_ALGORITHMS
from specforge.testing.drafting import Drafting, make_drafting

PROMPTS = [[3], [5, 1, 1, 0, 2, 7, 4], [6, 2, 3, 3], [1, 1], [7, 6, 5, 4, 3, 2, 1, 0]]
NUM_NEW = 13
SHAPE = TreeShape(3, 2, 9)


@pytest.fixture
def target(make_target: Callable[[int], HFTargetEngine]) -> HFTargetEngine:
    return make_target(8)


def proposers(drafting: Drafting, engine: HFTargetEngine, count: int) -> list[Proposer]:
    return [drafting.algorithm.proposer(drafting.draft, engine.tables) for _ in range(count)]


@pytest.mark.parametrize("case", algorithm_names())
def test_greedy_batches_are_lossless_and_equal_to_each_prompt_alone(target: HFTargetEngine, case: str):
    drafting = make_drafting(target, case)
    alone = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3)
    expected = [alone.speculative(prompt, NUM_NEW) for prompt in PROMPTS]
    for batch_size in (2, 5):
        decoder = SpeculativeDecoder(target, proposers(drafting, target, batch_size), drafting.spec, 3)
        report = decoder.evaluate(PROMPTS, NUM_NEW)
        assert report.lossless
        assert report.num_tokens_compared == len(PROMPTS) * NUM_NEW
        assert [row.speculative_tokens for row in report.prompts] == [decoded.tokens for decoded in expected]
        assert [row.accepted for row in report.prompts] == [decoded.accepted for decoded in expected]


@pytest.mark.parametrize("case", TREE_ALGORITHMS)
def test_trees_of_a_batch_are_lossless(target: HFTargetEngine, case: str):
    drafting = make_drafting(target, case)
    alone = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 1, tree=SHAPE)
    decoder = SpeculativeDecoder(target, proposers(drafting, target, 3), drafting.spec, 1, tree=SHAPE)
    report = decoder.evaluate(PROMPTS, NUM_NEW)
    assert report.lossless
    assert [row.accepted for row in report.prompts] == [alone.speculative(it, NUM_NEW).accepted for it in PROMPTS]


@pytest.mark.parametrize("case", ["eagle3", "dflash"])
def test_sequences_that_stop_leave_the_batch_and_the_others_go_on(target: HFTargetEngine, case: str):
    """Every token that the target says, as the stop token: prompts end at different rounds."""
    drafting = make_drafting(target, case)
    free = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3)
    whole = [free.plain(prompt, NUM_NEW).tokens for prompt in PROMPTS]
    lengths = set()
    for stop in range(8):
        target.info = replace(target.info, eos_token_ids=(stop,))
        decoder = SpeculativeDecoder(target, proposers(drafting, target, 5), drafting.spec, 3)
        found = decoder.speculative_batch(PROMPTS, NUM_NEW)
        expected = [it[: it.index(stop) + 1] if stop in it else it for it in whole]
        assert [decoded.tokens for decoded in found] == expected
        assert [decoded.tokens for decoded in decoder.plain_batch(PROMPTS, NUM_NEW)] == expected
        lengths.add(tuple(map(len, expected)))
    assert len(lengths) > 3


@pytest.mark.parametrize("tree", [None, SHAPE])
def test_samples_do_not_depend_on_the_batch(target: HFTargetEngine, tree: TreeShape | None):
    drafting = make_drafting(target, "eagle3")
    outputs = []
    for batch_size, seed in ((1, 4), (3, 4), (5, 4), (5, 5)):
        sampling = Sampling(1.0, torch.Generator().manual_seed(seed), top_k=6)
        batch = proposers(drafting, target, batch_size)
        decoder = SpeculativeDecoder(target, batch, drafting.spec, 3, sampling=sampling, tree=tree)
        report = decoder.evaluate(PROMPTS, NUM_NEW)
        outputs.append([(row.plain_tokens, row.speculative_tokens) for row in report.prompts])
    assert outputs[0] == outputs[1] == outputs[2] != outputs[3]


def test_cache_that_mixes_up_sequences_is_found_out(target: HFTargetEngine, monkeypatch: pytest.MonkeyPatch):
    """Crops go to the neighbour."""
    drafting = make_drafting(target, "eagle3")
    crop = HFBatchSession.crop

    def wrong(session: HFBatchSession, sequence: int, num_tokens: int) -> None:
        if sequence:
            crop(session, sequence, num_tokens)

    monkeypatch.setattr(HFBatchSession, "crop", wrong)
    decoder = SpeculativeDecoder(target, proposers(drafting, target, 3), drafting.spec, 3)
    assert decoder.evaluate(PROMPTS[:3], NUM_NEW).lossless is False


def test_seconds_of_a_batch_are_shared_by_the_sequences_in_it(target: HFTargetEngine, monkeypatch: pytest.MonkeyPatch):
    """With a clock that ticks once a reading: every step takes a second."""
    drafting = make_drafting(target, "eagle3")
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    decoder = SpeculativeDecoder(target, proposers(drafting, target, 5), drafting.spec, 3)
    plain = decoder.plain_batch(PROMPTS, 11)
    assert [decoded.seconds for decoded in plain] == pytest.approx([10 / 5] * 5)
    speculative = decoder.speculative_batch(PROMPTS, 11)
    steps = max(len(decoded.rounds) for decoded in speculative)
    assert sum(decoded.seconds for decoded in speculative) == pytest.approx(steps)


def test_engine_without_batches_says_so(target: HFTargetEngine):
    class OneAtATime:
        info, dtype, session = target.info, target.dtype, target.session
        reference_logits = target.reference_logits

    with pytest.raises(TargetError, match="one sequence at a time, but a batch of 2 was asked for"):
        lanes_module.open_session(OneAtATime(), make_drafting(target, "eagle3").spec, 2)


def test_outcome_has_every_batch_size_and_category(target: HFTargetEngine):
    drafting = make_drafting(target, "eagle3")
    categories = ["b", "a", "b", "a", "b"]
    outcomes = []
    for batch_size in (1, 4):
        decoder = SpeculativeDecoder(target, proposers(drafting, target, batch_size), drafting.spec, 2)
        first = outcomes[0].report if outcomes else None
        outcomes.append(measure(decoder, PROMPTS, categories, NUM_NEW, first=first))
    report = report_of(outcomes, categories)
    assert list(report["by_category"]) == ["a", "b"]
    assert [report["by_category"][name]["num_prompts"] for name in "ab"] == [2, 3]
    assert list(report["by_batch_size"]) == ["1", "4"]
    assert (report["by_batch_size"]["4"]["num_changed"], report["batch_invariant"]) == (0, True)
    assert report["lossless"] is True
    assert report["num_tokens_compared"] == 2 * len(PROMPTS) * NUM_NEW
    rounds = [report["by_category"][name]["num_rounds"] for name in "ab"]
    means = [report["by_category"][name]["accepted_length_mean"] for name in "ab"]
    assert sum(rounds) == report["num_rounds"]
    assert sum(n * mean for n, mean in zip(rounds, means, strict=True)) / sum(rounds) == pytest.approx(
        report["accepted_length_mean"]
    )
    low, high = report["accepted_length_ci95"]
    assert low <= report["accepted_length_mean"] <= high
    assert [row["category"] for row in report["prompts"]] == categories
    assert [row.batch for row in outcomes[1].report.prompts] == [0, 0, 0, 0, 1]
    at_four = report["by_batch_size"]["4"]
    assert at_four["speed_up_ci95"] is not None
    assert [at_four["by_category"][name]["speed_up_ci95"] for name in "ab"] == [None, None]
    assert None not in [report["by_category"][name]["speed_up_ci95"] for name in "ab"]
    assert all(row["equal"] for row in report["prompts"])


def test_output_that_changes_with_the_batch_size_is_counted(target: HFTargetEngine):
    drafting = make_drafting(target, "eagle3")
    categories = ["a"] * 2
    decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 2)
    first = measure(decoder, PROMPTS[:2], categories, NUM_NEW)
    row = first.report.prompts[0]
    other = replace(row, plain_tokens=(*row.plain_tokens[:5], (row.plain_tokens[5] + 1) % 8, *row.plain_tokens[6:]))
    changed = replace(first, report=replace(first.report, prompts=(other, *first.report.prompts[1:])))
    again = measure(decoder, PROMPTS[:2], categories, NUM_NEW, first=changed.report)
    assert (again.num_changed, again.num_changed_near_ties) == (1, 0)
    assert report_of([first, again], categories)["batch_invariant"] is False
