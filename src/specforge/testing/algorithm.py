"""The conformance suite of ``Algorithm``. An algorithm is done when it passes.

    class TestMyAlgorithm(AlgorithmSuite):
        def make_algorithm(self): return MyAlgorithm(MyOptions(...))

Choose options for the small target of :mod:`specforge.testing.samples`: 8 layers, hidden size 16, vocabulary 40.
Options that make the gradient depend on how samples are grouped are outside the contract.

Legend: K trained positions, l proposals of a round, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specforge.algorithms.base import (
    Algorithm,
    DraftModel,
    DraftRequest,
    Proposal,
    Proposer,
    Sampling,
    StepContext,
    StepOutput,
    TreeShape,
)
from specforge.contracts.batches import TrainBatch
from specforge.contracts.refs import Slot
from specforge.testing.algorithm_world import (
    CONTEXT,
    World,
    accumulate,
    assert_same_gradients,
    gradients,
    make_world,
    packed,
    step_gradients,
)
from specforge.testing.samples import SMALL_TARGET, Sample, pack

LENGTHS = (19, 7, 24, 1, 12, 3, 16, 9)
"""Tokens of the eight samples of a step: long ones, and some shorter than a block or an unroll."""

METRICS_ROUNDING = 1e-4


class AlgorithmSuite:
    """Inherit, name the class ``Test...`` and override ``make_algorithm``."""

    draws = False
    """Whether training draws at random, by a key of seed, epoch and sample (anchors, depths)."""

    initialised_at_random = True
    """Whether some weight of a fresh draft depends on the seed. ``False``: all come from the target."""

    def make_algorithm(self) -> Algorithm:
        """The algorithm with small options."""
        raise NotImplementedError

    @pytest.fixture
    def algorithm(self) -> Algorithm:
        return self.make_algorithm()

    @pytest.fixture
    def world(self, algorithm: Algorithm) -> World:
        return make_world(algorithm)

    @pytest.fixture
    def samples(self, world: World) -> list[Sample]:
        """The eight samples of a step; one has no supervision, one two answers."""
        samples = world.samples(LENGTHS)
        return [*samples[:4], samples[4].masked(), samples[5], samples[6].masked((2, 7), (9, 16)), samples[7]]

    # One optimizer step, however its samples are grouped

    @pytest.mark.parametrize("group_size", [1, 2, 4])
    def test_micro_batches_give_the_gradient_of_one_batch(
        self, world: World, samples: list[Sample], group_size: int
    ) -> None:
        expected = step_gradients(world, packed([samples]))
        groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
        assert_same_gradients(step_gradients(world, packed(groups)), expected)

    def test_the_order_of_packing_changes_no_gradient(self, world: World, samples: list[Sample]) -> None:
        expected = step_gradients(world, packed([samples]))
        shuffled = random.Random(3).sample(samples, len(samples))  # noqa: S311 - repeatable, not secret
        assert_same_gradients(step_gradients(world, packed([shuffled])), expected)
        assert_same_gradients(step_gradients(world, packed([shuffled[:5], shuffled[5:]])), expected)

    def test_trailing_tokens_without_loss_change_no_gradient(self, world: World, samples: list[Sample]) -> None:
        expected = step_gradients(world, packed([samples]))
        padded = [sample.padded(26 - len(sample)) for sample in samples]
        assert_same_gradients(step_gradients(world, packed([padded])), expected)
        assert_same_gradients(step_gradients(world, packed([padded[:4], padded[4:]])), expected)

    def test_empty_micro_batches_change_no_gradient(self, world: World, samples: list[Sample]) -> None:
        expected = step_gradients(world, packed([samples]))
        assert_same_gradients(step_gradients(world, [world.empty, *packed([samples]), world.empty]), expected)

    def test_metrics_are_the_same_sums_in_every_grouping(self, world: World, samples: list[Sample]) -> None:
        [whole] = outputs_of(world, packed([samples]))
        total = sum_of(outputs_of(world, [*packed([samples[:3], samples[3:4], samples[4:]]), world.empty]))
        assert total.keys() == sum_of([whole]).keys()
        for name, value in sum_of([whole]).items():
            assert total[name] == pytest.approx(value, rel=METRICS_ROUNDING, abs=1e-5), name

    def test_every_trainable_parameter_learns(self, world: World, samples: list[Sample]) -> None:
        for name, gradient in step_gradients(world, packed([samples])).items():
            assert bool(gradient.isfinite().all()), name
            assert bool((gradient != 0).any()), name

    # What a step is divided by

    def test_the_weight_is_known_before_any_forward(self, world: World, samples: list[Sample]) -> None:
        """It comes from masks and keyed draws: features are not there yet, and the draft does not matter."""
        batch = pack(samples)
        without = replace(batch, features={})
        weight = world.algorithm.supervised_weight(batch, CONTEXT)
        assert weight > 0.0
        assert world.algorithm.supervised_weight(without, CONTEXT) == weight

    def test_the_weight_is_the_sum_over_samples(self, world: World, samples: list[Sample]) -> None:
        alone = world.weight(packed([[sample] for sample in samples]))
        assert alone == pytest.approx(world.weight([pack(samples)]), rel=1e-6)
        assert world.weight([world.empty]) == world.weight([pack([samples[4]])]) == 0.0

    # Edges

    def test_a_batch_without_supervision_gives_zeros_that_reach_every_parameter(
        self, world: World, samples: list[Sample]
    ) -> None:
        """Collectives of a rank without supervision must match those of the others."""
        [full] = outputs_of(world, packed([samples]))
        for batch in (world.empty, pack([samples[4]]), pack([samples[3], samples[4], samples[0].masked()])):
            world.draft.zero_grad()
            [output] = accumulate(world, [batch], world.weight([batch]))
            assert float(output.loss_sum.detach()) == 0.0
            assert all(bool((gradient == 0).all()) for gradient in gradients(world).values())
            assert not any(sum_of([output]).values())
            assert sum_of([output]).keys() == sum_of([full]).keys()

    @pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize("supervised_from", [0, 1])
    def test_short_samples_are_trained_as_far_as_they_go(self, world: World, length: int, supervised_from: int) -> None:
        [sample] = world.samples([length])
        batch = pack([sample.masked((supervised_from, length))])
        world.draft.zero_grad()
        [output] = accumulate(world, [batch], world.weight([batch]))
        assert math.isfinite(float(output.loss_sum.detach()))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(world).values())
        check_counts(output)

    def test_counts_are_consistent(self, world: World, samples: list[Sample]) -> None:
        [output] = outputs_of(world, packed([samples]))
        check_counts(output)
        assert int(output.count[0]) > 0

    def test_evaluation_gives_the_numbers_of_training(self, world: World, samples: list[Sample]) -> None:
        trained = world.loss(pack(samples))
        with torch.no_grad():
            evaluated = world.loss(pack(samples))
        assert not evaluated.loss_sum.requires_grad
        assert torch.equal(trained.loss_sum.detach(), evaluated.loss_sum)
        assert sum_of([trained]) == sum_of([evaluated])

    def test_lower_precision_gives_finite_values(self, world: World, samples: list[Sample]) -> None:
        batch = pack(samples)
        expected = float(world.loss(batch).loss_sum.detach())
        world.draft.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = world.loss(batch)
        output.loss_sum.backward()
        assert output.loss_sum.dtype == torch.float32
        assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=0.1)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(world).values())
        stored = {name: tensor.to(torch.bfloat16) for name, tensor in batch.features.items()}
        loss = world.loss(replace(batch, features=stored)).loss_sum
        assert float(loss.detach()) == pytest.approx(expected, rel=0.1)

    # Blocks

    def test_training_calls_each_block(self, world: World, samples: list[Sample]) -> None:
        """Sharding, checkpointing and compilation work on calls; ranks with and without supervision make the same."""
        blocks, run_once = world.draft.training_blocks(), world.draft.blocks_run_once
        assert {id(block) for block in blocks} <= {id(module) for module in world.draft.modules()}
        for batch in [*packed([samples, [samples[3], samples[4]]]), world.empty]:
            calls = block_calls(world, batch)
            if run_once:
                assert calls == list(range(len(blocks)))
            elif world.weight([batch]):
                assert set(calls) == set(range(len(blocks)))

    def test_parameters_of_a_block_are_read_inside_it(self, world: World, samples: list[Sample]) -> None:
        """Elsewhere they are shards: here, tensors without values and of another type."""
        if not world.draft.blocks_run_once:
            return
        for batch in (pack(samples), world.empty):
            expected = step_gradients(world, [batch])
            world.draft.zero_grad()
            with parameters_only_inside_blocks(world.draft):
                accumulate(world, [batch], world.weight([batch]))
            found = gradients(world)
            assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())

    # Draws

    def test_draws_are_keyed_by_seed_epoch_and_sample(self, world: World, samples: list[Sample]) -> None:
        supervised = samples[2]
        alone = loss_of(world, [supervised])
        neighbours = [samples[0].masked(), supervised, samples[6].masked()]
        assert loss_of(world, neighbours) == pytest.approx(alone, rel=1e-5)
        same_epoch = replace(supervised, slot=Slot(0, 77))
        assert loss_of(world, [same_epoch]) == alone
        changed = [
            loss_of(world, [replace(supervised, slot=Slot(1, 2))]),
            loss_of(world, [supervised], replace(CONTEXT, seed=CONTEXT.seed + 1)),
            loss_of(world, [replace(supervised, name="other")]),
        ]
        if self.draws:
            assert all(loss != alone for loss in changed)
        else:
            assert changed == [alone] * 3

    def test_global_random_streams_are_left_alone(self, world: World, samples: list[Sample]) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = loss_of(world, samples)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert loss_of(world, samples) == first

    # The draft

    def test_a_fresh_draft_depends_on_its_seed_alone(self, world: World) -> None:
        torch.manual_seed(1)
        first = world.fresh(5).served_state()
        torch.manual_seed(2)
        again, other = world.fresh(5).served_state(), world.fresh(6).served_state()
        assert all(torch.equal(first[name], again[name]) for name in first)
        drawn = any(not torch.equal(first[name], other[name]) for name in first)
        assert drawn == self.initialised_at_random

    def test_matrices_over_the_vocabulary_are_named(self, algorithm: Algorithm) -> None:
        """An optimizer that orthogonalises matrices must leave them alone."""
        target = replace(SMALL_TARGET, vocab_size=59)
        draft = make_world(algorithm, target).draft
        over_ids = {name for name, p in draft.named_parameters() if p.ndim == 2 and target.vocab_size in p.shape}
        assert over_ids <= draft.vocabulary_tables()

    def test_a_served_state_makes_the_same_draft(self, world: World, samples: list[Sample]) -> None:
        state = world.draft.served_state()
        assert not any(tensor.requires_grad for tensor in state.values())
        loaded = world.fresh(9)
        loaded.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        twin = replace(world, draft=loaded)
        assert loss_of(twin, samples) == loss_of(world, samples)
        assert propose_at(world, samples[0], [18], 3).tokens == propose_at(twin, samples[0], [18], 3).tokens

    def test_the_config_survives_plain_data_and_counts_the_weights(self, world: World) -> None:
        config = world.config
        assert isinstance(config, world.algorithm.config_type)
        assert type(config).from_dict(config.to_dict()) == config
        assert world.algorithm.capture_spec(config, "float32") == world.spec
        assert config.num_parameters == sum(parameter.numel() for parameter in world.draft.parameters())

    # Proposals

    @pytest.mark.parametrize("cuts", [[1, 15], [4, 9, 10, 15], [14, 15], list(range(1, 16))])
    @pytest.mark.parametrize("in_between", [0, 3])
    def test_features_may_arrive_in_any_split(
        self, world: World, samples: list[Sample], cuts: list[int], in_between: int
    ) -> None:
        """What was proposed on the way is forgotten; a round may ask for nothing."""
        expected = propose_at(world, samples[0], [15], 3)
        assert propose_at(world, samples[0], cuts, 3, in_between).tokens == expected.tokens
        assert len(expected.tokens) > 0

    def test_a_reset_proposer_starts_again_with_the_drafts_weights(self, world: World, samples: list[Sample]) -> None:
        proposer = world.algorithm.proposer(world.draft, world.tables)
        advance(proposer, samples[0], [4, 12], 3)
        with torch.no_grad():
            for parameter in world.draft.parameters():
                parameter.mul_(1.5)
        proposer.reset()
        again = advance(proposer, samples[6], [9], 3)
        assert again.tokens == propose_at(world, samples[6], [9], 3).tokens

    def test_nothing_is_proposed_where_nothing_is_asked_for(self, world: World, samples: list[Sample]) -> None:
        assert propose_at(world, samples[0], [7], 0).tokens == ()
        sampled = propose_at(world, samples[0], [7], 0, sampling=sampling(0))
        assert sampled.tokens == ()

    @pytest.mark.parametrize("num_proposals", [1, 2, 3, 7])
    def test_proposals_are_ids_of_the_draft_vocabulary(
        self, world: World, samples: list[Sample], num_proposals: int
    ) -> None:
        known = range(world.target.vocab_size) if world.kept_ids is None else world.kept_ids.tolist()
        for sample in (samples[0], samples[2]):
            for request in (None, sampling(1)):
                proposal = propose_at(world, sample, [2, 11], num_proposals, sampling=request)
                assert len(proposal.tokens) <= num_proposals
                assert set(proposal.tokens) <= set(known)
                assert proposal.parents is None

    def test_longer_requests_continue_shorter_ones(self, world: World, samples: list[Sample]) -> None:
        chains = [propose_at(world, samples[2], [13], count).tokens for count in (1, 2, 3, 7)]
        for shorter, longer in pairwise(chains):
            assert longer[: len(shorter)] == shorter

    def test_drawn_proposals_carry_the_distributions_they_were_drawn_from(
        self, world: World, samples: list[Sample]
    ) -> None:
        for seed in range(5):
            proposal = propose_at(world, samples[2], [13], 3, sampling=sampling(seed))
            again = propose_at(world, samples[2], [13], 3, sampling=sampling(seed))
            assert proposal.tokens == again.tokens
            check_distributions(world, proposal)
        many = {propose_at(world, samples[2], [13], 1, sampling=sampling(seed)).tokens for seed in range(40)}
        assert len(many) > 1

    def test_drawing_at_no_temperature_is_greedy(self, world: World, samples: list[Sample]) -> None:
        greedy = propose_at(world, samples[2], [13], 3)
        cold = propose_at(world, samples[2], [13], 3, sampling=sampling(0, temperature=1e-6))
        top = propose_at(world, samples[2], [13], 3, sampling=sampling(0, top_k=1))
        assert greedy.tokens == cold.tokens == top.tokens
        assert greedy.probabilities is None

    def test_trees_are_well_formed(self, world: World, samples: list[Sample]) -> None:
        proposer = world.algorithm.proposer(world.draft, world.tables)
        if not proposer.drafts_trees:
            return
        request = DraftRequest(0, tree=TreeShape(top_k=3, depth=2, num_nodes=9))
        for cut in (5, 12):
            proposal = propose_to(proposer, samples[2], 0 if cut == 5 else 5, cut, request)
            check_tree(proposal, 9, 3)


def block_calls(world: World, batch: TrainBatch[Tensor]) -> list[int]:
    """Which of the draft's blocks training calls, in order."""
    calls: list[int] = []
    blocks = world.draft.training_blocks()
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
        for index, block in enumerate(blocks)
    ]
    try:
        world.loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def parameters_only_inside_blocks(draft: DraftModel) -> Iterator[None]:
    """While it runs, a block has its parameters in its own forward; outside they have neither values nor their type."""
    hooks: list[RemovableHandle] = []
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for block in draft.training_blocks():
        own = [
            (module, name, parameter)
            for module in block.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        hooks.append(block.register_forward_pre_hook(lambda *_, own=own: _put_back(own)))
        hooks.append(block.register_forward_hook(lambda *_, own=own: _take_away(own), always_call=True))
        places += own
    _take_away(places)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _put_back(places)


def _put_back(places: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, name, parameter in places:
        setattr(module, name, parameter)


def _take_away(places: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, name, parameter in places:
        nothing = torch.empty_like(parameter, device="meta", dtype=torch.float64)
        setattr(module, name, nn.Parameter(nothing, requires_grad=parameter.requires_grad))


def sampling(seed: int, temperature: float = 1.0, top_k: int | None = None) -> Sampling:
    return Sampling(temperature, torch.Generator().manual_seed(seed), top_k)


def outputs_of(world: World, batches: Sequence[TrainBatch[Tensor]]) -> list[StepOutput]:
    with torch.no_grad():
        return [world.loss(batch) for batch in batches]


def loss_of(world: World, samples: Sequence[Sample], context: StepContext = CONTEXT) -> float:
    with torch.no_grad():
        return float(world.loss(pack(samples), context).loss_sum)


def sum_of(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Every sum that the trainer adds up, by name."""
    total: dict[str, float] = {}
    for output in outputs:
        values: dict[str, Any] = {f"correct_{k}": value for k, value in enumerate(output.correct)}
        values |= {f"count_{k}": value for k, value in enumerate(output.count)}
        pairs: Mapping[str, tuple[Tensor, Tensor]] = output.metrics | {"run_length": output.runs.sums()}
        values |= {f"{name}[{i}]": value for name, pair in pairs.items() for i, value in enumerate(pair)}
        for name, value in values.items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def check_counts(output: StepOutput) -> None:
    """``correct <= count``, and run lengths between 1 and ``1 + K``."""
    assert output.correct.shape == output.count.shape
    assert output.loss_sum.shape == ()
    assert output.loss_sum.dtype == torch.float32
    assert bool((output.correct <= output.count).all())
    assert bool((output.correct >= 0).all())
    total, rows = (float(value) for value in output.runs.sums())
    assert rows <= total <= rows * (1 + len(output.count))
    assert total - rows <= float(output.correct.sum())
    assert all(math.isfinite(value) for value in sum_of([output]).values())


def propose_to(proposer: Proposer, sample: Sample, known: int, position: int, request: DraftRequest) -> Proposal:
    """A round whose committed tokens are those up to ``position``, after one with features of ``known`` positions."""
    features = {name: tensor[known:position] for name, tensor in sample.features.items()}
    return proposer.propose(sample.ids[: position + 1].tolist(), features, request)


def advance(
    proposer: Proposer,
    sample: Sample,
    cuts: Sequence[int],
    num_proposals: int,
    in_between: int = 0,
    sampling: Sampling | None = None,
) -> Proposal:
    """The last of a sequence of rounds at ``cuts``; the earlier ones ask for ``in_between`` tokens."""
    for known, position in pairwise((0, *cuts[:-1])):
        propose_to(proposer, sample, known, position, DraftRequest(in_between, sampling))
    known = cuts[-2] if len(cuts) > 1 else 0
    return propose_to(proposer, sample, known, cuts[-1], DraftRequest(num_proposals, sampling))


def propose_at(
    world: World,
    sample: Sample,
    cuts: Sequence[int],
    num_proposals: int,
    in_between: int = 0,
    sampling: Sampling | None = None,
) -> Proposal:
    """:func:`advance` with a new proposer."""
    proposer = world.algorithm.proposer(world.draft, world.tables)
    return advance(proposer, sample, cuts, num_proposals, in_between, sampling)


def check_distributions(world: World, proposal: Proposal) -> None:
    """fp32 rows over the whole target vocabulary that sum to 1 and are positive at the token that was drawn."""
    probabilities = proposal.probabilities
    assert probabilities is not None
    assert probabilities.dtype == torch.float32
    assert probabilities.shape == (len(proposal.tokens), world.target.vocab_size)
    assert bool((probabilities >= 0).all())
    assert bool(torch.isclose(probabilities.double().sum(-1), torch.ones(()).double(), atol=1e-5).all())
    assert all(float(row[token]) > 0 for row, token in zip(probabilities, proposal.tokens, strict=True))
    if world.kept_ids is not None:
        outside = torch.ones(world.target.vocab_size, dtype=torch.bool).index_fill(0, world.kept_ids, False)
        assert not bool(probabilities[:, outside].any())


def check_tree(proposal: Proposal, num_nodes: int, top_k: int) -> None:
    """Parents before children, no two equal siblings, no more children than ``top_k``."""
    parents = proposal.parents
    assert parents is not None
    assert len(parents) == len(proposal.tokens) <= num_nodes - 1
    assert proposal.probabilities is None
    children: dict[int, list[int]] = {}
    for node, (token, parent) in enumerate(zip(proposal.tokens, parents, strict=True)):
        assert -1 <= parent < node
        children.setdefault(parent, []).append(token)
    assert all(len(set(tokens)) == len(tokens) <= top_k for tokens in children.values())
