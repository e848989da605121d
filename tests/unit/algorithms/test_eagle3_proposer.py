"""Training equals inference, and how proposals of a chain come about."""

import copy

import pytest
import torch

from specforge.algorithms.base import DraftRequest, Proposal, Sampling
from specforge.algorithms.eagle3.features import plan_unroll
from specforge.algorithms.eagle3.loss import unroll
from specforge.algorithms.eagle3.step import JoinedStep, ModuleStep
from specforge.algorithms.parts.vocabulary import target_ids

ARCHITECTURES = {
    "llama": {},
    "qwen3": {"architecture": "qwen3"},
    "mla": {
        "architecture": "mla",
        "num_key_value_heads": 4,
        "head_dim": 10,
        "q_lora_rank": 12,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5},
    },
}


@pytest.mark.parametrize("flags", [{}, {"norm_output": True}, {"norm_before_residual": True}])
@pytest.mark.parametrize("draft_vocab_size", [40, 13])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_k_of_the_unroll_equals_teacher_forced_decoding(lab, pack, eagle3, architecture, draft_vocab_size, flags):
    """Oracle 5. For every architecture of a draft."""
    algorithm, tables, num_steps = eagle3(), lab.tables(), 5
    changes = {**flags, **ARCHITECTURES[architecture]}
    draft = lab.draft(algorithm, tables, draft_vocab_size=draft_vocab_size, **changes)
    batch = pack([lab.document(11), lab.document(19), lab.document(8)])
    plan, _ = plan_unroll(batch, torch.ones(num_steps, 38, dtype=torch.bool))
    with torch.no_grad():
        logits = [draft.lm_head(readout) for readout in unroll(draft, tables, batch, plan)]
    proposer, start = algorithm.proposer(draft, tables), 0
    for length in batch.lengths:
        ids = batch.input_ids[start : start + length].tolist()
        for j in range(length - num_steps - 1):
            proposer.reset()
            got = proposer.append_true_rows(batch.features["aux"][start : start + j + 1], ids[1 : j + 2])
            torch.testing.assert_close(got, logits[0][start + j], rtol=0, atol=5e-6)
            for k in range(1, num_steps):
                got = proposer.speculate(ids[j + 1 + k])
                torch.testing.assert_close(got, logits[k][start + j], rtol=0, atol=5e-6)
        start += length


def test_proposers_of_a_draft_share_its_weights_until_these_change(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables), lab.document(12)
    ids, aux = document["ids"].tolist(), document["aux"][:11]
    first, second = (algorithm.proposer(draft, tables) for _ in range(2))
    assert first._step is second._step
    first.reset()
    assert first._step is second._step
    assert algorithm.proposer(lab.draft(algorithm, tables), tables)._step is not first._step
    before = first.append_true_rows(aux, ids[1:12])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=0.1)
    for parameter in draft.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for change in (
        lambda: None,
        lambda: draft.load_state_dict({name: tensor * 1.5 for name, tensor in draft.state_dict().items()}),
        lambda: draft.load_state_dict({name: tensor * 2 for name, tensor in draft.state_dict().items()}, assign=True),
    ):
        change()
        first.reset()
        found = first.append_true_rows(aux, ids[1:12])
        assert not torch.equal(found, before)
        assert torch.equal(found, algorithm.proposer(copy.deepcopy(draft), tables).append_true_rows(aux, ids[1:12]))
        before = found


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_joined_weights_compute_what_the_module_computes(lab, eagle3, architecture):
    draft = lab.draft(eagle3(), lab.tables(), **ARCHITECTURES[architecture])
    joined, plain = JoinedStep.of(draft, draft.midlayer.self_attn), ModuleStep(draft, draft.midlayer.self_attn)
    embedded, hidden, positions = lab.random(5, 16), lab.random(5, 16), torch.arange(3, 8)
    with torch.inference_mode():
        mine = joined.project(embedded, hidden, joined.angles(positions))
        other = plain.project(embedded, hidden, plain.angles(positions))
        for name in ("queries", "keys", "values", "residual"):
            torch.testing.assert_close(getattr(mine, name), getattr(other, name))
        attended = other.queries.flatten(1)
        torch.testing.assert_close(joined.finish(hidden, attended), plain.finish(hidden, attended))


def chain(proposer, tokens, aux, num_proposals, sampling=None) -> Proposal:
    return proposer.propose(tokens, {"aux": aux}, DraftRequest(num_proposals, sampling))


def sampling(seed=0, **changes) -> Sampling:
    return Sampling(generator=torch.Generator().manual_seed(seed), **{"temperature": 1.0, **changes})


def test_proposals_do_not_depend_on_how_features_arrive_or_on_earlier_speculation(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, draft_vocab_size=13), lab.document(20)
    ids, aux = document["ids"].tolist(), document["aux"]
    whole = chain(algorithm.proposer(draft, tables), ids, aux[:19], 5)
    proposer = algorithm.proposer(draft, tables)
    chain(proposer, ids[:8], aux[:7], 5)
    chain(proposer, ids[:9], aux[7:8], 3)
    chain(proposer, ids[:14], aux[8:13], 0)
    assert chain(proposer, ids, aux[13:19], 5) == whole
    assert len(whole.tokens) == 5
    assert set(whole.tokens) <= set(target_ids(draft.d2t).tolist())


def test_reset_forgets_the_sequence_and_reads_the_new_weights(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables), lab.document(12)
    ids, aux = document["ids"].tolist(), document["aux"]
    proposer = algorithm.proposer(draft, tables)
    chain(proposer, lab.document(9)["ids"].tolist(), lab.document(9)["aux"][:8], 4)
    with torch.no_grad():
        draft.midlayer.self_attn.q_proj.weight.neg_()
    proposer.reset()
    fresh = algorithm.proposer(draft, tables)
    assert chain(proposer, ids, aux[:11], 4) == chain(fresh, ids, aux[:11], 4)


def test_cache_grows_beyond_its_first_size(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables), lab.document(700)
    ids, aux = document["ids"].tolist(), document["aux"]
    whole = chain(algorithm.proposer(draft, tables), ids, aux[:699], 6)
    proposer = algorithm.proposer(draft, tables)
    for n in range(250, 700, 50):
        chain(proposer, ids[: n + 1], aux[n - 50 if n > 250 else 0 : n], 6)
    assert chain(proposer, ids, aux[650:699], 6) == whole


def test_missing_features_are_an_error(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    document = lab.document(12)
    proposer = algorithm.proposer(lab.draft(algorithm, tables), tables)
    with pytest.raises(ValueError, match="need features of 11 positions, got 9"):
        chain(proposer, document["ids"].tolist(), document["aux"][:9], 2)


def test_drawn_proposals_come_with_exactly_the_distributions_that_they_were_drawn_from(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, draft_vocab_size=13), lab.document(12)
    ids, aux = document["ids"].tolist(), document["aux"][:11]
    proposer = algorithm.proposer(draft, tables)
    kept = target_ids(draft.d2t)
    proposal = chain(proposer, ids, aux, 4, sampling(temperature=0.7, top_k=6, top_p=0.9))
    assert (len(proposal.tokens), proposal.probabilities.shape) == (4, (4, 40))
    assert proposal.probabilities.dtype == torch.float32
    torch.testing.assert_close(proposal.probabilities.sum(1), torch.ones(4))
    outside = torch.ones(40, dtype=torch.bool)
    outside[kept] = False
    assert not proposal.probabilities[:, outside].any()
    assert ((proposal.probabilities > 0).sum(1) <= 6).all()
    proposer.reset()
    logits = proposer.append_true_rows(aux, ids[1:12])
    for place, token in enumerate(proposal.tokens):
        largest = logits.topk(6)
        shares = torch.softmax(largest.values / 0.7, -1)
        shares[shares.cumsum(-1) - shares >= 0.9] = 0.0
        expected = torch.zeros(40).index_put_((kept[largest.indices],), shares / shares.sum())
        torch.testing.assert_close(proposal.probabilities[place], expected)
        assert expected[token] > 0
        logits = proposer.speculate(token)


def test_draws_depend_on_the_generator_and_have_the_stated_frequencies(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, draft_vocab_size=5), lab.document(6)
    ids, aux = document["ids"].tolist(), document["aux"][:5]
    proposer = algorithm.proposer(draft, tables)
    drawing = sampling(temperature=2.0)
    first = chain(proposer, ids, aux, 1, drawing)
    counts = torch.zeros(40)
    for _ in range(1000):
        counts[chain(proposer, ids, aux[:0], 1, drawing).tokens[0]] += 1
    assert (counts / 1000 - first.probabilities[0]).abs().max() < 0.06
    assert chain(proposer, ids, aux[:0], 3, sampling(5)).tokens == chain(proposer, ids, aux[:0], 3, sampling(5)).tokens


def test_drawing_at_temperature_zero_is_greedy(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, draft_vocab_size=13), lab.document(12)
    ids, aux = document["ids"].tolist(), document["aux"][:11]
    proposer = algorithm.proposer(draft, tables)
    drawn = chain(proposer, ids, aux, 5, sampling(temperature=0.0))
    assert drawn.tokens == chain(proposer, ids, aux[:0], 5).tokens
    assert drawn.probabilities.max(1).values.tolist() == [1.0] * 5


def test_a_second_request_for_the_same_tokens_repeats_the_proposal(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    document = lab.document(12)
    ids, aux = document["ids"].tolist(), document["aux"][:11]
    proposer = algorithm.proposer(lab.draft(algorithm, tables), tables)
    assert chain(proposer, ids, aux, 5) == chain(proposer, ids, aux[:0], 5)
