"""Decoding with the proposer of every algorithm: greedy output is the target's own. On 8 tokens some are accepted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specforge.algorithms.base import DraftRequest, Sampling, TreeShape
from specforge.algorithms.catalog import algorithm_names, algorithm_type
from specforge.contracts.capture import CaptureSpec
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.huggingface import HFTargetEngine
from specforge.launch.evaluate import TREE_ALGORITHMS
from specforge.testing.drafting import drafting_cases, make_drafting

PROMPTS = ([3], [5, 1, 1, 0, 2, 7, 4], [6, 2, 3, 3])
NUM_NEW = 11
TREES = [TreeShape(2, 1, 6), TreeShape(3, 2, 9), TreeShape(1, 2, 4)]


@pytest.fixture
def target(make_target: Callable[[int], HFTargetEngine]) -> HFTargetEngine:
    return make_target(8)


@pytest.mark.parametrize("num_proposals", [2, 7])
@pytest.mark.parametrize("case", drafting_cases())
def test_greedy_chains_are_lossless(target: HFTargetEngine, case: str, num_proposals: int):
    """Oracle 45. Also where more is asked for than a block or the heads give."""
    drafting = make_drafting(target, case)
    report = SpeculativeDecoder(target, drafting.proposer, drafting.spec, num_proposals).evaluate(PROMPTS, NUM_NEW)
    assert report.lossless
    assert report.num_tokens_compared == len(PROMPTS) * NUM_NEW
    assert report.num_rounds > 0


@pytest.mark.parametrize("shape", TREES, ids=str)
@pytest.mark.parametrize("case", TREE_ALGORITHMS)
def test_greedy_trees_are_lossless(target: HFTargetEngine, case: str, shape: TreeShape):
    """Oracle 45."""
    drafting = make_drafting(target, case)
    decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 1, tree=shape)
    report = decoder.evaluate(PROMPTS, NUM_NEW)
    assert report.lossless
    assert len(report.acceptance_per_position) == shape.depth + 1


@pytest.mark.parametrize("case", TREE_ALGORITHMS)
def test_tree_of_one_child_a_node_is_the_chain(target: HFTargetEngine, case: str):
    """Oracle 47. Both as proposals and as what is decoded."""
    drafting = make_drafting(target, case)
    session = target.session(drafting.spec)
    _, features = session.forward(PROMPTS[1])
    tokens = [*PROMPTS[1], 4]
    chain = drafting.proposer.propose(tokens, features, DraftRequest(3))
    drafting.proposer.reset()
    tree = drafting.proposer.propose(tokens, features, DraftRequest(3, tree=TreeShape(1, 2, 4)))
    assert tree.tokens == chain.tokens
    assert tree.parents == (-1, 0, 1)
    chains, trees = (
        SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3, tree=shape).speculative(PROMPTS[1], NUM_NEW)
        for shape in (None, TreeShape(1, 2, 4))
    )
    assert chains.rounds == trees.rounds


@pytest.mark.parametrize("case", TREE_ALGORITHMS)
@pytest.mark.parametrize("shape", TREES, ids=str)
def test_tree_is_closed_and_has_the_nodes_that_were_asked_for(target: HFTargetEngine, case: str, shape: TreeShape):
    """Oracle 47. A parent comes first, siblings differ, no path is deeper than asked."""
    drafting = make_drafting(target, case)
    _, features = target.session(drafting.spec).forward(PROMPTS[1])
    tree = drafting.proposer.propose([*PROMPTS[1], 2], features, DraftRequest(shape.depth + 1, tree=shape))
    assert tree.parents is not None
    assert tree.probabilities is None
    assert len(tree.tokens) == len(tree.parents) == shape.num_nodes - 1
    assert all(parent < index for index, parent in enumerate(tree.parents))
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree.tokens)
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    assert max(depths) <= shape.depth + 1


@pytest.mark.parametrize("case", algorithm_names())
def test_stop_token_ends_output_where_plain_decoding_ends(target: HFTargetEngine, case: str):
    """Oracle 50. Every token that the target says, as the stop token."""
    drafting = make_drafting(target, case)
    whole = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3).plain(PROMPTS[1], NUM_NEW).tokens
    assert len(set(whole)) > 2
    for stop in set(whole):
        target.info = replace(target.info, eos_token_ids=(stop,))
        decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3)
        assert decoder.speculative(PROMPTS[1], NUM_NEW).tokens == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize("case", algorithm_names())
def test_length_limit_is_kept(target: HFTargetEngine, case: str):
    """Oracle 50. Limits below, at and above a round."""
    drafting = make_drafting(target, case)
    decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3)
    whole = decoder.plain(PROMPTS[2], 9).tokens
    for limit in (1, 2, 3, 4, 5, 9):
        assert decoder.speculative(PROMPTS[2], limit).tokens == whole[:limit]


@pytest.mark.parametrize("case", algorithm_names())
def test_samples_repeat_with_their_seed(target: HFTargetEngine, case: str):
    drafting = make_drafting(target, case)
    outputs = []
    for seed in (1, 1, 2):
        sampling = Sampling(1.0, torch.Generator().manual_seed(seed), top_k=5)
        decoder = SpeculativeDecoder(target, drafting.proposer, drafting.spec, 3, sampling=sampling)
        outputs.append([decoder.speculative(prompt, NUM_NEW).tokens for prompt in PROMPTS])
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize("case", algorithm_names())
def test_algorithms_that_draft_trees_are_named_where_others_are_refused(target: HFTargetEngine, case: str):
    if algorithm_type(case).__module__.startswith("specforge."):
        assert make_drafting(target, case).proposer.drafts_trees == (case in TREE_ALGORITHMS)


def test_decoder_refuses_a_tree_of_a_draft_that_has_none(target: HFTargetEngine):
    drafting = make_drafting(target, "mtp" if "mtp" in algorithm_names() else "dflash")
    with pytest.raises(ValueError, match="drafts no trees"):
        SpeculativeDecoder(target, drafting.proposer, CaptureSpec((), True), 2, tree=TREES[0])
