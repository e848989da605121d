"""DSpark: labels, the three terms of the loss, the heads, and drafting."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from specforge.algorithms.base import DraftRequest, Sampling, target_logits
from specforge.algorithms.catalog import get_algorithm, options_of
from specforge.algorithms.dspark import proposer as dspark_proposer
from specforge.algorithms.dspark.features import label_slots
from specforge.algorithms.dspark.loss import LossWeights, TextAndTeacher, dspark_loss
from specforge.algorithms.parts.blocks import Blocks, sample_blocks
from specforge.algorithms.parts.losses import Teacher, fused_loss, target_head
from specforge.algorithms.parts.sampling import distribution
from specforge.evaluation.speculative import SpeculativeDecoder
from specforge.inference.huggingface import HFTargetEngine
from specforge.testing.algorithm_world import CONTEXT, make_world
from specforge.testing.samples import pack

SMALL = {
    "name": "dspark",
    "num_layers": 1,
    "block_size": 4,
    "num_anchors": 5,
    "aux_layers": (1, 3),
    "markov_rank": 5,
}
PLAIN = {"markov_rank": 0, "enable_confidence_head": False}
HEADS = ["vanilla", "gated", "rnn"]


def world_of(**options):
    return make_world(get_algorithm(options_of({**SMALL, **options})))


def batch_of(world):
    """Documents with a hole in the loss mask and blocks that reach over their ends."""
    first, second = world.samples((13, 9))
    return pack([first.masked((2, 7), (8, 13)), second])


def labels_of(world, batch):
    options = world.algorithm.options
    blocks = sample_blocks(batch, CONTEXT, options.block_size, options.num_anchors)
    return label_slots(batch, blocks, options.slot_weights(options.block_size))


def markov_inputs(draft, hidden, previous):
    """What the bias is made of, [b, r], along one block: ``hidden`` [b, H], ``previous`` token ids [b]."""
    head, state, found = draft.markov_head, torch.zeros(5), []
    for h, e in zip(hidden, head.markov_w1.weight[previous], strict=True):
        if draft.config.markov_head_type == "vanilla":
            found.append(e)
        elif draft.config.markov_head_type == "gated":
            found.append(torch.sigmoid(head.gate_proj(torch.cat((h, e)))) * e)
        else:
            gate, candidate, output = head.joint_proj(torch.cat((state, e, h))).chunk(3)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            found.append(torch.tanh(output))
    return torch.stack(found)


def written_out(world, batch, factors, gamma):
    """The weighted sum of the losses and that of the weights, slot by slot, each block cut at its first gap."""
    draft, tables, options = world.draft, world.tables, world.algorithm.options
    blocks = sample_blocks(batch, CONTEXT, options.block_size, options.num_anchors)
    states = draft.slot_outputs(tables, batch, labels_of(world, batch)).hidden
    total, weight_sum = 0.0, 0.0
    for block, (anchor, end) in enumerate(zip(blocks.anchors.tolist(), blocks.ends.tolist(), strict=True)):
        reach = torch.arange(anchor, anchor + options.block_size).clamp(max=end - 1)
        bias = draft.markov_head.markov_w2(markov_inputs(draft, states[block], batch.input_ids[reach]))
        for k in range(options.block_size):
            label = anchor + k + 1
            if label >= end or not batch.loss_mask[label]:
                break
            hidden, token = states[block, k], batch.input_ids[anchor + k]
            logits = tables.lm_head @ hidden + bias[k]
            teacher = torch.softmax(tables.lm_head @ batch.features["last"][anchor + k], -1)
            l1 = (torch.softmax(logits, -1) - teacher).abs().sum()
            heard = torch.cat((hidden, draft.markov_head.markov_w1.weight[token]))
            if not options.confidence_head_with_markov:
                heard = hidden
            likely = (1 - l1 / 2).clamp(0, 1).detach()
            entropy = F.binary_cross_entropy_with_logits(draft.confidence_head.proj(heard)[0], likely)
            weight = math.exp(-k / gamma)
            terms = (F.cross_entropy(logits, batch.input_ids[label]), l1, entropy)
            total = total + weight * sum(factor * term for factor, term in zip(factors, terms, strict=True))
            weight_sum += weight
    return total, weight_sum


@pytest.mark.parametrize("reads_token", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_the_slots_written_out(head, reads_token):
    factors = (0.3, 0.8, 0.7)
    names = dict(zip(("ce_weight", "l1_weight", "confidence_weight"), factors, strict=True))
    world = world_of(markov_head_type=head, confidence_head_with_markov=reads_token, gamma=3.0, **names)
    batch, parameters = batch_of(world), list(world.draft.parameters())
    expected, weight = written_out(world, batch, factors, 3.0)
    output = world.loss(batch)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    assert world.weight([batch]) == pytest.approx(weight, rel=1e-6)
    found = torch.autograd.grad(output.loss_sum, parameters)
    for mine, theirs in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_draft_without_a_bias_predicts_like_one_whose_bias_is_zero():
    """Oracle 36. Both are the backbone alone in the next-token layout."""
    world = world_of(confidence_weight=0.0)
    world.draft.markov_head.markov_w2.weight.data.zero_()
    plain = world_of(**PLAIN)
    plain.draft.load_state_dict({name: world.draft.state_dict()[name] for name in plain.draft.state_dict()})
    batch = batch_of(world)
    torch.testing.assert_close(plain.loss(batch).loss_sum, world.loss(batch).loss_sum, rtol=1e-6, atol=1e-6)
    only_text = replace(world, algorithm=get_algorithm(options_of({**SMALL, "l1_weight": 0.0, "ce_weight": 1.0})))
    labels = labels_of(world, batch)
    hidden = world.draft.slot_outputs(world.tables, batch, labels).hidden
    entropy = F.cross_entropy(
        (hidden @ world.tables.lm_head.T).flatten(0, 1), batch.input_ids[labels.tokens].flatten(), reduction="none"
    )
    value, _ = only_text.loss(batch).metrics["ce_loss"]
    torch.testing.assert_close(value, (entropy * labels.weights.flatten()).sum().detach(), rtol=1e-5, atol=1e-5)


def distance(world, hidden, last):
    """The objective with L1 alone after a pass over rows ``hidden`` with teachers ``last``, and its loss."""
    rows = torch.arange(len(hidden))
    everything = torch.ones(world.target.vocab_size, dtype=torch.bool)
    teacher = Teacher(world.tables, last, torch.ones(len(last), dtype=torch.bool), everything)
    factors = LossWeights(0.0, 1.0, 0.0)
    objective = TextAndTeacher(rows.clone(), torch.ones(len(rows)), factors, teacher, rows)
    return objective, fused_loss([target_head(world.tables, hidden)], objective)


def test_l1_is_twice_the_total_variation_and_vanishes_for_the_teacher_itself():
    """Oracle 37. For p = q it is 0, the acceptance 1, and nothing pulls."""
    world = world_of()
    last, hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    objective, loss = distance(world, hidden, last)
    p, q = (torch.softmax(states @ world.tables.lm_head.T, -1) for states in (last, hidden))
    overlap = torch.minimum(p, q).sum(-1)
    torch.testing.assert_close(objective.l1, 2 * (1 - overlap), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.acceptance, overlap, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, objective.l1.sum())
    same = last.clone().requires_grad_()
    objective, loss = distance(world, same, last)
    loss.backward()
    assert not objective.l1.any()
    assert not same.grad.any()
    assert bool((objective.acceptance == 1).all())


def test_weights_stop_at_the_first_slot_without_a_label():
    """Oracle 38. A later label does not count again."""
    world = world_of(block_size=6, gamma="uniform")
    [sample] = world.samples((12,))
    batch = pack([sample.masked((2, 5), (6, 12))])
    blocks = Blocks.at(torch.tensor([2, 3, 7, 9]), batch, 6)
    weights = label_slots(batch, blocks, (1.0,) * 6).weights
    assert weights.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
    ]
    assert bool((weights[:, 1:] <= weights[:, :-1]).all())


def draft_with(world, threshold, ids, aux, count=9):
    options = options_of({**SMALL, "confidence_threshold": threshold})
    proposer = get_algorithm(options).proposer(world.draft, world.tables)
    proposal = proposer.propose(ids, {"aux": aux}, DraftRequest(count))
    return proposal.tokens, proposer.confidences


def test_a_threshold_cuts_a_round_before_the_first_proposal_that_is_too_unsure():
    """Oracle 39. At 0 a whole block, at 1 nothing even for saturated logits, in between a prefix of the same tokens."""
    world = world_of()
    [sample] = world.samples((12,))
    ids, aux = sample.ids[:9].tolist(), sample.features["aux"][:8]
    whole, logits = draft_with(world, 0.0, ids, aux)
    assert len(whole) == len(logits) == 4
    sure = torch.sigmoid(torch.tensor(logits, dtype=torch.float64)).tolist()
    for threshold in (0.1, 0.3, 0.5, 0.7, *(value + 1e-4 for value in sure), *(value - 1e-4 for value in sure)):
        kept = next((k for k, value in enumerate(sure) if value < threshold), 4)
        tokens, confidences = draft_with(world, threshold, ids, aux)
        assert tokens == whole[:kept]
        assert confidences == logits[: kept + 1]
    world.draft.confidence_head.proj.bias.data.fill_(1000.0)
    assert draft_with(world, 1.0, ids, aux)[0] == ()
    assert draft_with(world, 0.999, ids, aux)[0] == whole


def test_no_threshold_changes_the_greedy_output(tiny_target_dir):
    """Oracle 39. Rounds get shorter, the text stays that of plain decoding."""
    engine, found = HFTargetEngine(tiny_target_dir), {}
    for threshold in (0.0, 0.5, 1.0):
        options = options_of({**SMALL, "aux_layers": (1, 4), "confidence_threshold": threshold})
        world = make_world(get_algorithm(options), engine.info)
        proposer = world.algorithm.proposer(world.draft, engine.tables)
        report = SpeculativeDecoder(engine, proposer, world.spec, 4).evaluate([[5, 9, 40, 7], [8, 8, 100]], 10)
        assert report.lossless
        found[threshold] = [row.speculative_tokens for row in report.prompts], report.accepted_length_mean
    assert found[0.0][0] == found[0.5][0] == found[1.0][0]
    assert found[1.0][1] == 1.0


@pytest.mark.parametrize("head", HEADS)
def test_the_state_of_a_block_does_not_reach_another(head):
    """Oracle 40. Neither in a pack, whatever the other blocks are, nor from one round to the next."""
    world = world_of(markov_head_type=head)
    generator = torch.Generator().manual_seed(0)
    hidden, previous = torch.randn(3, 4, 16, generator=generator), torch.randn(3, 4, 5, generator=generator)
    together = world.draft.markov_head.inputs(hidden, previous)
    for block in range(3):
        alone = world.draft.markov_head.inputs(hidden[block : block + 1], previous[block : block + 1])
        torch.testing.assert_close(together[block : block + 1], alone, rtol=1e-5, atol=1e-6)
    [sample] = world.samples((12,))
    ids, aux = sample.ids.tolist(), sample.features["aux"]
    proposer, fresh = (world.algorithm.proposer(world.draft, world.tables) for _ in range(2))
    proposer.propose(ids[:6], {"aux": aux[:5]}, DraftRequest(4))
    later = proposer.propose(ids[:9], {"aux": aux[5:8]}, DraftRequest(4)).tokens
    assert later == fresh.propose(ids[:9], {"aux": aux[:8]}, DraftRequest(4)).tokens


@pytest.mark.parametrize("head", HEADS)
def test_teacher_forced_logits_are_those_of_incremental_drafting(monkeypatch, head):
    """Oracle 35. Of one block, and given the same tokens; confidences too."""
    world = world_of(markov_head_type=head, num_layers=2)
    [sample] = world.samples((12,))
    anchor, seen = 6, []
    batch = pack([sample.masked((anchor, anchor + 2))])
    labels = labels_of(world, batch)
    assert labels.blocks.anchors.tolist() == [anchor]
    outputs = world.draft.slot_outputs(world.tables, batch, labels)
    expected = target_logits(world.tables, outputs.hidden[0]) + world.draft.markov_head.markov_w2(outputs.markov[0])
    drafted = sample.ids[anchor + 1 : anchor + 5].tolist()
    left = iter(drafted)

    def choose(logits, sampling):
        seen.append(logits)
        return next(left), distribution(logits, sampling)

    monkeypatch.setattr(dspark_proposer, "choose", choose)
    proposer = world.algorithm.proposer(world.draft, world.tables)
    request = DraftRequest(9, Sampling(0.7, torch.Generator().manual_seed(0)))
    features = {"aux": sample.features["aux"][:anchor]}
    proposal = proposer.propose(sample.ids[: anchor + 1].tolist(), features, request)
    assert proposal.tokens == tuple(drafted)
    torch.testing.assert_close(torch.stack(seen), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(proposer.confidences), outputs.confidence[0].detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(proposal.probabilities, distribution(torch.stack(seen), request.sampling))


def test_the_teacher_is_captured_only_where_a_term_needs_it():
    needs = {"l1_weight": 0.0, "confidence_weight": 1.0}, {"l1_weight": 0.9, "confidence_weight": 0.0}
    assert all(world_of(**options).spec.last_hidden for options in needs)
    headless = {"l1_weight": 0.0, "enable_confidence_head": False}
    for options in ({"l1_weight": 0.0, "confidence_weight": 0.0}, headless):
        world = world_of(**options)
        assert not world.spec.last_hidden
        batch = batch_of(world)
        assert set(batch.features) == {"aux"}
        output = world.loss(batch)
        output.loss_sum.backward()
        assert set(output.metrics) == {"ce_loss"}


def test_confidence_teaches_the_backbone_and_the_token_table_but_not_its_own_target():
    world = world_of()
    batch = batch_of(world)
    output = dspark_loss(
        world.draft, world.tables, batch, labels_of(world, batch), LossWeights(0.0, 0.0, confidence=1.0)
    )
    output.loss_sum.backward()
    value, _ = output.metrics["confidence_loss"]
    torch.testing.assert_close(output.loss_sum.detach(), value)
    moved = {name for name, p in world.draft.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"fc.weight", "norm.weight", "markov_head.markov_w1.weight", "confidence_head.proj.bias"} <= moved
    assert "markov_head.markov_w2.weight" not in moved


def test_the_acceptance_of_slots_and_blocks_is_reported():
    world = world_of(gamma="uniform")
    batch = batch_of(world)
    labels = labels_of(world, batch)
    output = world.loss(batch)
    rates = [output.metrics[f"acceptance_rate_{k}"] for k in range(4)]
    assert [int(count) for _, count in rates] == output.count.tolist() == labels.valid.sum(0).tolist()
    value, total = output.metrics["l1_loss"]
    accepted = sum(float(rate) for rate, _ in rates)
    assert accepted == pytest.approx(float(total) - 0.5 * float(value), rel=1e-5)
    runs, blocks = output.metrics["tau_probabilistic"]
    assert int(blocks) == labels.blocks.num_blocks
    assert float(blocks) < float(runs) <= float(blocks) + accepted + 1e-5


@pytest.mark.parametrize(
    ("head", "added"),
    [
        ("vanilla", {}),
        ("gated", {"markov_head.gate_proj.weight": (5, 21), "markov_head.gate_proj.bias": (5,)}),
        ("rnn", {"markov_head.joint_proj.weight": (15, 26), "markov_head.joint_proj.bias": (15,)}),
    ],
)
def test_a_draft_has_the_served_names_and_as_many_parameters_as_its_config_says(head, added):
    draft = world_of(markov_head_type=head).draft
    heads = {name: tuple(p.shape) for name, p in draft.served_state().items() if "_head" in name}
    assert heads == added | {
        "markov_head.markov_w1.weight": (40, 5),
        "markov_head.markov_w2.weight": (40, 5),
        "confidence_head.proj.weight": (1, 21),
        "confidence_head.proj.bias": (1,),
    }
    assert sum(p.numel() for p in draft.parameters()) == draft.config.num_parameters
    plain = world_of(**PLAIN).draft
    assert sum(p.numel() for p in plain.parameters()) == plain.config.num_parameters


def test_a_block_has_seven_slots_and_a_gamma_of_four_by_default():
    options = options_of({"name": "dspark"})
    assert options.block_size == 7
    assert options.slot_weights(2) == (1.0, math.exp(-1 / 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"markov_rank": 0}, "markov_rank is 0"),
        ({"enable_confidence_head": False, "confidence_threshold": 0.5}, "confidence_threshold is 0.5 without"),
        ({"confidence_weight": 0.0, "confidence_threshold": 0.5}, "threshold is 0.5, but confidence_weight is 0"),
        ({"ce_weight": 0.0, "l1_weight": 0.0}, "ce_weight and l1_weight are both 0"),
        ({"confidence_threshold": 1.5}, "less than or equal to 1"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        options_of({**SMALL, **options})
