"""The unroll, the loss and the metrics against their plain forms."""

import pytest
import torch
import torch.nn.functional as F

from specforge.algorithms.eagle3.features import Supervision, plan_unroll
from specforge.algorithms.eagle3.loss import make_teacher, per_row, unroll, unroll_loss
from specforge.algorithms.parts.alignment import supervised_rows
from specforge.algorithms.parts.losses import Teacher, cross_entropy
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.testing.unrolled_reference import (
    DenseInputs,
    dense_teacher,
    dense_unroll,
    library_attention,
    softmax_attention,
)

SOFT_CE = per_row(cross_entropy)

VARIANTS = {
    "plain": {},
    "pruned": {"draft_vocab_size": 13},
    "eagle31": {"fc_norm": True, "norm_output": True, "draft_vocab_size": 13},
    "speculators": {"norm_before_fc": True, "norm_before_residual": True, "norm_output": True},
    "qk_norm": {"architecture": "qwen3"},
}


def dense_logits(draft, tables, batch, num_steps, attend=softmax_attention):
    plan, _ = plan_unroll(batch, torch.ones(num_steps, batch.input_ids.numel(), dtype=torch.bool))
    ids = torch.cat((batch.input_ids, torch.zeros(1, dtype=torch.int64)))[plan.tokens]
    inputs = DenseInputs(batch.features["aux"], tables.embed_tokens, ids, batch.position_ids, batch.document_ids)
    return dense_unroll(draft, inputs, attend)


def dense_loss(draft, tables, batch, options, attend=softmax_attention):
    """The loss sum from whole logits, probabilities and masks, written as the formulas are."""
    logits = dense_logits(draft, tables, batch, options.ttt_steps, attend)
    supervised = supervised_rows(batch, options.ttt_steps, options.mask_offset)
    teacher = dense_teacher(tables.lm_head, batch.features["last"], draft.t2d)
    total = torch.zeros(())
    for k, step in enumerate(logits):
        rows = [j for j in supervised[k].nonzero().squeeze(-1).tolist() if teacher.in_vocabulary[j + 1 + k]]
        places = torch.tensor(rows) + 1 + k
        log_q, p = F.log_softmax(step[rows], -1), teacher.probabilities[places]
        alpha = torch.minimum(p * teacher.kept_mass[places].unsqueeze(-1), log_q.exp()).sum(-1)
        losses = dense_row_losses(options, -(p * log_q).sum(-1), alpha)
        total = total + options.step_decay**k * losses.sum()
    return total


def dense_row_losses(options, entropy, alpha):
    if options.loss == "soft_ce":
        return entropy
    if options.loss == "lk_alpha":
        return -alpha.log()
    mixing = alpha.detach().mean() if options.loss == "lk_batch" else alpha.detach()
    share = options.lk_scale * torch.exp(-options.lk_decay * mixing)
    return share * entropy + (1 - share) * (1 - alpha)


LOSSES = {
    "lk_alpha": {},
    "lk_hybrid": {},
    "lk_hybrid, other mix": {"lk_decay": 1.0, "lk_scale": 0.5},
    "lk_batch": {"lk_decay": 2.0},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("draft_vocab_size", [40, 13])
def test_every_loss_and_its_gradients_equal_the_dense_reference(
    lab, pack, eagle3, run_loss, gradients, loss, draft_vocab_size
):
    algorithm, tables = eagle3(ttt_steps=3, loss=loss.split(",")[0], **LOSSES[loss]), lab.tables()
    draft = lab.draft(algorithm, tables, draft_vocab_size=draft_vocab_size)
    batch = pack([lab.document(9, 3), lab.document(21, 10), lab.document(7, 0)])
    output = run_loss(algorithm, draft, tables, batch)
    output.loss_sum.backward()
    mine = gradients(draft)
    draft.zero_grad()
    expected = dense_loss(draft, tables, batch, algorithm.options)
    expected.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    measured = sum(0.8**k * float(output.metrics[f"loss_step_{k}"][0]) for k in range(3))
    assert measured == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-4, atol=2e-4 * float(gradient.abs().max()), msg=name)


def test_the_loss_is_that_of_the_librarys_attention(lab, pack, eagle3, run_loss):
    """Oracle 6. Masked SDPA, the written-out softmax and the product's gathered attention."""
    algorithm, tables = eagle3(ttt_steps=4), lab.tables()
    draft, batch = lab.draft(algorithm, tables), pack([lab.document(9, 3), lab.document(21, 10), lab.document(5, 5)])
    library, formula = (
        dense_loss(draft, tables, batch, algorithm.options, attend) for attend in (library_attention, softmax_attention)
    )
    mine = run_loss(algorithm, draft, tables, batch).loss_sum
    torch.testing.assert_close(library, formula, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine, library, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalisation", ["token_mean", "sample_mean"])
@pytest.mark.parametrize("loss", ["soft_ce", "lk_alpha", "lk_hybrid"])
def test_the_grouping_into_micro_batches_changes_nothing_but_rounding(
    lab, pack, eagle3, run_loss, context, loss, normalisation
):
    algorithm, tables = eagle3(ttt_steps=3, loss=loss, normalisation=normalisation), lab.tables()
    draft = lab.draft(algorithm, tables, draft_vocab_size=25)
    documents = [lab.document(n, n // 2) for n in (8, 40, 2, 17, 3)]

    def mean(groups):
        batches = [pack(group) for group in groups]
        weight = sum(algorithm.supervised_weight(batch, context) for batch in batches)
        return sum(run_loss(algorithm, draft, tables, batch).loss_sum for batch in batches) / weight

    whole = mean([documents])
    torch.testing.assert_close(mean([documents[:1], documents[1:]]), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean([[document] for document in documents[::-1]]), whole, rtol=1e-6, atol=0)


def test_sample_mean_is_the_mean_of_the_samples_own_means(lab, pack, eagle3, run_loss, context):
    tables, documents = lab.tables(), [lab.document(n, n // 2) for n in (8, 40, 2)]
    draft = lab.draft(eagle3(), tables)
    by_token, by_sample = eagle3(), eagle3(normalisation="sample_mean")
    means = [
        run_loss(by_token, draft, tables, pack([d])).loss_sum / by_token.supervised_weight(pack([d]), context)
        for d in documents[:2]
    ]
    loss = run_loss(by_sample, draft, tables, pack(documents)).loss_sum / 2
    torch.testing.assert_close(loss, sum(means) / 2, rtol=1e-6, atol=0)


def test_micro_batch_mean_is_the_mean_of_the_micro_batches_own_means(lab, pack, eagle3, run_loss, context):
    tables, documents = lab.tables(), [lab.document(n, n // 2) for n in (8, 40, 17)]
    draft = lab.draft(eagle3(), tables)
    by_token, published = eagle3(), eagle3(normalisation="micro_batch_mean")
    for group in (documents[:1], documents[1:]):
        batch = pack(group)
        mean = run_loss(by_token, draft, tables, batch).loss_sum / by_token.supervised_weight(batch, context)
        torch.testing.assert_close(run_loss(published, draft, tables, batch).loss_sum, mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unroll_loss_and_gradients_equal_the_dense_reference(lab, pack, eagle3, run_loss, gradients, variant):
    """Oracle 6. Gathered rows and grouped documents against one dense mask over everything."""
    algorithm, tables = eagle3(ttt_steps=4), lab.tables()
    draft = lab.draft(algorithm, tables, **VARIANTS[variant])
    batch = pack([lab.document(9, 3), lab.document(21, 10), lab.document(5, 5), lab.document(7, 0)])
    output = run_loss(algorithm, draft, tables, batch)
    output.loss_sum.backward()
    mine = gradients(draft)
    draft.zero_grad()
    expected = dense_loss(draft, tables, batch, algorithm.options)
    expected.backward()
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(mine[name], gradient, rtol=2e-4, atol=2e-4 * float(gradient.abs().max()), msg=name)


def test_one_step_equals_a_plain_causal_forward_with_soft_cross_entropy(lab, pack, eagle3, run_loss):
    """Oracle 3."""
    algorithm, tables = eagle3(ttt_steps=1), lab.tables()
    draft, batch = lab.draft(algorithm, tables), pack([lab.document(12, 4)])
    logits = dense_logits(draft, tables, batch, 1)[0]
    teacher = torch.softmax(batch.features["last"] @ tables.lm_head.T, -1)
    expected = sum(F.cross_entropy(logits[j], teacher[j + 1]) for j in range(2, 10))
    torch.testing.assert_close(run_loss(algorithm, draft, tables, batch).loss_sum, expected, rtol=1e-5, atol=1e-5)


def test_step_zero_does_not_depend_on_the_number_of_steps(lab, pack, eagle3, run_loss):
    """Oracle 4."""
    tables, batch = lab.tables(), pack([lab.document(12, 4), lab.document(20, 6)])
    draft = lab.draft(eagle3(), tables)
    one, seven = (run_loss(eagle3(ttt_steps=k), draft, tables, batch) for k in (1, 7))
    torch.testing.assert_close(one.metrics["loss_step_0"], seven.metrics["loss_step_0"])
    assert one.correct[0] == seven.correct[0]


def test_full_vocabulary_keeps_every_row_and_the_whole_probability(lab, pack, eagle3, run_loss):
    """Oracle 7. A draft vocabulary of every id is the path without one: nothing is unknown, p^d = p^f."""
    algorithm, tables, batch = eagle3(ttt_steps=2), lab.tables(), pack([lab.document(12, 4)])
    draft = lab.draft(algorithm, tables)
    output = run_loss(algorithm, draft, tables, batch)
    assert output.metrics["in_vocabulary"][0] == output.metrics["in_vocabulary"][1]
    supervised = supervised_rows(batch, 2, 2)
    dense = dense_teacher(tables.lm_head, batch.features["last"], draft.t2d)
    logits = dense_logits(draft, tables, batch, 2)
    for k in range(2):
        rows = supervised[k].nonzero().squeeze(-1)
        overlap = torch.minimum(dense.probabilities[rows + 1 + k], torch.softmax(logits[k][rows].detach(), -1)).sum()
        assert float(output.metrics[f"acceptance_rate_{k}"][0]) == pytest.approx(float(overlap), rel=1e-5)
    assert bool(dense.in_vocabulary.all())
    torch.testing.assert_close(dense.kept_mass, torch.ones(12))


def test_values_that_no_supervised_row_needs_change_nothing(lab, pack, eagle3, run_loss):
    """Oracle 8. The tail after the answer is masked out: its tokens, features and teacher may be anything, even NaN."""
    algorithm, tables = eagle3(ttt_steps=3), lab.tables()
    draft, document = lab.draft(algorithm, tables), lab.document(16, 4)
    document["mask"][10:] = False
    before = run_loss(algorithm, draft, tables, pack([document]))
    document["aux"][9:], document["last"][9:] = float("nan"), float("nan")
    document["ids"][11:] = 0
    after = run_loss(algorithm, draft, tables, pack([document]))
    after.loss_sum.backward()
    assert torch.equal(before.loss_sum, after.loss_sum)
    assert torch.equal(before.correct, after.correct)
    assert all(bool(p.grad.isfinite().all()) for p in draft.parameters())


def test_order_of_the_samples_changes_nothing_but_rounding(lab, pack, eagle3, run_loss):
    """Oracle 9."""
    algorithm, tables = eagle3(), lab.tables()
    draft, documents = lab.draft(algorithm, tables), [lab.document(n, 3) for n in (8, 30, 17)]
    forwards = run_loss(algorithm, draft, tables, pack(documents))
    backwards = run_loss(algorithm, draft, tables, pack(documents[::-1]))
    torch.testing.assert_close(forwards.loss_sum, backwards.loss_sum, rtol=1e-6, atol=0)
    assert torch.equal(forwards.correct, backwards.correct)


def test_packed_samples_give_the_loss_and_gradients_of_samples_one_by_one(lab, pack, eagle3, run_loss, gradients):
    algorithm, tables = eagle3(), lab.tables()
    draft = lab.draft(algorithm, tables, draft_vocab_size=13)
    documents = [lab.document(n, n // 3) for n in (8, 40, 17, 3, 64, 21)]
    outputs = [run_loss(algorithm, draft, tables, pack([document])) for document in documents]
    torch.stack([output.loss_sum for output in outputs]).sum().backward()
    expected = gradients(draft)
    draft.zero_grad()
    packed = run_loss(algorithm, draft, tables, pack(documents))
    packed.loss_sum.backward()
    torch.testing.assert_close(packed.loss_sum, sum(output.loss_sum for output in outputs), rtol=1e-6, atol=0)
    assert torch.equal(packed.correct, sum(output.correct for output in outputs))
    assert packed.runs.sums()[0] == sum(output.runs.sums()[0] for output in outputs)
    for name, gradient in gradients(draft).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_later_steps_teach_the_fusion_layer(lab, pack, eagle3):
    """Oracle 10. Detaching the states that later steps receive would change the gradient of fc."""
    algorithm, tables = eagle3(ttt_steps=2), lab.tables()
    draft, batch = lab.draft(algorithm, tables), pack([lab.document(12, 3)])
    plan, supervision = plan_unroll(batch, supervised_rows(batch, 2, 2))
    teacher = make_teacher(draft, tables, batch, supervision)
    only_last = torch.tensor([[0.0], [1.0]])
    loss = unroll_loss(draft, unroll(draft, tables, batch, plan), supervision, teacher, only_last, SOFT_CE).loss_sum
    through = torch.autograd.grad(loss, draft.fc.weight)[0]
    readouts = unroll(draft, tables, batch, plan)
    hidden_free = [readouts[0], readouts[1].detach()]
    loss = unroll_loss(draft, hidden_free, supervision, teacher, torch.ones(1), SOFT_CE).loss_sum
    first_only = torch.autograd.grad(loss, draft.fc.weight)[0]
    assert float(through.abs().max()) > 1e-3
    assert not torch.allclose(through, first_only)


def test_norm_output_changes_nothing_at_step_zero_and_something_later(lab, pack, eagle3, run_loss):
    """Oracle 14."""
    algorithm, tables = eagle3(ttt_steps=2), lab.tables()
    plain = lab.draft(algorithm, tables)
    fed_back = lab.draft(algorithm, tables, norm_output=True)
    fed_back.load_state_dict(plain.state_dict())
    batch = pack([lab.document(14, 3)])
    first, second = (run_loss(algorithm, draft, tables, batch).metrics for draft in (plain, fed_back))
    assert torch.equal(first["loss_step_0"][0], second["loss_step_0"][0])
    assert not torch.allclose(first["loss_step_1"][0], second["loss_step_1"][0], rtol=1e-3)


def test_compact_teacher_equals_the_dense_teacher(lab, monkeypatch):
    """Oracle 12."""
    tables, last = lab.tables(), lab.random(30, 16)
    t2d = torch.zeros(40, dtype=torch.bool)
    t2d[::3] = True
    needed = torch.zeros(30, dtype=torch.bool)
    needed[5:29:2] = True
    monkeypatch.setattr("specforge.algorithms.parts.losses.MIN_CHUNK_ROWS", 5)
    monkeypatch.setattr("specforge.algorithms.parts.losses.CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr("specforge.algorithms.parts.losses.TILE_ROWS", 7)
    compact, dense = Teacher(tables, last, needed, t2d), dense_teacher(tables.lm_head, last, t2d)
    rows = compact.slots[needed]
    logits = compact.logits(rows)
    kept_mass = (logits.logsumexp(-1) - compact.total[rows]).exp()
    torch.testing.assert_close(torch.softmax(logits, -1), dense.probabilities[needed], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept_mass, dense.kept_mass[needed], rtol=1e-5, atol=1e-7)
    assert torch.equal(compact.best[rows], dense.best[needed])
    assert torch.equal(compact.in_vocabulary[rows], dense.in_vocabulary[needed])


def test_chunk_size_of_the_loss_changes_nothing_but_rounding(lab, pack, eagle3, run_loss, monkeypatch):
    algorithm, tables = eagle3(), lab.tables()
    draft, batch = lab.draft(algorithm, tables), pack([lab.document(40, 3)])
    whole = run_loss(algorithm, draft, tables, batch)
    monkeypatch.setattr("specforge.algorithms.parts.losses.MIN_CHUNK_ROWS", 3)
    monkeypatch.setattr("specforge.algorithms.parts.losses.CHUNK_ELEMENTS", {"cpu": 1})
    chunked = run_loss(algorithm, draft, tables, batch)
    torch.testing.assert_close(chunked.loss_sum, whole.loss_sum, rtol=1e-6, atol=0)
    assert torch.equal(chunked.correct, whole.correct)


def test_metrics_count_what_their_names_say(lab, pack, eagle3):
    """Rows, right answers, runs and the overlap against the definitions, row by row."""
    algorithm, tables = eagle3(ttt_steps=3), lab.tables()
    draft = lab.draft(algorithm, tables, draft_vocab_size=25)
    batch = pack([lab.document(10, 2), lab.document(13, 6)])
    supervised = supervised_rows(batch, 3, 2)
    plan, everything = plan_unroll(batch, torch.ones_like(supervised))
    supervision = Supervision(supervised, everything.teachers)
    teacher = make_teacher(draft, tables, batch, supervision)
    output = unroll_loss(draft, unroll(draft, tables, batch, plan), supervision, teacher, torch.ones(1), SOFT_CE)
    dense, logits = (
        dense_teacher(tables.lm_head, batch.features["last"], draft.t2d),
        dense_logits(draft, tables, batch, 3),
    )
    right = torch.zeros(3, 23, dtype=torch.bool)
    overlap = [0.0, 0.0, 0.0]
    for k, j in supervised.nonzero().tolist():
        right[k, j] = target_ids(draft.d2t)[logits[k][j].argmax()] == dense.best[j + 1 + k]
        if dense.in_vocabulary[j + 1 + k]:
            full = dense.probabilities[j + 1 + k] * dense.kept_mass[j + 1 + k]
            overlap[k] += float(torch.minimum(full, torch.softmax(logits[k][j].detach(), -1)).sum())
    assert output.correct.tolist() == right.sum(1).tolist()
    assert output.count.tolist() == supervised.sum(1).tolist()
    first = supervised[0].nonzero().squeeze(-1)
    runs = sum(1 + int(right[0, j]) + int(right[:2, j].all()) + int(right[:, j].all()) for j in first)
    assert [int(x) for x in output.runs.sums()] == [runs, len(first)]
    rates = [float(output.metrics[f"acceptance_rate_{k}"][0]) for k in range(3)]
    assert rates == pytest.approx(overlap, rel=1e-4)
