"""Training equals inference: the unroll against step-by-step decoding."""

import pytest
import torch

from specforge.algorithms.eagle3.features import plan_unroll
from specforge.algorithms.eagle3.loss import unroll
from specforge.algorithms.parts.vocabulary import target_ids


@pytest.mark.parametrize("norm_output", [False, True])
@pytest.mark.parametrize("draft_vocab_size", [40, 13])
def test_step_k_of_the_unroll_equals_teacher_forced_decoding(lab, pack, eagle3, norm_output, draft_vocab_size):
    algorithm, tables, num_steps = eagle3(), lab.tables(), 5
    draft = lab.draft(algorithm, tables, norm_output=norm_output, draft_vocab_size=draft_vocab_size)
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


def test_proposals_do_not_depend_on_how_features_arrive_or_on_earlier_speculation(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables, draft_vocab_size=13), lab.document(20)
    ids, aux = document["ids"].tolist(), document["aux"]
    whole = algorithm.proposer(draft, tables).propose(ids, {"aux": aux[:19]}, 5)
    proposer = algorithm.proposer(draft, tables)
    proposer.propose(ids[:8], {"aux": aux[:7]}, 5)
    proposer.propose(ids[:9], {"aux": aux[7:8]}, 3)
    proposer.propose(ids[:14], {"aux": aux[8:13]}, 0)
    assert proposer.propose(ids, {"aux": aux[13:19]}, 5) == whole
    assert len(whole.tokens) == 5
    assert set(whole.tokens) <= set(target_ids(draft.d2t).tolist())


def test_reset_forgets_the_sequence_and_reads_the_new_weights(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables), lab.document(12)
    ids, aux = document["ids"].tolist(), document["aux"]
    proposer = algorithm.proposer(draft, tables)
    proposer.propose(lab.document(9)["ids"].tolist(), {"aux": lab.document(9)["aux"][:8]}, 4)
    with torch.no_grad():
        draft.midlayer.self_attn.q_proj.weight.neg_()
    proposer.reset()
    fresh = algorithm.proposer(draft, tables)
    assert proposer.propose(ids, {"aux": aux[:11]}, 4) == fresh.propose(ids, {"aux": aux[:11]}, 4)


def test_cache_grows_beyond_its_first_size(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    draft, document = lab.draft(algorithm, tables), lab.document(700)
    ids, aux = document["ids"].tolist(), document["aux"]
    whole = algorithm.proposer(draft, tables).propose(ids, {"aux": aux[:699]}, 6)
    proposer = algorithm.proposer(draft, tables)
    for n in range(250, 700, 50):
        proposer.propose(ids[: n + 1], {"aux": aux[n - 50 if n > 250 else 0 : n]}, 6)
    assert proposer.propose(ids, {"aux": aux[650:699]}, 6) == whole


def test_missing_features_are_an_error(lab, eagle3):
    algorithm, tables = eagle3(), lab.tables()
    document = lab.document(12)
    proposer = algorithm.proposer(lab.draft(algorithm, tables), tables)
    with pytest.raises(ValueError, match="need features of 11 positions, got 9"):
        proposer.propose(document["ids"].tolist(), {"aux": document["aux"][:9]}, 2)
