"""Medusa: alignment, loss, heads as they start, chains and trees."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from specforge.algorithms.base import DraftRequest, Sampling, StepContext, TreeShape
from specforge.algorithms.medusa.algorithm import Medusa
from specforge.algorithms.medusa.config import MedusaDraftConfig, MedusaOptions
from specforge.algorithms.medusa.proposer import best_products
from specforge.errors import ConfigError
from specforge.testing.samples import SMALL_TARGET

CONTEXT = StepContext(global_step=0, total_steps=1, seed=0)


def setup(lab, **options):
    algorithm, tables = Medusa(MedusaOptions(**options)), lab.tables()
    draft = algorithm.build_draft(algorithm.draft_config(SMALL_TARGET), tables, seed=0)
    return algorithm, draft, tables


def shake(lab, draft):
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(lab.random(*parameter.shape) * 0.2)


def plain_loss(draft, tables, document, decay, soft):
    """Sums written out for one document, head by head and row by row."""
    total, correct, count = 0.0, [0] * 4, [0] * 4
    ids, mask, last = document["ids"], document["mask"], document["last"]
    for head, row in product(range(4), range(len(ids))):
        label = row + 2 + head
        if label >= len(ids) or not mask[label]:
            continue
        state = last[row]
        for layer in draft.blocks[head].layers:
            state = state + F.silu(layer(state))
        logits = state @ (tables.lm_head if draft.config.shared_head else draft.lm_heads[head].weight).T
        teacher = last[label - 1] @ tables.lm_head.T
        target = torch.softmax(teacher, -1) if soft else F.one_hot(ids[label], 40).float()
        total = total - decay**head * (target * torch.log_softmax(logits, -1)).sum()
        count[head] += 1
        correct[head] += int(logits.argmax() == (teacher.argmax() if soft else ids[label]))
    return total, correct, count


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_equal_the_rows_written_out(lab, pack, run_loss, gradients, soft, shared):
    options = {"loss": "soft" if soft else "hard", "shared_head": shared, "num_blocks": 2, "head_decay": 0.7}
    algorithm, draft, tables = setup(lab, **options)
    shake(lab, draft)
    documents = [lab.document(9), lab.document(3, answer_from=1), lab.document(14, answer_from=6)]
    output = run_loss(algorithm, draft, tables, pack(documents))
    output.loss_sum.backward()
    ours = gradients(draft)
    draft.zero_grad()
    parts = [plain_loss(draft, tables, document, 0.7, soft) for document in documents]
    sum(part[0] for part in parts).backward()
    torch.testing.assert_close(output.loss_sum, sum(part[0] for part in parts), rtol=1e-5, atol=1e-5)
    assert output.correct.tolist() == [sum(part[1][k] for part in parts) for k in range(4)]
    assert output.count.tolist() == [sum(part[2][k] for part in parts) for k in range(4)]
    assert algorithm.supervised_weight(pack(documents), CONTEXT) == output.count[0]
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_grouping_of_samples_changes_nothing(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab)
    shake(lab, draft)
    documents = [lab.document(9), lab.document(5), lab.document(14, answer_from=6)]
    whole = run_loss(algorithm, draft, tables, pack(documents))
    apart = [run_loss(algorithm, draft, tables, pack([document])) for document in documents]
    torch.testing.assert_close(whole.loss_sum, sum(output.loss_sum for output in apart))
    assert torch.equal(whole.correct, sum(output.correct for output in apart))
    assert whole.runs.sums()[0] == sum(output.runs.sums()[0] for output in apart)


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


def test_heads_without_a_row_still_reach_their_parameters(lab, pack, run_loss, gradients):
    algorithm, draft, tables = setup(lab)
    run_loss(algorithm, draft, tables, pack([lab.document(3)])).loss_sum.backward()
    assert set(gradients(draft)) == set(dict(draft.named_parameters()))


@pytest.mark.parametrize("shared", [False, True])
def test_every_head_starts_as_the_targets_own(lab, shared):
    algorithm, draft, tables = setup(lab, shared_head=shared)
    tables = replace(tables, logit_scale=0.5)
    draft = algorithm.build_draft(draft.config, tables, seed=3)
    last = lab.random(3, 16)
    proposal = algorithm.proposer(draft, tables).propose([1, 2, 3, 4], {"last": last}, DraftRequest(9))
    assert proposal.tokens == (int((last[-1] @ tables.lm_head.T).argmax()),) * 4
    assert draft.config.num_parameters == sum(p.numel() for p in draft.parameters())
    assert sorted(draft.served_state())[:2] == ["blocks.0.layers.0.bias", "blocks.0.layers.0.weight"]
    assert ("lm_heads.3.weight" in draft.served_state()) is not shared


def test_a_single_sample_is_learnt(lab, pack, run_loss):
    algorithm, draft, tables = setup(lab, num_heads=3)
    batch = pack([lab.document(10)])
    optimizer = torch.optim.Adam(draft.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        output = run_loss(algorithm, draft, tables, batch)
        (output.loss_sum / algorithm.supervised_weight(batch, CONTEXT)).backward()
        optimizer.step()
    assert bool((output.correct > 0.95 * output.count).all())
    proposer, ids = algorithm.proposer(draft, tables), batch.input_ids.tolist()
    assert list(proposer.propose(ids[:5], {"last": batch.features["last"][:4]}, DraftRequest(3)).tokens) == ids[5:8]


def test_a_chain_is_one_token_a_head_from_the_last_row(lab):
    algorithm, draft, tables = setup(lab)
    shake(lab, draft)
    last = lab.random(6, 16)
    proposer = algorithm.proposer(draft, tables)
    assert proposer.propose(list(range(4)), {"last": last[:3]}, DraftRequest(0)).tokens == ()
    two = proposer.propose(list(range(7)), {"last": last[3:]}, DraftRequest(2))
    again = proposer.propose(list(range(7)), {"last": last[6:]}, DraftRequest(2))
    with torch.no_grad():
        expected = [int((draft(k, last[5:]) @ draft.head_weight(k).T).argmax()) for k in range(2)]
    assert list(two.tokens) == expected
    assert again == two
    with pytest.raises(ValueError, match="need features of 7 positions, got 6"):
        proposer.propose(list(range(8)), {"last": last[6:]}, DraftRequest(2))


def test_sampled_tokens_come_with_the_distributions_they_were_drawn_from(lab):
    algorithm, draft, tables = setup(lab)
    shake(lab, draft)
    last = lab.random(1, 16)
    sampling = Sampling(temperature=0.7, generator=torch.Generator().manual_seed(0), top_k=3)
    proposal = algorithm.proposer(draft, tables).propose([1, 2], {"last": last}, DraftRequest(4, sampling))
    assert proposal.probabilities.shape == (4, 40)
    assert (proposal.probabilities > 0).sum(-1).tolist() == [3] * 4
    for token, row in zip(proposal.tokens, proposal.probabilities, strict=True):
        assert row[token] > 0
    with torch.no_grad():
        logits = (draft(0, last) @ draft.head_weight(0).T)[0]
    kept = logits.topk(3)
    torch.testing.assert_close(proposal.probabilities[0, kept.indices], torch.softmax(kept.values / 0.7, -1))


def test_tree_is_the_most_probable_part_of_the_product(lab):
    scores = lab.random(3, 12).mul(2).log_softmax(-1)
    shape = TreeShape(top_k=4, depth=5, num_nodes=21)
    proposal = best_products(scores, shape)
    best = scores.topk(4).indices.tolist()
    every = {
        path: sum(float(scores[level, token]) for level, token in enumerate(path))
        for depth in range(1, 4)
        for path in product(*best[:depth])
    }
    expected = sorted(every, key=every.get, reverse=True)[:20]
    paths = []
    for token, parent in zip(proposal.tokens, proposal.parents, strict=True):
        assert parent < len(paths)
        paths.append(((*paths[parent], token)) if parent >= 0 else (token,))
    assert paths == expected


def test_tree_of_one_child_is_the_chain_and_small_shapes_are_kept(lab):
    algorithm, draft, tables = setup(lab)
    shake(lab, draft)
    proposer, last = algorithm.proposer(draft, tables), lab.random(1, 16)
    chain = proposer.propose([1, 2], {"last": last}, DraftRequest(4))
    tree = proposer.propose([1, 2], {"last": last[1:]}, DraftRequest(0, tree=TreeShape(1, 9, 60)))
    assert tree.tokens == chain.tokens
    assert tree.parents == (-1, 0, 1, 2)
    shallow = proposer.propose([1, 2], {"last": last[1:]}, DraftRequest(0, tree=TreeShape(3, 0, 60)))
    assert shallow.parents == (-1, -1, -1)
    none = proposer.propose([1, 2], {"last": last[1:]}, DraftRequest(0, tree=TreeShape(3, 2, 1)))
    assert none.tokens == ()


def test_config_round_trip_capture_and_refusals(lab):
    algorithm, draft, tables = setup(lab, shared_head=True)
    config = draft.config
    assert MedusaDraftConfig.from_dict(config.to_dict()) == config
    spec = algorithm.capture_spec(config, "bfloat16")
    assert spec.widths(16) == (("last", "bfloat16", 16),)
    with pytest.raises(ConfigError, match="whole vocabulary"):
        algorithm.build_draft(config, tables, seed=0, kept_ids=torch.arange(4))
    with pytest.raises(ValidationError):
        MedusaOptions(num_heads=0)
