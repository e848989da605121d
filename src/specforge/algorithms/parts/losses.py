"""Linear heads and their losses, fused and chunked: no logits of all rows, of draft or teacher, ever exist.

Logits of a draft are a sum of products, one a :class:`Source` (for most drafts one: hidden states and the head). An
:class:`Objective` turns the logits of a chunk of rows into losses and into the slopes of the products. Gradients are
computed in the forward, chunk by chunk, so what the backward does is one multiplication.

Legend: V target vocabulary, W draft vocabulary, D width of a source, Ht hidden size of the target, M loss rows,
m rows of a chunk, T packed tokens, Y tokens that have a teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import TargetTables, target_logits

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that are alive at once in each of a chunk's few buffers (CPU: 4 MB of fp32)."""

MIN_CHUNK_ROWS = 128
"""A chunk has at least these many rows, so that reading the head is not the whole cost of a large vocabulary."""

MAX_CHUNK_ROWS = {"cpu": 512, "cuda": 1 << 16}
"""On a CPU more rows make no product faster, and a small vocabulary's logits stay in its cache."""

TILE_ROWS = 4096
"""Rows of the target's head whose logits exist at once while its full distribution is only summed up."""


@dataclass(frozen=True, slots=True)
class Source:
    """One product of the logits, ``softcap(inputs @ head.T + bias)``: ``inputs`` [M, D], ``head`` [W, D], ``bias`` [W].

    ``inputs`` and ``head`` get gradients where they require them, ``bias`` never does.
    """

    inputs: Tensor
    head: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


def target_head(tables: TargetTables, hidden: Tensor) -> Source:
    """The product of a draft that shares the target's frozen head: what the target would do to ``hidden`` [M, Ht]."""
    scaled = hidden if tables.logit_scale == 1.0 else hidden * tables.logit_scale
    bias = None if tables.lm_head_bias is None else tables.lm_head_bias * tables.logit_scale
    return Source(scaled, tables.lm_head.detach(), bias, tables.logit_softcap)


class Objective(ABC):
    """The loss of M rows, and what is measured on the way (kept as attributes [M], without gradient).

    ``group``: rows of which a chunk holds none or all (such as the slots of a block).
    """

    num_rows: int
    group: int = 1

    @abstractmethod
    def evaluate(self, rows: slice, products: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Weighted losses fp32 [m] of ``rows``, and for each product its slope, the derivative of their sum [m, W].

        ``products`` are fp32 [m, W] and may be overwritten; the same tensor may be the slope of several.
        """


def fused_loss(sources: Sequence[Source], objective: Objective) -> Tensor:
    """Sum of the weighted losses of all rows, a scalar fp32. Softmax and sums are fp32 whatever the inputs are."""
    flat = [tensor for source in sources for tensor in (source.inputs, source.head)]
    loss: Tensor = _FusedLoss.apply(tuple(sources), objective, torch.is_grad_enabled(), *flat)  # type: ignore[no-untyped-call]
    return loss


def chunk_rows(num_columns: int, group: int, device: torch.device) -> int:
    """Rows of a chunk of logits [rows, num_columns]: a multiple of ``group``."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    rows = min(max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS[kind] // num_columns), MAX_CHUNK_ROWS[kind])
    return max(1, rows // group) * group


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sources: tuple[Source, ...], objective: Objective, learn: bool, *_flat: Tensor) -> Tensor:
        wanted = [learn and needed for needed in ctx.needs_input_grad[3:]]
        dtypes = [_product_dtype(source.inputs) for source in sources]
        heads = [source.head.to(dtype) for source, dtype in zip(sources, dtypes, strict=True)]
        grads: list[Tensor | None] = []
        for place, source in enumerate(sources):
            grads.append(torch.empty_like(source.inputs) if wanted[2 * place] else None)
            grads.append(torch.zeros_like(source.head, dtype=torch.float32) if wanted[2 * place + 1] else None)
        device = heads[0].device
        losses = torch.zeros(objective.num_rows, dtype=torch.float32, device=device)
        step = chunk_rows(heads[0].shape[0], objective.group, device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for start in range(0, objective.num_rows, step):
                rows = slice(start, min(start + step, objective.num_rows))
                inputs = [source.inputs[rows].to(dtype) for source, dtype in zip(sources, dtypes, strict=True)]
                products = [_product(*parts) for parts in zip(sources, inputs, heads, strict=True)]
                dampings = [_damping(source, product) for source, product in zip(sources, products, strict=True)]
                losses[rows], slopes = objective.evaluate(rows, products)
                for place, (plain, damping) in enumerate(zip(slopes, dampings, strict=True)):
                    slope = (plain if damping is None else plain * damping).to(dtypes[place])
                    grad_inputs, grad_head = grads[2 * place], grads[2 * place + 1]
                    if grad_inputs is not None:
                        _write_product(grad_inputs[rows], slope, heads[place])
                    if grad_head is not None:
                        _add_product(grad_head, slope.T, inputs[place])
        flat = [tensor for source in sources for tensor in (source.inputs, source.head)]
        ctx.gradients = [None if g is None else g.to(t.dtype) for g, t in zip(grads, flat, strict=True)]
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        gradients = [None if g is None else g.mul_(upstream[0]) for g in ctx.gradients]
        ctx.gradients = ()
        return None, None, None, *gradients


def _product_dtype(inputs: Tensor) -> torch.dtype:
    """The lower precision where autocast is on, as for any other product; what follows the product is fp32."""
    device = inputs.device.type
    lower = inputs.dtype is torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if lower else inputs.dtype


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _product(source: Source, inputs: Tensor, head: Tensor) -> Tensor:
    product = F.linear(inputs, head).float()
    if source.bias is not None:
        product += source.bias.float()
    return product if source.softcap is None else torch.tanh(product / source.softcap) * source.softcap


def _damping(source: Source, product: Tensor) -> Tensor | None:
    """Derivative of the soft cap."""
    return None if source.softcap is None else 1.0 - (product / source.softcap).square()


def softmax_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites ``logits`` [m, W] with their softmax; (softmax, logsumexp [m], index of the largest [m])."""
    exponentials, total, highest, best = _exponentials_(logits)
    return exponentials.div_(total.unsqueeze(-1)), highest + total.log(), best


def _exponentials_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overwrites ``logits`` [m, W] with exp(logits - largest); (those, their sum, the largest, its index)."""
    highest, best = logits.max(-1)
    logits.sub_(highest.unsqueeze(-1)).exp_()
    return logits, logits.sum(-1), highest, best


class HardLabels(Objective):
    """Cross entropy against one token a row. ``labels`` int64 [M] (draft ids), ``weights`` fp32 [M].

    Measures ``cross_entropy`` and ``proposal`` (the draft's greedy id). With several sources, logits are their sum.
    """

    def __init__(self, labels: Tensor, weights: Tensor, group: int = 1) -> None:
        self.labels, self.weights, self.group = labels, weights, group
        self.num_rows = labels.numel()
        self.cross_entropy = torch.zeros(self.num_rows, dtype=torch.float32, device=labels.device)
        self.proposal = torch.zeros_like(labels)

    def row_weights(self, rows: slice) -> Tensor:
        """Weights of ``rows``, whose ``cross_entropy`` is there."""
        return self.weights[rows]

    def evaluate(self, rows: slice, products: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits = products[0]
        for product in products[1:]:
            logits += product
        labels = self.labels[rows].unsqueeze(-1)
        chosen = logits.gather(-1, labels).squeeze(-1)
        slope, total, highest, self.proposal[rows] = _exponentials_(logits)
        self.cross_entropy[rows] = highest + total.log() - chosen
        weights = self.row_weights(rows)
        slope.mul_((weights / total).unsqueeze(-1)).scatter_add_(-1, labels, -weights.unsqueeze(-1))
        return self.cross_entropy[rows] * weights, [slope] * len(products)


class Teacher:
    """The target's distributions at some tokens, restricted to the draft vocabulary. Logits are made a chunk at a time,
    in the precision of the tables.

    * ``slots`` int64 [T]: index below of a packed token (only where it was asked for)
    * ``best`` int64 [Y]: the target's greedy token, the lowest id on ties
    * ``total`` fp32 [Y]: logsumexp of the full logits; those of the kept ids give the probability that they have
    * ``in_vocabulary`` bool [Y]: whether the draft has the greedy token

    For a full vocabulary the last three are ``None``: everything is kept, and the greedy token comes with the logits.
    """

    @torch.no_grad()
    def __init__(self, tables: TargetTables, last: Tensor, tokens: Tensor, t2d: Tensor) -> None:
        """``last`` [T, Ht] after the final norm, ``tokens`` bool [T] that need a teacher, ``t2d`` bool [V] kept ids."""
        self.slots = tokens.cumsum(0) - 1
        kept = t2d.nonzero().squeeze(-1)
        self.num_columns = kept.numel()
        self.best = self.total = self.in_vocabulary = None
        self._last = last[tokens].to(tables.lm_head.dtype)
        self._tables = tables
        if self.num_columns < t2d.numel():
            self._tables = _columns(tables, kept)
            with torch.autocast(last.device.type, enabled=False):
                self.total, self.best = _summary(tables, self._last)
            self.in_vocabulary = t2d[self.best]

    def known(self, teacher_rows: Tensor) -> Tensor:
        """bool [M]: whether the draft has the greedy token of ``teacher_rows`` [M]."""
        if self.in_vocabulary is None:
            return torch.ones_like(teacher_rows, dtype=torch.bool)
        return self.in_vocabulary[teacher_rows]

    @torch.no_grad()
    def logits(self, teacher_rows: Tensor, bounds: tuple[int, int] | None = None) -> Tensor:
        """Restricted logits fp32 [m, W] of ``teacher_rows`` int64 [m], ascending: each token is computed once.

        ``bounds``: the first and the last of them, where the caller knows; then the device is not waited for.
        """
        with torch.autocast(teacher_rows.device.type, enabled=False):
            if bounds is None or bounds[1] - bounds[0] >= teacher_rows.numel():
                unique, places = torch.unique_consecutive(teacher_rows, return_inverse=True)
                return target_logits(self._tables, self._last[unique]).index_select(0, places)
            computed = target_logits(self._tables, self._last[bounds[0] : bounds[1] + 1])
            return computed.index_select(0, teacher_rows - bounds[0])


def _columns(tables: TargetTables, ids: Tensor | slice) -> TargetTables:
    bias = None if tables.lm_head_bias is None else tables.lm_head_bias[ids]
    return replace(tables, lm_head=tables.lm_head[ids], lm_head_bias=bias)


def _summary(tables: TargetTables, last: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp fp32 [Y] and greedy id [Y] (the lowest on ties) over the whole head, a tile of it at a time."""
    num_rows, num_columns = last.shape[0], tables.lm_head.shape[0]
    total = torch.full((num_rows,), float("-inf"), dtype=torch.float32, device=last.device)
    highest, best = total.clone(), torch.zeros(num_rows, dtype=torch.int64, device=last.device)
    step = chunk_rows(TILE_ROWS, 1, last.device)
    for column in range(0, num_columns, TILE_ROWS):
        tile = _columns(tables, slice(column, column + TILE_ROWS))
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            _, mass, value, index = _exponentials_(target_logits(tile, last[rows]))
            best[rows] = torch.where(value > highest[rows], index + column, best[rows])
            highest[rows] = torch.maximum(value, highest[rows])
            total[rows] = torch.logaddexp(total[rows], value + mass.log())
    return total, best


Factors = tuple[Tensor, Tensor | None, Tensor | None]
"""Of each row [m], no gradient: factors of the cross entropy, of ``1 - alpha``, of ``-log alpha`` (``None``: 0)."""

Distance = Callable[[Tensor], Factors]
"""The factors that rows get for their overlaps ``alpha`` [m]."""


def cross_entropy(alpha: Tensor) -> Factors:
    """Soft cross entropy against the teacher renormalised inside the draft vocabulary."""
    return torch.ones_like(alpha), None, None


def total_variation(alpha: Tensor) -> Factors:
    """``1 - alpha``: the chance that a sampled token is refused."""
    return torch.zeros_like(alpha), torch.ones_like(alpha), None


def negative_log_acceptance(alpha: Tensor) -> Factors:
    """``-log alpha``, nothing where alpha is 0 (LK losses, arXiv 2602.23881)."""
    return torch.zeros_like(alpha), None, (alpha > 0).float()


def lk_hybrid(decay: float, scale: float = 1.0) -> Distance:
    """``lam * CE + (1 - lam) * (1 - alpha)`` with ``lam = scale * exp(-decay * alpha)`` of each row (arXiv 2602.23881).

    Cross entropy stands for the KL divergence: they differ by the teacher's entropy, which has no gradient.
    """

    def mix(alpha: Tensor) -> Factors:
        share = scale * torch.exp(-decay * alpha)
        return share, 1.0 - share, None

    return mix


class SoftTargets(Objective):
    """A draft's distribution q against the teacher's: ``p`` is renormalised inside the draft vocabulary for the cross
    entropy, the full one for the overlap ``alpha = sum over kept ids of min(p, q)``, the chance that a sampled token is
    accepted.

    ``teacher_rows`` int64 [M] must ascend. ``weights`` fp32 [M]. ``distance`` gives the factors of a row's losses.
    Measures ``cross_entropy``, ``overlap``, ``losses`` (before ``weights``), ``proposal`` (the draft's greedy id) and
    ``teacher_best`` (the target's greedy token, a target id; with a full vocabulary both are the same ids).
    """

    def __init__(
        self, teacher: Teacher, teacher_rows: Tensor, weights: Tensor, distance: Distance = cross_entropy
    ) -> None:
        self.teacher, self.teacher_rows, self.weights, self.distance = teacher, teacher_rows, weights, distance
        self.num_rows = teacher_rows.numel()
        self.cross_entropy = torch.zeros(self.num_rows, dtype=torch.float32, device=teacher_rows.device)
        self.overlap, self.losses = torch.zeros_like(self.cross_entropy), torch.zeros_like(self.cross_entropy)
        self.proposal = torch.zeros_like(teacher_rows)
        self.teacher_best = torch.zeros_like(teacher_rows) if teacher.best is None else teacher.best[teacher_rows]
        self._host_rows = teacher_rows.cpu()

    def factors(self, rows: slice, alpha: Tensor) -> Factors:
        """Those of ``rows``, whose overlap is ``alpha`` [m]."""
        del rows
        return self.distance(alpha)

    def evaluate(self, rows: slice, products: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits = products[0]
        for product in products[1:]:
            logits += product
        teacher_rows, weights = self.teacher_rows[rows], self.weights[rows]
        bounds = (int(self._host_rows[rows.start]), int(self._host_rows[rows.stop - 1]))
        target, inside, best = softmax_(self.teacher.logits(teacher_rows, bounds))
        agreement = torch.linalg.vecdot(target, logits)
        draft, total, self.proposal[rows] = softmax_(logits)
        self.cross_entropy[rows] = entropy = total - agreement
        if self.teacher.total is None:
            self.teacher_best[rows] = best
            full = target
        else:
            full = target * (inside - self.teacher.total[teacher_rows]).exp_().unsqueeze(-1)
        self.overlap[rows] = alpha = torch.minimum(full, draft).sum(-1)
        of_entropy, of_variation, of_log = self.factors(rows, alpha)
        losses, against_alpha = of_entropy * entropy, None
        if of_variation is not None:
            losses += of_variation * (1.0 - alpha)
            against_alpha = of_variation
        if of_log is not None:
            bounded = alpha.clamp(min=TINY)
            losses -= of_log * bounded.log()
            against_alpha = of_log / bounded if against_alpha is None else against_alpha + of_log / bounded
        self.losses[rows] = losses
        pull = (of_entropy * weights).unsqueeze(-1)
        if against_alpha is None:
            slope = draft.sub_(target).mul_(pull)
        else:
            slope = _overlap_slope(draft, full).mul_((against_alpha * weights).unsqueeze(-1))
            slope.addcmul_(draft.sub_(target), pull)
        return losses * weights, [slope] * len(products)


def _overlap_slope(draft: Tensor, full: Tensor) -> Tensor:
    """``d(-alpha) / d(logit v) = q_v * (sum of q_u over u with q_u < p_u, minus [q_v < p_v])``, [m, W]."""
    gaining = (draft < full).to(draft.dtype)
    covered = torch.linalg.vecdot(draft, gaining)
    return gaining.neg_().add_(covered.unsqueeze(-1)).mul_(draft)


class WeighedTargets(SoftTargets):
    """Soft targets whose factors were chosen beforehand: ``shares`` fp32 [M] of the cross entropy, of ``1 - alpha``."""

    def __init__(self, teacher: Teacher, teacher_rows: Tensor, weights: Tensor, shares: tuple[Tensor, Tensor]) -> None:
        super().__init__(teacher, teacher_rows, weights)
        self.shares = shares

    def factors(self, rows: slice, alpha: Tensor) -> Factors:
        del alpha
        return self.shares[0][rows], self.shares[1][rows], None


TINY = torch.finfo(torch.float32).tiny
