"""P-EAGLE: the draw of elements, their attention, loss, and one-pass drafting."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from specforge.algorithms.base import DraftRequest, Sampling, StepContext
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.algorithms.peagle.algorithm import PEagle
from specforge.algorithms.peagle.config import PEagleDraftConfig, PEagleOptions
from specforge.algorithms.peagle.features import (
    CodShares,
    cod_positions,
    draw_depths,
    plan_elements,
    supervised_positions,
)
from specforge.contracts.refs import Slot
from specforge.errors import ConfigError, DraftError
from specforge.testing.golden.peagle import recorded_plan, visible_elements

CONTEXT = StepContext(global_step=0, total_steps=1, seed=0)
CONFIG = PEagleDraftConfig(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    max_position_embeddings=128,
    vocab_size=40,
    draft_vocab_size=40,
    aux_layers=(1, 3, 4),
    target_num_layers=8,
    num_layers=2,
    mask_token_id=39,
)


def setup(lab, kept=None, changes=None, **options):
    """A draft whose weights are large enough for attention to matter."""
    algorithm, tables = PEagle(PEagleOptions(**{"num_depths": 4} | options)), lab.tables()
    config = replace(CONFIG, **{"draft_vocab_size": 40 if kept is None else len(kept)} | (changes or {}))
    draft = algorithm.build_draft(config, tables, seed=0, kept_ids=kept)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.copy_(lab.random(*parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return algorithm, draft, tables


def drawn_plan(algorithm, batch):
    valid = supervised_positions(batch, algorithm.options.mask_offset)
    return plan_elements(batch, valid, draw_depths(batch, valid, algorithm.shares, CONTEXT))


def dense_readouts(draft, batch, anchors, depths):
    """What the head reads of all elements [E, H], under the dense mask of the rule."""
    documents = batch.document_ids[anchors]
    allowed = (documents[:, None] == documents[None]) & (
        ((depths[None] == 0) & (anchors[None] <= anchors[:, None]))
        | ((anchors[None] == anchors[:, None]) & (depths[None] <= depths[:, None]))
    )
    true = depths == 0
    token_ids = torch.cat((batch.input_ids[1:], batch.input_ids[:1]))[anchors]
    tokens = draft.embed_tokens(torch.where(true, token_ids, draft.config.mask_token_id))
    hidden = draft.fc(torch.where(true[:, None], batch.features["aux"][anchors], draft.mask_hidden[0]))
    for layer in draft.layers:
        attention = layer.self_attn
        inputs = layer.input_layernorm(hidden)
        if hasattr(layer, "hidden_norm"):
            inputs = torch.cat((layer.input_layernorm(tokens), layer.hidden_norm(hidden)), dim=-1)
        angles = attention.rotary(batch.position_ids[anchors] + depths)
        queries, (keys, values) = attention.queries(inputs, angles), attention.keys_values(inputs, angles)
        heads = (t.transpose(0, 1) for t in (queries, keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1)))
        hidden = layer.finish(hidden, F.scaled_dot_product_attention(*heads, attn_mask=allowed).transpose(0, 1))
    return draft.norm(hidden)


def test_elements_see_their_prefix_and_their_own_shallower_ones():
    """Oracle 16."""
    anchors = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 3, 4, 0, 3, 0])
    depths = torch.tensor([0] * 6 + [1] * 4 + [2] * 2 + [3])
    rows = [
        "100000 0000 00 0",
        "110000 0000 00 0",
        "111000 0000 00 0",
        "111100 0000 00 0",
        "111110 0000 00 0",
        "111111 0000 00 0",
        "100000 1000 00 0",
        "110000 0100 00 0",
        "111100 0010 00 0",
        "111110 0001 00 0",
        "100000 1000 10 0",
        "111100 0010 01 0",
        "100000 1000 10 1",
    ]
    expected = torch.tensor([[int(c) for c in row.replace(" ", "")] for row in rows])
    plan = recorded_plan(anchors, depths, torch.zeros(6, dtype=torch.int64), (6,))
    assert torch.equal(visible_elements(plan).long(), expected)


def test_one_depth_and_one_layer_equal_eagle3_with_one_step(lab, pack, eagle3, run_loss):
    """Oracle 17."""
    algorithm, draft, tables = setup(lab, torch.arange(0, 40, 2), {"num_layers": 1}, num_depths=1)
    other = eagle3(ttt_steps=1)
    names = asdict(lab_config(draft.config))
    eagle = other.build_draft(other.config_type.from_dict(names), tables, seed=0, kept_ids=torch.arange(0, 40, 2))
    shared = {name.replace("layers.0.", "midlayer."): value for name, value in draft.state_dict().items()}
    eagle.load_state_dict({name: shared[name] for name in eagle.state_dict()})
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(tables.embed_tokens)
    batch = pack([lab.document(9), lab.document(14, answer_from=6), lab.document(3)])
    ours, theirs = run_loss(algorithm, draft, tables, batch), run_loss(other, eagle, tables, batch)
    ours.loss_sum.backward()
    theirs.loss_sum.backward()
    torch.testing.assert_close(ours.loss_sum, theirs.loss_sum)
    torch.testing.assert_close(draft.fc.weight.grad, eagle.fc.weight.grad)
    assert (ours.correct.tolist(), ours.count.tolist()) == (theirs.correct.tolist(), theirs.count.tolist())
    assert ours.runs.anchors.tolist() == theirs.runs.anchors.tolist()
    assert ours.runs.lengths.tolist() == theirs.runs.lengths.tolist()
    assert algorithm.supervised_weight(batch, CONTEXT) == other.supervised_weight(batch, CONTEXT)


def lab_config(config):
    """The same sizes as an EAGLE-3 draft's config."""
    from specforge.algorithms.eagle3.config import Eagle3DraftConfig

    values = {name: value for name, value in asdict(config).items() if name not in {"num_layers", "mask_token_id"}}
    return Eagle3DraftConfig(**values)


def test_draw_is_chained_inside_documents_and_of_the_given_sizes(lab, pack):
    """Oracle 18."""
    algorithm, _, _ = setup(lab, num_depths=5, cod_ratio=0.7)
    batch = pack([lab.document(30), lab.document(4), lab.document(25, answer_from=12), lab.document(3, answer_from=3)])
    valid = supervised_positions(batch, 2)
    drawn = draw_depths(batch, valid, algorithm.shares, CONTEXT)
    assert len(drawn) == 4
    sizes = {0: 28, 1: 2, 2: 13}
    for depth, anchors in enumerate(drawn, start=1):
        assert bool((anchors[1:] > anchors[:-1]).all())
        assert bool(valid[anchors + depth].all())
        assert torch.equal(batch.document_ids[anchors], batch.document_ids[anchors + depth])
        if depth > 1:
            assert set(anchors.tolist()) <= set(drawn[depth - 2].tolist())
        counts = torch.bincount(batch.document_ids[anchors], minlength=4).tolist()
        for document, size in sizes.items():
            assert counts[document] <= int((size - depth) * max(0.7**depth, 0.2))
    first = torch.bincount(batch.document_ids[drawn[0]], minlength=4).tolist()
    assert first == [int(27 * 0.7), int(1 * 0.7), int(12 * 0.7), 0]
    again = draw_depths(batch, valid, algorithm.shares, CONTEXT)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    other = draw_depths(batch, valid, algorithm.shares, replace(CONTEXT, seed=1))
    assert not torch.equal(drawn[0], other[0])
    later = replace(batch, slots=tuple(Slot(1, i) for i in range(4)))
    assert not torch.equal(drawn[0], draw_depths(later, valid, algorithm.shares, CONTEXT)[0])


def test_sizes_of_the_draw_follow_the_shares():
    everything = CodShares(num_depths=4, ratio=1.0, min_ratio=0.2)
    drawn = cod_positions(np.ones(12, dtype=bool), everything, lambda eligible, count: eligible[:count])
    assert [found.tolist() for found in drawn] == [list(range(1, 12)), list(range(2, 12)), list(range(3, 12))]
    thin = CodShares(num_depths=6, ratio=0.5, min_ratio=0.4)
    drawn = cod_positions(np.ones(12, dtype=bool), thin, lambda eligible, count: eligible[:count])
    assert [len(found) for found in drawn] == [5, 4, 3, 3, 2]
    assert cod_positions(np.zeros(3, dtype=bool), thin, lambda eligible, count: eligible) == []


def test_an_evaluation_draws_nothing_and_has_every_depth(lab, pack):
    algorithm, _, _ = setup(lab, num_depths=4, cod_ratio=0.3)
    batch = pack([lab.document(9), lab.document(12, answer_from=6)])
    everything = replace(CONTEXT, exhaustive=True)
    drawn = draw_depths(batch, supervised_positions(batch, 2), algorithm.shares, everything)
    assert [anchors.tolist() for anchors in drawn] == [
        [0, 1, 2, 3, 4, 5, *range(12, 18)],
        [0, 1, 2, 3, 4, *range(12, 17)],
        [0, 1, 2, 3, *range(12, 16)],
    ]
    assert algorithm.supervised_weight(batch, everything) == 13 + 12 + 10 + 8


def test_draw_of_a_document_does_not_depend_on_the_others(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab)
    documents = [lab.document(19), lab.document(5), lab.document(14, answer_from=6)]
    batch = pack(documents)
    whole = run_loss(algorithm, draft, tables, batch)
    apart = []
    for index in (2, 0, 1):
        alone = pack([documents[index]])
        alone = replace(alone, sample_ids=(batch.sample_ids[index],), slots=(Slot(0, 99),))
        apart.append(run_loss(algorithm, draft, tables, alone))
    torch.testing.assert_close(whole.loss_sum, sum(output.loss_sum for output in apart))
    assert torch.equal(whole.correct, sum(output.correct for output in apart))
    assert torch.equal(whole.count, sum(output.count for output in apart))
    assert whole.runs.sums()[0] == sum(output.runs.sums()[0] for output in apart)
    assert algorithm.supervised_weight(batch, CONTEXT) == whole.count.sum()


@pytest.mark.parametrize("mask_offset", [2, 0])
@pytest.mark.parametrize("pruned", [False, True])
def test_loss_and_gradients_equal_the_dense_form(lab, pack, run_loss, gradients, pruned, mask_offset):
    kept = torch.arange(1, 40, 3) if pruned else None
    algorithm, draft, tables = setup(lab, kept, {"num_layers": 3}, mask_offset=mask_offset)
    batch = pack([lab.document(9), lab.document(4), lab.document(14, answer_from=6)])
    output = run_loss(algorithm, draft, tables, batch)
    output.loss_sum.backward()
    ours = gradients(draft)
    draft.zero_grad()
    plan, num_tokens = drawn_plan(algorithm, batch), batch.input_ids.numel()
    deeper = [plan.context[anchors] for anchors in plan.anchors]
    anchors = torch.cat([torch.arange(num_tokens), *deeper])
    depths = torch.cat(
        [torch.zeros(num_tokens, dtype=torch.int64)] + [torch.full_like(a, i + 1) for i, a in enumerate(deeper)]
    )
    readouts = dense_readouts(draft, batch, anchors, depths)
    trained = (depths > 0) | supervised_positions(batch, mask_offset)[anchors]
    positions, logits = (anchors + depths)[trained], draft.lm_head(readouts[trained])
    teacher = batch.features["last"][positions + 1] @ tables.lm_head.T
    best = teacher.argmax(-1)
    known = draft.t2d[best]
    losses = F.cross_entropy(logits, torch.softmax(teacher[:, draft.t2d], -1), reduction="none")
    (losses * known).sum().backward()
    torch.testing.assert_close(output.loss_sum, (losses * known).sum(), rtol=1e-5, atol=1e-5)
    right = target_ids(draft.d2t)[logits.argmax(-1)] == best
    assert output.correct.tolist() == torch.bincount(depths[trained], right.double(), minlength=4).tolist()
    assert output.count.tolist() == torch.bincount(depths[trained], minlength=4).tolist()
    table = {
        (a, d): bool(r) for a, d, r in zip(anchors[trained].tolist(), depths[trained].tolist(), right, strict=True)
    }
    rows = sorted(a for a, d in table if d == 0)
    runs = [next(length for length in range(5) if not table.get((row, length), False)) for row in rows]
    assert output.runs.anchors.tolist() == [row + 1 for row in rows]  # the last token known to the row
    assert output.runs.lengths.tolist() == runs
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_depth_d_of_training_equals_inference_with_d_mask_rows(lab, pack, num_layers):
    """Oracle 19."""
    algorithm, draft, tables = setup(lab, None, {"num_layers": num_layers}, cod_ratio=1.0)
    batch = pack([lab.document(11), lab.document(16, answer_from=3)])
    plan = drawn_plan(algorithm, batch)
    with torch.no_grad():
        logits = [draft.lm_head(readout) for readout in draft(batch.features["aux"], plan)]
    anchors = [plan.context[plan.outputs], *(plan.context[found] for found in plan.anchors)]
    assert len(anchors) == 4
    starts = torch.tensor([0, *batch.lengths]).cumsum(0)
    proposer = algorithm.proposer(draft, tables)
    for depth, found in enumerate(anchors):
        for place, anchor in enumerate(found.tolist()):
            start = int(starts[batch.document_ids[anchor]])
            proposer.reset()
            ids = batch.input_ids[start : anchor + 2].tolist()
            got = proposer.parallel_logits(batch.features["aux"][start : anchor + 1], ids[1:], depth + 1)
            torch.testing.assert_close(got[depth], logits[depth][place], rtol=1e-5, atol=1e-5)


def test_a_batch_without_supervision_gives_zeros_that_reach_every_parameter(
    lab, pack, empty_batch, run_loss, gradients
):
    algorithm, draft, tables = setup(lab)
    for batch in (empty_batch, pack([lab.document(4, answer_from=4)])):
        draft.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        output.loss_sum.backward()
        assert output.loss_sum == 0
        assert output.count.tolist() == [0] * 4
        assert algorithm.supervised_weight(batch, CONTEXT) == 0
        assert set(gradients(draft)) == set(dict(draft.named_parameters()))


def test_without_a_drawn_element_the_placeholders_still_get_gradients(lab, pack, run_loss, gradients):
    algorithm, draft, tables = setup(lab)
    output = run_loss(algorithm, draft, tables, pack([lab.document(3)]))
    output.loss_sum.backward()
    assert output.count.tolist() == [1, 0, 0, 0]
    assert set(gradients(draft)) == set(dict(draft.named_parameters()))


def test_a_single_sample_is_learnt_and_drafted(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab, num_depths=3, cod_ratio=1.0)
    document = lab.document(12)
    document["last"][:-1] = tables.lm_head[document["ids"][1:]] * 3  # a target that is sure of the text
    batch = pack([document])
    optimizer = torch.optim.Adam(draft.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        (output.loss_sum / algorithm.supervised_weight(batch, CONTEXT)).backward()
        optimizer.step()
    assert bool((output.correct > 0.95 * output.count).all())
    best = (document["last"] @ tables.lm_head.T).argmax(-1).tolist()
    proposal = algorithm.proposer(draft, tables).propose(
        document["ids"].tolist()[:6], {"aux": document["aux"][:5]}, DraftRequest(3)
    )
    assert list(proposal.tokens) == best[5:8]


def test_proposals_do_not_depend_on_how_features_arrive_or_on_earlier_speculation(lab):
    algorithm, draft, tables = setup(lab, torch.arange(1, 40, 3))
    document = lab.document(600)
    ids, aux = document["ids"].tolist(), document["aux"]
    whole = algorithm.proposer(draft, tables).propose(ids, {"aux": aux[:599]}, DraftRequest(5))
    proposer = algorithm.proposer(draft, tables)
    proposer.propose(ids[:2], {"aux": aux[:1]}, DraftRequest(6))
    proposer.propose(ids[:14], {"aux": aux[1:13]}, DraftRequest(0))
    proposer.propose(ids[:300], {"aux": aux[13:299]}, DraftRequest(3))
    assert proposer.propose(ids, {"aux": aux[299:599]}, DraftRequest(5)) == whole
    assert proposer.propose(ids, {"aux": aux[:0]}, DraftRequest(5)) == whole
    assert len(whole.tokens) == 5
    assert set(whole.tokens) <= set(range(1, 40, 3))
    with pytest.raises(ValueError, match="need features of 600 positions, got 599"):
        proposer.propose([*ids, 1], {"aux": aux[:0]}, DraftRequest(5))


def test_sampled_tokens_come_with_distributions_over_the_targets_ids(lab):
    kept = torch.arange(1, 40, 3)
    algorithm, draft, tables = setup(lab, kept)
    document = lab.document(9)
    sampling = Sampling(temperature=0.5, generator=torch.Generator().manual_seed(1), top_p=0.9)
    proposal = algorithm.proposer(draft, tables).propose(
        document["ids"].tolist(), {"aux": document["aux"][:8]}, DraftRequest(3, sampling)
    )
    assert proposal.probabilities.shape == (3, 40)
    torch.testing.assert_close(proposal.probabilities[:, kept].sum(-1), torch.ones(3))
    assert all(row[token] > 0 for token, row in zip(proposal.tokens, proposal.probabilities, strict=True))


def test_fresh_draft_copies_the_targets_tables(lab):
    algorithm, tables, kept = PEagle(PEagleOptions(freeze_lm_head=True)), lab.tables(), torch.arange(1, 40, 3)
    config = replace(CONFIG, draft_vocab_size=len(kept), num_layers=4)
    draft = algorithm.build_draft(config, tables, seed=0, kept_ids=kept)
    assert torch.equal(draft.embed_tokens.weight, tables.embed_tokens)
    assert torch.equal(draft.lm_head.weight, tables.lm_head[kept])
    assert not draft.lm_head.weight.requires_grad
    assert draft.embed_tokens.weight.requires_grad
    assert 0.5 < float(draft.mask_hidden.detach().std()) < 1.5
    assert draft.config.num_parameters == sum(p.numel() for p in draft.parameters())
    names = set(draft.served_state())
    assert {"mask_hidden", "d2t", "t2d", "layers.0.hidden_norm.weight", "layers.3.input_layernorm.weight"} <= names
    assert "layers.1.hidden_norm.weight" not in names
    assert PEagleDraftConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="kept ids for a draft vocabulary of 13"):
        algorithm.build_draft(config, tables, seed=0)
    with pytest.raises(DraftError, match="mask_token_id must be an id below"):
        algorithm.build_draft(replace(CONFIG, mask_token_id=40), tables, seed=0)
