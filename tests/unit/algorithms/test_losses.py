"""The fused losses against plain autograd on whole logits.

Legend: M rows, W draft vocabulary, V target vocabulary, D width of a source.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from specforge.algorithms.base import TargetTables, target_logits
from specforge.algorithms.parts import losses
from specforge.algorithms.parts.losses import (
    HardLabels,
    SoftTargets,
    Source,
    Teacher,
    WeighedTargets,
    cross_entropy,
    fused_loss,
    lk_hybrid,
    negative_log_acceptance,
    target_head,
    total_variation,
)

ROWS, TOKENS, WIDTH, VOCAB = 23, 11, 6, 17


def mixed(alpha):
    return torch.full_like(alpha, 0.1), torch.full_like(alpha, 1.8), None


def everything(alpha):
    return alpha * 0.5, torch.full_like(alpha, 0.3), torch.full_like(alpha, 0.7)


DISTANCES = {
    "cross_entropy": cross_entropy,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid(3.0, 0.8),
    "mixed": mixed,
    "everything": everything,
}


@pytest.fixture(params=["one chunk", "small chunks"])
def chunks(request, monkeypatch):
    if request.param == "small chunks":
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", 5)
        monkeypatch.setattr(losses, "TILE_ROWS", 4)


@dataclasses.dataclass
class Scene:
    """Sources, labels and a teacher of ``ROWS`` rows; ``kept`` are the ids of the draft vocabulary."""

    sources: list[Source]
    weights: torch.Tensor
    tables: TargetTables
    last: torch.Tensor
    teacher_rows: torch.Tensor
    t2d: torch.Tensor

    @property
    def leaves(self):
        return [tensor for s in self.sources for tensor in (s.inputs, s.head) if tensor.requires_grad]

    def teacher(self):
        return Teacher(self.tables, self.last, torch.ones(TOKENS, dtype=torch.bool), self.t2d)

    def logits(self):
        """fp64 [M, W], with gradients."""
        return sum(plain_product(source) for source in self.sources)

    def teacher_probabilities(self):
        """fp64 [M, V], of the full distribution."""
        wide = {"lm_head": self.tables.lm_head.double(), "lm_head_bias": self.tables.lm_head_bias.double()}
        tables = dataclasses.replace(self.tables, **wide)
        raw = F.linear(self.last.double(), tables.lm_head, tables.lm_head_bias) * tables.logit_scale
        return torch.softmax(torch.tanh(raw / tables.logit_softcap) * tables.logit_softcap, -1)[self.teacher_rows]


def plain_product(source):
    product = F.linear(source.inputs.double(), source.head.double())
    if source.bias is not None:
        product = product + source.bias.double()
    return product if source.softcap is None else torch.tanh(product / source.softcap) * source.softcap


def scene(lab, *, pruned=False, num_sources=1, softcap=None, frozen=False, bias=False):
    t2d = torch.ones(VOCAB, dtype=torch.bool)
    if pruned:
        t2d[::3] = False
    size = int(t2d.sum())
    sources = [
        Source(
            lab.random(ROWS, WIDTH + i).requires_grad_(),
            lab.random(size, WIDTH + i).requires_grad_(not frozen),
            lab.random(size) if bias else None,
            softcap,
        )
        for i in range(num_sources)
    ]
    tables = TargetTables(lab.random(VOCAB, 4), lab.random(VOCAB, 4), 5.0, 0.7, lab.random(VOCAB))
    teacher_rows = torch.randint(0, TOKENS, (ROWS,), generator=lab.generator).sort().values
    return Scene(sources, lab.random(ROWS).abs(), tables, lab.random(TOKENS, 4), teacher_rows, t2d)


VARIANTS = {
    "plain": {},
    "pruned": {"pruned": True},
    "three sources": {"num_sources": 3},
    "soft cap": {"softcap": 2.0, "pruned": True, "num_sources": 2},
    "frozen head": {"frozen": True, "bias": True},
}


def assert_same_gradients(scene, loss, expected):
    mine = torch.autograd.grad(loss, scene.leaves)
    for got, want in zip(mine, torch.autograd.grad(expected, scene.leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def plain_losses(distance, draft, full, kept):
    """fp64 [M] of whole logits, and the overlap; the factors are constants."""
    target, log_q = full[:, kept] / full[:, kept].sum(-1, keepdim=True), torch.log_softmax(draft, -1)
    alpha = torch.minimum(full[:, kept], log_q.exp()).sum(-1)
    of_entropy, of_variation, of_log = distance(alpha.detach())
    total = -of_entropy * (target * log_q).sum(-1)
    total = total if of_variation is None else total + of_variation * (1 - alpha)
    return (total if of_log is None else total - of_log * alpha.log()), alpha


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_labels_equal_plain_cross_entropy(lab, variant):
    case = scene(lab, **VARIANTS[variant])
    logits = case.logits()
    labels = torch.randint(0, logits.shape[1], (ROWS,), generator=lab.generator)
    objective = HardLabels(labels, case.weights)
    loss = fused_loss(case.sources, objective)
    rows = F.cross_entropy(logits, labels, reduction="none")
    expected = (rows * case.weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.cross_entropy.double(), rows.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(objective.proposal, logits.argmax(-1))
    assert_same_gradients(case, loss, expected)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_targets_equal_their_formulas(lab, variant, distance):
    case = scene(lab, **VARIANTS[variant])
    objective = SoftTargets(case.teacher(), case.teacher_rows, case.weights, DISTANCES[distance])
    loss = fused_loss(case.sources, objective)
    full, draft = case.teacher_probabilities(), case.logits()
    rows, alpha = plain_losses(DISTANCES[distance], draft, full, case.t2d)
    expected = (rows * case.weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.losses.double(), rows.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.overlap.double(), alpha.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(objective.proposal, draft.argmax(-1))
    assert torch.equal(objective.teacher_best, full.argmax(-1))
    assert_same_gradients(case, loss, expected)


@pytest.mark.usefixtures("chunks")
def test_chosen_shares_weigh_the_two_losses_row_by_row(lab):
    case = scene(lab, pruned=True)
    shares = (lab.random(ROWS), lab.random(ROWS))
    loss = fused_loss(case.sources, WeighedTargets(case.teacher(), case.teacher_rows, case.weights, shares))
    rows, _ = plain_losses(lambda _: (*shares, None), case.logits(), case.teacher_probabilities(), case.t2d)
    expected = (rows * case.weights).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(case, loss, expected)


def test_slope_of_the_overlap_is_its_numeric_gradient(lab):
    """Oracle 13. Central differences of alpha, whose formula is that of the LK losses."""
    case = scene(lab, pruned=True)
    source = case.sources[0]
    loss = fused_loss([source], SoftTargets(case.teacher(), case.teacher_rows, torch.ones(ROWS), total_variation))
    slope = torch.autograd.grad(loss, source.inputs)[0]
    full, head = case.teacher_probabilities()[:, case.t2d], source.head.detach().double()

    def overlap(inputs):
        return torch.minimum(full, torch.softmax(inputs @ head.T, -1)).sum(-1)

    inputs = source.inputs.detach().double()
    for column in range(WIDTH):
        step = 1e-6 * F.one_hot(torch.tensor(column), WIDTH)
        numeric = (overlap(inputs + step) - overlap(inputs - step)) / 2e-6
        torch.testing.assert_close(slope[:, column].double(), -numeric, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["negative_log_acceptance", "total_variation"])
def test_a_draft_equal_to_its_teacher_loses_nothing(lab, distance):
    """Oracle 13."""
    tables = TargetTables(lab.random(VOCAB, 4), lab.random(VOCAB, 4))
    last = lab.random(TOKENS, 4)
    teacher = Teacher(tables, last, torch.ones(TOKENS, dtype=torch.bool), torch.ones(VOCAB, dtype=torch.bool))
    hidden = last.clone().requires_grad_()
    objective = SoftTargets(teacher, torch.arange(TOKENS), torch.ones(TOKENS), DISTANCES[distance])
    loss = fused_loss([target_head(tables, hidden)], objective)
    torch.testing.assert_close(objective.overlap, torch.ones(TOKENS))
    torch.testing.assert_close(loss, torch.zeros(()), rtol=0, atol=1e-5)


def test_negative_log_acceptance_of_a_point_mass_is_cross_entropy(lab):
    """Oracle 13."""
    best = torch.randint(0, VOCAB, (TOKENS,), generator=lab.generator)
    tables = TargetTables(lab.random(VOCAB, VOCAB), torch.eye(VOCAB) * 200.0)
    everyone = torch.ones(VOCAB, dtype=torch.bool)
    teacher = Teacher(tables, F.one_hot(best, VOCAB).float(), torch.ones(TOKENS, dtype=torch.bool), everyone)
    hidden, head = lab.random(TOKENS, 5).requires_grad_(), lab.random(VOCAB, 5).requires_grad_()
    objective = SoftTargets(teacher, torch.arange(TOKENS), torch.ones(TOKENS), negative_log_acceptance)
    loss = fused_loss([Source(hidden, head)], objective)
    expected = F.cross_entropy(hidden @ head.T, best, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), wanted, rtol=1e-4, atol=1e-5)


def test_an_overlap_of_zero_has_no_loss_and_finite_gradients(lab):
    tables = TargetTables(lab.random(4, 4), torch.eye(4) * 500.0)
    everyone = torch.ones(4, dtype=torch.bool)
    teacher = Teacher(tables, torch.eye(4)[:1], torch.ones(1, dtype=torch.bool), everyone)
    hidden = torch.tensor([[0.0, 500.0, 0.0, 0.0]], requires_grad=True)
    objective = SoftTargets(teacher, torch.zeros(1, dtype=torch.int64), torch.ones(1), negative_log_acceptance)
    loss = fused_loss([Source(hidden, torch.eye(4))], objective)
    loss.backward()
    assert float(loss.detach()) == float(objective.overlap) == 0.0
    assert bool(hidden.grad.isfinite().all())


def test_a_shared_head_does_what_the_target_does(lab):
    case = scene(lab)
    hidden = lab.random(ROWS, 4).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=lab.generator)
    loss = fused_loss([target_head(case.tables, hidden)], HardLabels(labels, torch.ones(ROWS)))
    expected = F.cross_entropy(target_logits(case.tables, hidden), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision_rounds_the_products_and_nothing_else(lab, pruned, autocast):
    """Sums, softmax and the teacher's share stay fp32: the measured loss is that of the rounded logits exactly."""
    case = scene(lab, pruned=pruned)
    source = case.sources[0]
    low = [tensor.detach().bfloat16() for tensor in (source.inputs, source.head)]
    leaves = [t.clone().float().requires_grad_() if autocast else t.clone().requires_grad_() for t in low]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        objective = SoftTargets(case.teacher(), case.teacher_rows, case.weights, lk_hybrid(3.0))
        loss = fused_loss([Source(*leaves)], objective)
    logits = F.linear(*low).double()
    rows, alpha = plain_losses(lk_hybrid(3.0), logits, case.teacher_probabilities(), case.t2d)
    torch.testing.assert_close(objective.losses.double(), rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.overlap.double(), alpha, rtol=1e-5, atol=1e-6)
    assert loss.dtype is torch.float32
    loss.backward()
    wide = [t.double().requires_grad_() for t in low]
    rows, _ = plain_losses(lk_hybrid(3.0), F.linear(*wide), case.teacher_probabilities(), case.t2d)
    (rows * case.weights).sum().backward()
    for leaf, exact in zip(leaves, wide, strict=True):
        assert leaf.grad.dtype is leaf.dtype
        assert (leaf.grad.double() - exact.grad).norm() <= 0.02 * exact.grad.norm()


def test_the_backward_scales_by_what_comes_from_above(lab):
    case = scene(lab, num_sources=2)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    whole = fused_loss(case.sources, HardLabels(labels, case.weights))
    part = fused_loss(case.sources, HardLabels(labels, case.weights)) / 8.0
    for big, small in zip(torch.autograd.grad(whole, case.leaves), torch.autograd.grad(part, case.leaves), strict=True):
        torch.testing.assert_close(big / 8.0, small)


def test_no_rows_give_zeros_that_reach_every_source(lab):
    hidden, head = lab.random(0, WIDTH).requires_grad_(), lab.random(VOCAB, WIDTH).requires_grad_()
    tables = TargetTables(lab.random(VOCAB, 4), lab.random(VOCAB, 4))
    none = torch.zeros(0, dtype=torch.int64)
    for t2d in (torch.ones(VOCAB, dtype=torch.bool), torch.arange(VOCAB) < 9):
        teacher = Teacher(tables, lab.random(TOKENS, 4), torch.zeros(TOKENS, dtype=torch.bool), t2d)
        own_head = head[: int(t2d.sum())]
        for objective in (HardLabels(none, torch.zeros(0)), SoftTargets(teacher, none, torch.zeros(0))):
            loss = fused_loss([Source(hidden, own_head)], objective)
            assert float(loss.detach()) == 0.0
            gradients = torch.autograd.grad(loss, (hidden, head))
            assert [g.shape for g in gradients] == [hidden.shape, head.shape]
            assert bool((gradients[1] == 0).all())


def test_a_chunk_holds_whole_groups():
    assert losses.chunk_rows(1 << 30, 7, torch.device("cpu")) == 126
    assert losses.chunk_rows(1 << 30, 200, torch.device("cpu")) == 200
    assert losses.chunk_rows(1 << 10, 8, torch.device("cpu")) == 512


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("pruned", [False, True])
def test_every_teacher_row_is_computed_once_a_chunk_at_most(lab, monkeypatch, pruned):
    """Full vocabulary: the target's head is multiplied once, with each token; pruned, once more with the kept rows."""
    seen = []

    def counting(tables, last):
        seen.append(last.shape[0] * tables.lm_head.shape[0])
        return target_logits(tables, last)

    monkeypatch.setattr(losses, "target_logits", counting)
    case = scene(lab, pruned=pruned)
    monkeypatch.setattr(losses, "MIN_CHUNK_ROWS", ROWS)
    fused_loss(case.sources, SoftTargets(case.teacher(), case.teacher_rows, case.weights))
    used = int(case.teacher_rows.max() - case.teacher_rows.min()) + 1
    kept = int(case.t2d.sum())
    assert sum(seen) == used * kept + (TOKENS * VOCAB if pruned else 0)


def test_teacher_rows_far_apart_are_not_filled_up(lab):
    tables = TargetTables(lab.random(VOCAB, 4), lab.random(VOCAB, 4))
    last = lab.random(50, 4)
    teacher = Teacher(tables, last, torch.ones(50, dtype=torch.bool), torch.ones(VOCAB, dtype=torch.bool))
    rows = torch.tensor([3, 3, 40, 49])
    torch.testing.assert_close(teacher.logits(rows, (3, 49)), target_logits(tables, last[rows]))
    torch.testing.assert_close(teacher.logits(rows[:2], (3, 3)), target_logits(tables, last[rows[:2]]))


def test_greedy_ties_go_to_the_lowest_id(lab, monkeypatch):
    monkeypatch.setattr(losses, "TILE_ROWS", 4)
    head = torch.zeros(VOCAB, 4)
    head[[5, 11, 14]] = 1.0
    tables = TargetTables(lab.random(VOCAB, 4), head)
    t2d = torch.arange(VOCAB) != 16
    teacher = Teacher(tables, torch.ones(TOKENS, 4), torch.ones(TOKENS, dtype=torch.bool), t2d)
    assert teacher.best.tolist() == [5] * TOKENS
