"""Decoding with trees and with sampling, with proposers that know the answer or nothing."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, Sampling, TreeShape
from specforge.contracts.capture import CaptureSpec
from specforge.contracts.capture_server import Generate
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.huggingface import HFTargetEngine

VOCAB_SIZE = 24
SPEC = CaptureSpec((0, 2), True)
PROMPTS = ([3], [5, 1, 1, 0, 2, 7, 4], [6, 2, 3, 3])
NUM_NEW = 15
SHAPE = TreeShape(top_k=3, depth=2, num_nodes=8)


@pytest.fixture
def target(make_target: Callable[[int], HFTargetEngine]) -> HFTargetEngine:
    return make_target(VOCAB_SIZE)


class TreeProposer(Proposer):
    """Draws a random tree; with ``engine`` the target's own continuation is one of its paths."""

    drafts_trees = True

    def __init__(self, engine: HFTargetEngine | None = None) -> None:
        self._engine = engine
        self._generator = torch.Generator().manual_seed(0)
        self.rows: list[Tensor] = []
        self.requests: list[DraftRequest] = []

    def reset(self) -> None:
        self.rows = []

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        self.rows.append(features["aux"])
        self.requests.append(request)
        assert sum(len(rows) for rows in self.rows) == len(tokens) - 1
        assert request.tree is not None
        paths = self._random_paths(request.tree)
        if self._engine is not None:
            right = self._engine.generate([tokens], Generate(request.tree.depth + 1))[0].token_ids
            paths = [path for path in paths if path[0] != right[0]][: request.tree.num_nodes - 1 - len(right)]
            paths = [path for path in paths if path[:-1] in paths or len(path) == 1]
            paths += [right[: end + 1] for end in range(len(right))]
        return Proposal(
            tuple(path[-1] for path in paths),
            parents=tuple(paths.index(path[:-1]) if len(path) > 1 else -1 for path in paths),
        )

    def _random_paths(self, shape: TreeShape) -> list[tuple[int, ...]]:
        paths: list[tuple[int, ...]] = []
        while len(paths) < shape.num_nodes - 1:
            above = [(), *(path for path in paths if len(path) <= shape.depth)]
            place, token = (
                int(torch.randint(0, size, (), generator=self._generator)) for size in (len(above), VOCAB_SIZE)
            )
            if (path := (*above[place], token)) not in paths:
                paths.append(path)
        return paths


def test_tree_with_the_targets_own_path_is_always_accepted(target: HFTargetEngine):
    """Oracle 48. The path is the last of the tree, after all wrong ones."""
    decoder = SpeculativeDecoder(target, TreeProposer(target), SPEC, 1, tree=SHAPE)
    report = decoder.evaluate(PROMPTS, NUM_NEW)
    assert report.lossless
    assert report.accepted_length_mean == SHAPE.depth + 2
    assert report.acceptance_per_position == (1.0,) * (SHAPE.depth + 1)


def test_random_trees_give_the_exact_output(target: HFTargetEngine):
    """Oracle 49."""
    report = SpeculativeDecoder(target, TreeProposer(), SPEC, 1, tree=SHAPE).evaluate(PROMPTS, NUM_NEW)
    assert report.lossless
    assert report.num_tokens_compared == NUM_NEW * len(PROMPTS)


def test_features_after_a_tree_are_those_of_the_accepted_path(target: HFTargetEngine):
    proposer = TreeProposer(target)
    decoded = SpeculativeDecoder(target, proposer, SPEC, 1, tree=SHAPE).speculative(PROMPTS[1], NUM_NEW)
    _, expected = target.session(SPEC).forward([*PROMPTS[1], *decoded.tokens])
    seen = torch.cat(proposer.rows)
    torch.testing.assert_close(seen, expected["aux"][: len(seen)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_new", [1, 2, 3, 4, 5, 8])
def test_length_limit_makes_trees_shallower_and_leaves_the_round_out(target: HFTargetEngine, num_new: int):
    """Oracle 50."""
    proposer = TreeProposer(target)
    decoded = SpeculativeDecoder(target, proposer, SPEC, 1, tree=SHAPE).speculative(PROMPTS[1], num_new)
    assert decoded.tokens == target.generate([PROMPTS[1]], Generate(num_new))[0].token_ids
    assert decoded.accepted == (3,) * ((num_new - 1) // 4)
    for request in proposer.requests:
        assert request.tree is not None
        assert request.tree.depth == request.num_proposals - 1 <= SHAPE.depth
        assert request.tree.num_nodes <= SHAPE.num_nodes


@pytest.mark.parametrize("position", [0, 2, 4, 7])
def test_stop_token_ends_an_accepted_path(target: HFTargetEngine, position: int):
    """Oracle 50."""
    free = target.generate([PROMPTS[2]], Generate(NUM_NEW))[0].token_ids
    target.info = replace(target.info, eos_token_ids=(free[position],))
    decoded = SpeculativeDecoder(target, TreeProposer(target), SPEC, 1, tree=SHAPE).speculative(PROMPTS[2], NUM_NEW)
    assert decoded.tokens == free[: free.index(free[position]) + 1]


def test_sampled_report_compares_nothing_and_has_the_same_figures(target: HFTargetEngine):
    sampling = Sampling(1.0, torch.Generator().manual_seed(0))
    decoder = SpeculativeDecoder(target, TreeProposer(), SPEC, 1, sampling=sampling, tree=SHAPE)
    report = decoder.evaluate(PROMPTS, NUM_NEW)
    assert report.lossless is None
    assert (report.num_prompts_compared, report.num_tokens_compared, report.num_mismatches) == (0, 0, 0)
    assert report.num_rounds > 0
    assert report.tokens_per_second_speculative > 0
    assert all(len(row.speculative_tokens) == NUM_NEW for row in report.prompts)


class EmptyProposer(Proposer):
    def reset(self) -> None:
        pass

    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        return Proposal(())


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_draft_that_proposes_nothing_decodes_one_token_a_round(target: HFTargetEngine, temperature: float | None):
    sampling = None if temperature is None else Sampling(temperature, torch.Generator().manual_seed(0))
    decoder = SpeculativeDecoder(target, EmptyProposer(), SPEC, 3, sampling=sampling)
    report = decoder.evaluate(PROMPTS, NUM_NEW)
    assert report.accepted_length_mean == 1.0
    assert report.lossless is (True if sampling is None else None)


def test_vanishing_temperature_is_greedy(target: HFTargetEngine):
    greedy = SpeculativeDecoder(target, TreeProposer(), SPEC, 1, tree=SHAPE)
    sampling = Sampling(1e-6, torch.Generator())
    cold = SpeculativeDecoder(target, TreeProposer(), SPEC, 1, sampling=sampling, tree=SHAPE)
    for prompt in PROMPTS:
        assert greedy.speculative(prompt, NUM_NEW).tokens == cold.speculative(prompt, NUM_NEW).tokens
        assert greedy.plain(prompt, NUM_NEW).tokens == cold.plain(prompt, NUM_NEW).tokens


class GenerousProposer(EmptyProposer):
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        return Proposal((1,) * (request.num_proposals + 1))


def test_proposals_beyond_the_request_are_refused(target: HFTargetEngine):
    with pytest.raises(ValueError, match="proposed 4 tokens; at most 3"):
        SpeculativeDecoder(target, GenerousProposer(), SPEC, 3).speculative(PROMPTS[0], NUM_NEW)
