"""Domino: labels, the corrected loss, its schedule, and drafting."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from specforge.algorithms.base import DraftRequest, Sampling, StepContext, target_logits
from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.algorithms.domino import loss as losses_of_domino
from specforge.algorithms.domino import proposer as domino_proposer
from specforge.algorithms.domino.features import lambda_base
from specforge.algorithms.parts import losses
from specforge.algorithms.parts.blocks import block_output, sample_blocks
from specforge.algorithms.parts.sampling import distribution
from specforge.testing.algorithm_world import make_world
from specforge.testing.samples import pack

SMALL = {
    "name": "domino",
    "num_layers": 1,
    "block_size": 4,
    "num_anchors": 5,
    "aux_layers": (1, 3),
    "emb_dim": 6,
    "gru_hidden_dim": 5,
}
ALL_BASE, HALF, ALL_FINAL = StepContext(0, 8, 5), StepContext(2, 8, 5), StepContext(8, 8, 5)


def world_of(**options):
    return make_world(get_algorithm(options_of({**SMALL, **options})))


def batch_of(world):
    """Documents with a hole in the loss mask and blocks that reach over their ends."""
    first, second = world.samples((13, 9))
    return pack([first.masked((2, 7), (9, 13)), second])


def written_out(world, batch, context, gamma):
    """Sums of the weighted losses (final, base) and of the weights, slot by slot."""
    draft, options, tables = world.draft, world.algorithm.options, world.tables
    blocks = sample_blocks(batch, context, options.block_size, options.num_anchors)
    states = draft.block_states(tables, batch, blocks).unflatten(0, (-1, options.block_size))
    first = 0 if options.shift_label else 1
    final_sum = base_sum = weight_sum = 0.0
    for block, (anchor, end) in enumerate(zip(blocks.anchors.tolist(), blocks.ends.tolist(), strict=True)):
        for k in range(first, options.block_size):
            label = anchor + k + 1 - first
            if label >= end or not batch.loss_mask[label]:
                continue
            hidden = states[block, k]
            base = tables.lm_head @ hidden
            final = base
            if k - first >= options.pure_draft_prefix_len:
                seen = tables.embed_tokens[batch.input_ids[anchor : anchor + k + 1 - first]]
                state = draft.prefix_gru(seen[None])[0][0, -1]
                final = base + draft.embed_proj(torch.cat((hidden, state)))
            weight = math.exp(-(k - first) / gamma)
            target = batch.input_ids[label]
            final_sum = final_sum + weight * F.cross_entropy(final, target)
            base_sum = base_sum + weight * F.cross_entropy(base, target)
            weight_sum += weight
    return final_sum, base_sum, weight_sum


@pytest.mark.parametrize("shift_label", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_loss_and_gradients_equal_the_slots_written_out(shift_label, prefix):
    world = world_of(shift_label=shift_label, pure_draft_prefix_len=prefix, gamma=3.0)
    batch, parameters = batch_of(world), list(world.draft.parameters())
    final, base, weight = written_out(world, batch, HALF, 3.0)
    expected = 0.5 * final + 0.5 * base
    output = world.loss(batch, HALF)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    assert world.weight([batch], HALF) == pytest.approx(weight, rel=1e-6)
    torch.testing.assert_close(output.metrics["final_loss"][0], final.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.metrics["base_loss"][0], base.detach(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(output.loss_sum, parameters)
    for mine, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_weight_of_the_base_follows_completed_optimizer_steps():
    """Oracle 31. Linear to 0 over a share of the steps, clamped, 0 without a horizon, equal for micro-batches."""

    def at(step, total, start=1.0, ratio=0.5):
        return lambda_base(StepContext(step, total, 0), start, ratio)

    assert [at(step, 100) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert [at(step, 1) for step in (0, 1)] == [1.0, 0.0]
    assert [at(step, 100, start=1.5) for step in (0, 10, 25)] == [1.0, 1.0, 0.75]
    assert [at(step, 7) for step in (1, 3)] == [pytest.approx(2 / 3), 0.0]
    assert at(0, 0) == at(3, 0) == at(0, -1) == 0.0
    world = world_of()
    for sample in world.samples((9, 12)):
        value, total = world.loss(pack([sample]), HALF).metrics["lambda_base"]
        assert float(value / total) == 0.5


def test_only_the_base_is_trained_at_the_first_step():
    """Oracle 32. Gradients of the correction are exactly 0; the loss is the cross entropy of the next-token layout."""
    world = world_of()
    batch = batch_of(world)
    _, base, _ = written_out(world, batch, ALL_BASE, 4.0)
    output = world.loss(batch, ALL_BASE)
    output.loss_sum.backward()
    torch.testing.assert_close(output.loss_sum, base, rtol=1e-5, atol=1e-5)
    for name, parameter in world.draft.named_parameters():
        correction = name.startswith(("prefix_gru", "embed_proj"))
        assert correction == (not parameter.grad.any()), name


def test_without_a_correction_final_and_base_are_equal():
    """Oracle 33."""
    world = world_of()
    world.draft.embed_proj[2].weight.data.zero_()
    output = world.loss(batch_of(world), HALF)
    assert torch.equal(output.metrics["final_loss"][0], output.metrics["base_loss"][0])
    assert output.metrics["base_accuracy"][0] == output.correct.sum()
    assert torch.equal(torch.stack(output.metrics["base_run_length"]), torch.stack(output.runs.sums()))


def test_the_base_does_not_contribute_at_the_last_step():
    world = world_of()
    batch = batch_of(world)
    final, _, _ = written_out(world, batch, ALL_FINAL, 4.0)
    torch.testing.assert_close(world.loss(batch, ALL_FINAL).loss_sum, final, rtol=1e-5, atol=1e-5)


def test_the_gru_is_the_published_cell_and_steps_as_it_trains():
    """Oracle 34."""
    draft = world_of().draft
    tokens = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    found = draft.prefix_states(tokens)
    for block in range(3):
        state, kept = torch.zeros(5), None
        for k in range(4):
            reset_in, update_in, new_in = (draft.prefix_gru.weight_ih_l0 @ tokens[block, k]).chunk(3)
            reset_by, update_by, new_by = (draft.prefix_gru.weight_hh_l0 @ state).chunk(3)
            reset, update = torch.sigmoid(reset_in + reset_by), torch.sigmoid(update_in + update_by)
            state = (1 - update) * torch.tanh(new_in + reset * new_by) + update * state
            kept = draft.advance(tokens[block, k], kept)
            torch.testing.assert_close(found[block, k], state, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(kept, state, rtol=1e-5, atol=1e-6)


def forced(monkeypatch, tokens):
    """The proposer drafts ``tokens`` whatever its logits are; returns the list that collects those."""
    seen, left = [], iter(tokens)

    def choose(logits, sampling):
        seen.append(logits)
        return next(left), None if sampling is None else distribution(logits, sampling)

    monkeypatch.setattr(domino_proposer, "choose", choose)
    return seen


@pytest.mark.parametrize("shift_label", [True, False])
def test_teacher_forced_logits_are_those_of_incremental_drafting(monkeypatch, shift_label):
    """Oracle 35. Of one block, and given the same tokens."""
    world = world_of(shift_label=shift_label, num_layers=2)
    [sample] = world.samples((12,))
    anchor, size, draft = 6, 4, world.draft
    batch = pack([sample.masked((anchor, anchor + 2))])
    blocks = sample_blocks(batch, HALF, size, 5)
    assert blocks.anchors.tolist() == [anchor]
    states = draft.block_states(world.tables, batch, blocks)
    first = 0 if shift_label else 1
    drafted = sample.ids[anchor + 1 : anchor + size].tolist()
    seen = forced(monkeypatch, drafted)
    features = {"aux": sample.features["aux"][:anchor]}
    request = DraftRequest(size, Sampling(0.7, torch.Generator().manual_seed(0)))
    proposal = world.algorithm.proposer(draft, world.tables).propose(
        sample.ids[: anchor + 1].tolist(), features, request
    )
    gru = draft.prefix_states(world.tables.embed_tokens[sample.ids[None, anchor : anchor + size]])[0]
    assert proposal.tokens == tuple(drafted)
    for place, logits in enumerate(seen):
        hidden = states[place + first]
        expected = target_logits(world.tables, hidden)
        if place >= 1:
            expected = expected + draft.embed_proj(torch.cat((hidden, gru[place])))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(proposal.probabilities[place], distribution(logits, request.sampling))


def test_a_round_drafts_at_most_a_block_less_one_and_keeps_the_context_of_an_empty_one():
    world = world_of()
    [sample] = world.samples((12,))
    ids, aux = sample.ids.tolist(), sample.features["aux"]
    proposer, fresh = (world.algorithm.proposer(world.draft, world.tables) for _ in range(2))
    assert proposer.propose(ids[:5], {"aux": aux[:4]}, DraftRequest(0)).tokens == ()
    whole = proposer.propose(ids[:8], {"aux": aux[4:7]}, DraftRequest(9)).tokens
    assert len(whole) == 3
    assert fresh.propose(ids[:8], {"aux": aux[:7]}, DraftRequest(2)).tokens == whole[:2]
    proposer.reset()
    assert proposer.propose(ids[:8], {"aux": aux[:7]}, DraftRequest(3)).tokens == whole
    with pytest.raises(ValueError, match="need features of 9 positions, got 8"):
        proposer.propose(ids[:10], {"aux": aux[7:8]}, DraftRequest(3))


def test_loss_does_not_depend_on_the_size_of_a_chunk(monkeypatch):
    world = world_of()
    batch = batch_of(world)
    whole = world.loss(batch, HALF)
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", 3)
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 0)
    chunked = world.loss(batch, HALF)
    torch.testing.assert_close(chunked.loss_sum, whole.loss_sum, rtol=1e-6, atol=1e-6)
    assert torch.equal(chunked.correct, whole.correct)


def test_logits_of_a_softcapped_and_scaled_target_are_reproduced():
    world = world_of(pure_draft_prefix_len=0)
    world = replace(world, tables=replace(world.tables, logit_softcap=5.0, logit_scale=0.5))
    batch, parameters = batch_of(world), list(world.draft.parameters())
    blocks = sample_blocks(batch, ALL_FINAL, 4, 5)
    hidden = world.draft.block_states(world.tables, batch, blocks).unflatten(0, (-1, 4))[:, 0]
    embedded = world.tables.embed_tokens[batch.input_ids[blocks.anchors]]
    states = world.draft.prefix_states(embedded[:, None])[:, 0]
    logits = target_logits(world.tables, hidden) + world.draft.embed_proj(torch.cat((hidden, states), dim=-1))
    expected = F.cross_entropy(logits, batch.input_ids[blocks.anchors + 1], reduction="sum")
    # at this gamma the other slots weigh nothing
    narrow = get_algorithm(options_of({**SMALL, "pure_draft_prefix_len": 0, "gamma": 0.01}))
    loss = replace(world, algorithm=narrow).loss(batch, ALL_FINAL).loss_sum
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_draft_has_the_served_names_and_as_many_parameters_as_its_config_says():
    draft = world_of().draft
    added = {name: tuple(p.shape) for name, p in draft.served_state().items() if name.startswith(("prefix", "embed"))}
    assert added == {
        "prefix_gru.weight_ih_l0": (15, 16),
        "prefix_gru.weight_hh_l0": (15, 5),
        "embed_proj.0.weight": (6, 21),
        "embed_proj.2.weight": (40, 6),
    }
    assert sum(p.numel() for p in draft.parameters()) == draft.config.num_parameters


def test_a_fresh_gru_is_uniform_in_its_published_bound():
    world = world_of(gru_hidden_dim=64)
    weights = torch.cat([p.detach().flatten() for p in world.fresh(3).prefix_gru.parameters()])
    assert float(weights.abs().max()) <= 1 / 8
    assert float(weights.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)


def test_a_block_without_any_corrected_proposal_is_refused():
    with pytest.raises(ValidationError, match="pure_draft_prefix_len is 3: no proposal of a block of 4 is corrected"):
        options_of({**SMALL, "pure_draft_prefix_len": 3})


def test_runs_are_no_longer_than_what_is_drafted(monkeypatch):
    """The last slot is trained and never drafts: a draft that is always right is as long as its proposals."""
    world = world_of()
    monkeypatch.setattr(losses_of_domino, "block_output", always_right)
    output = world.loss(batch_of(world))
    num_proposals = world.config.num_proposals
    assert output.correct.numel() == output.count.numel() == num_proposals == world.config.block_size - 1
    assert int(output.runs.lengths.max()) == num_proposals


def always_right(blocks, correct, valid):
    return block_output(blocks, torch.ones_like(correct), valid)
