"""EAGLE-3 and DFlash on ranks that split the rows of every sample, against one process."""

import contextlib
import os
from dataclasses import replace

import pytest
import torch
from children import child_process
from rank_training import PRELOAD, Training, train, train_on
from test_trainer_ranks import assert_same_training

from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.testing.algorithm_world import BLOCK_DRAFT, CONTEXT, gradients, make_world, packed
from specforge.training.blocks import checkpoint_activations
from specforge.training.metrics import StepSums
from specforge.training.ranks import Ranks, Rendezvous

CASES = ("eagle3", "eagle3-norms", "eagle3-sample_mean", "eagle3-mla", "dflash", "dflash-dpace", "dflash-sliding")


@pytest.fixture(scope="module")
def alone():
    """Fifty steps of every case in one process."""
    return {case: train(Ranks(), Training(case)) for case in CASES}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same on one sequence group of two ranks, by case: the records of both."""
    trainings = [Training(case, sequence_size=2) for case in CASES]
    return dict(zip(CASES, train_on(2, tmp_path_factory.mktemp("two"), trainings), strict=True))


@pytest.fixture(scope="module")
def by_four(tmp_path_factory):
    """The same on two sequence groups of two ranks."""
    trainings = [Training(case, sequence_size=2) for case in CASES]
    return dict(zip(CASES, train_on(4, tmp_path_factory.mktemp("four"), trainings), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_split_every_sample_train_as_one_process_does(together, alone, case):
    assert_same_training(together[case], alone[case])


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_two_groups_of_two_ranks_train_as_one_process_does(by_four, alone, case):
    assert_same_training(by_four[case], alone[case])


BATCHES = {
    "several_documents": lambda world: packed([world.samples((9, 3, 14, 12))])[0],
    "one_row": lambda world: packed([[world.samples((9,))[0].masked((5, 7))]])[0],
    "nothing_supervised": lambda world: packed([[sample.masked() for sample in world.samples((9, 5))]])[0],
    "no_tokens": lambda world: world.empty,
    "long": lambda world: packed([[world.samples((240,))[0].masked((80, 240))]])[0],
}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4}
ALGORITHMS = {
    "eagle3": {"name": "eagle3", "ttt_steps": 3, "draft_vocab_size": 24, **WIDE},
    "eagle3-lk_batch": {"name": "eagle3", "ttt_steps": 3, "loss": "lk_batch", **WIDE},
    "dflash": {"name": "dflash", **BLOCK_DRAFT, "num_anchors": 60, **WIDE},
    "dflash-dpace": {"name": "dflash", **BLOCK_DRAFT, "num_anchors": 60, "loss_type": "dpace", **WIDE},
}


def contribution(algorithm, kind, share, *, checkpointed=False):
    """(sums, gradients, bytes kept for the backward) of one micro-batch; with a ``share``, this rank's part of it."""
    world = make_world(get_algorithm(options_of(ALGORITHMS[algorithm])))
    if checkpointed:
        checkpoint_activations(world.draft)
    batch = BATCHES[kind](world)
    leaves = [*world.draft.parameters(), world.tables.embed_tokens, world.tables.lm_head, *batch.features.values()]
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = world.loss(batch, replace(CONTEXT, sequence=share))
    output.loss_sum.backward()
    sums = StepSums()
    sums.add(output)
    return sums, {name: gradient.numpy() for name, gradient in gradients(world).items()}, sum(kept.values())


def _contribute(pipe, rank, size, rendezvous, calls):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = Ranks.join(Rendezvous(f"file://{rendezvous}", rank, size), sequence_size=size)
    share = SequenceShare(ranks.sequence_rank, size, ranks.sequence_group)
    for algorithm, kind, checkpointed in calls:
        pipe.send(contribution(algorithm, kind, share, checkpointed=checkpointed))
    pipe.send(_exchange(share))
    ranks.leave()


def _exchange(share):
    """Seven rows of eight heads to heads and back, and the gradients of a product of what arrives with a tensor."""
    generator = torch.Generator().manual_seed(3)
    whole, factor = torch.randn(2, 7, 8, 3, generator=generator)
    rows = whole[share.rows(7)].clone().requires_grad_()
    heads = share.to_heads(rows, 7)
    back = share.to_rows(heads)
    width = 8 // share.size
    (heads * factor[:, share.rank * width : (share.rank + 1) * width]).sum().backward()
    sent = heads.detach().clone().requires_grad_()
    (share.to_rows(sent) * factor[share.rows(7)]).sum().backward()
    return tuple(tensor.detach().numpy() for tensor in (whole, factor, heads, back, rows.grad, sent.grad))


def contributions(size, directory, calls):
    """What every rank of one group contributes to each of ``calls``, then what :func:`_exchange` gives on it."""
    with contextlib.ExitStack() as stack:
        pipes = [
            stack.enter_context(
                child_process(_contribute, rank, size, directory / f"meet-{size}", calls, preload=PRELOAD)
            )[1]
            for rank in range(size)
        ]
        return [[_received(pipe) for pipe in pipes] for _ in range(len(calls) + 1)]


def _received(pipe):
    assert pipe.poll(240), "a rank never finished"
    return pipe.recv()


CALLS = [(algorithm, kind, False) for algorithm in ALGORITHMS for kind in BATCHES]
CALLS += [(algorithm, "several_documents", True) for algorithm in ("eagle3", "dflash")]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def group(request, tmp_path_factory):
    """(size, contributions by call, exchanged rows) of one group."""
    *found, exchanged = contributions(request.param, tmp_path_factory.mktemp("group"), CALLS)
    return request.param, dict(zip(CALLS, found, strict=True)), exchanged


@pytest.mark.parametrize(("algorithm", "kind", "checkpointed"), CALLS)
def test_the_contributions_of_a_group_are_those_of_the_whole_batch(group, algorithm, kind, checkpointed):
    _, found, _ = group
    expected_sums, expected, _ = contribution(algorithm, kind, None)
    total = StepSums()
    for sums, _, _ in found[algorithm, kind, checkpointed]:
        total.merge(sums)
    assert (total.count, total.correct) == (expected_sums.count, expected_sums.correct)
    assert total.run_length == expected_sums.run_length
    assert total.values() == pytest.approx(expected_sums.values(), rel=1e-5, abs=1e-6)
    parts = [own for _, own, _ in found[algorithm, kind, checkpointed]]
    summed = {name: sum(torch.from_numpy(own[name]) for own in parts) for name in expected}
    norm = sum(float(torch.from_numpy(value).double().square().sum()) for value in expected.values()) ** 0.5
    off = sum(float((summed[k].double() - torch.from_numpy(v)).square().sum()) for k, v in expected.items()) ** 0.5
    assert off <= 1e-6 * norm, (off, norm)
    assert (norm > 0) == (kind not in {"nothing_supervised", "no_tokens"})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_kept_for_the_backward_of_a_long_sample_falls_with_the_group(group, algorithm):
    size, found, _ = group
    _, _, whole = contribution(algorithm, "long", None)
    largest = max(kept for _, _, kept in found[algorithm, "long", False])
    assert largest < (0.65 if size == 2 else 0.4) * whole


def test_rows_go_to_the_ranks_of_their_heads_and_back_with_their_gradients(group):
    size, _, exchanged = group
    width = 8 // size
    for rank, (whole, factor, heads, back, grad_rows, grad_heads) in enumerate(exchanged):
        own_heads, own_rows = slice(rank * width, (rank + 1) * width), SequenceShare(rank, size).rows(7)
        assert (heads == whole[:, own_heads]).all()
        assert (back == whole[own_rows]).all()
        assert (grad_rows == factor[own_rows]).all()
        assert (grad_heads == factor[:, own_heads]).all()
