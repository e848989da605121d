"""Soft cross entropy of a draft against a frozen teacher, chunked over rows.

Legend: V target vocabulary, W draft vocabulary, H hidden size, Y rows that have a teacher, M loss rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge.algorithms.base import TargetTables, target_logits

TEACHER_CHUNK_ELEMENTS = 1 << 22
"""Logits of the teacher that are alive at once: rows of a chunk times V (16 MB of fp32)."""

LOSS_CHUNK_ELEMENTS = 1 << 19
"""Logits of the draft that are alive at once: rows of a chunk times W (2 MB of fp32, which stays in a CPU's cache)."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """The target's distributions at some tokens, restricted to the draft vocabulary.

    * ``slots`` int64 [T]: row of the tensors below that belongs to a packed token (only where it was asked for)
    * ``probabilities`` fp32 [Y, W]: softmax over the kept ids alone, the training target
    * ``kept_mass`` fp32 [Y]: probability that the full distribution gives to the kept ids
    * ``best`` int64 [Y]: the target's greedy token, the lowest id on ties
    * ``in_vocabulary`` bool [Y]: whether the draft has that token
    """

    slots: Tensor
    probabilities: Tensor
    kept_mass: Tensor
    best: Tensor
    in_vocabulary: Tensor


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Of each loss row, without gradient: ``cross_entropy`` [M], ``proposal`` [M] (greedy draft id), ``overlap`` [M].

    ``overlap`` is the sum over kept ids of min(full teacher probability, draft probability): the chance that a sampled
    token is accepted.
    """

    cross_entropy: Tensor
    proposal: Tensor
    overlap: Tensor


@torch.no_grad()
def teach(tables: TargetTables, last: Tensor, tokens: Tensor, t2d: Tensor) -> Teacher:
    """The teacher at ``tokens`` (bool [T]) from the last hidden states ``last`` [T, Ht], computed once for all steps.

    ``t2d`` bool [V] marks the kept ids. Logits exist for one chunk of rows at a time.
    """
    rows = tokens.nonzero().squeeze(-1)
    slots = tokens.cumsum(0) - 1
    vocab_size = tables.lm_head.shape[0]
    kept = t2d.nonzero().squeeze(-1)
    size = kept.numel()
    probabilities = torch.empty(rows.numel(), size, dtype=torch.float32, device=last.device)
    kept_mass = torch.ones(rows.numel(), dtype=torch.float32, device=last.device)
    best = torch.empty(rows.numel(), dtype=torch.int64, device=last.device)
    step = max(1, TEACHER_CHUNK_ELEMENTS // vocab_size)
    for start in range(0, rows.numel(), step):
        chunk = slice(start, start + step)
        logits = target_logits(tables, last[rows[chunk]])
        best[chunk] = logits.argmax(-1)
        if size < vocab_size:
            inside = logits.index_select(-1, kept)
            kept_mass[chunk] = (inside.logsumexp(-1) - logits.logsumexp(-1)).exp()
            logits = inside
        probabilities[chunk] = torch.softmax(logits, dim=-1)
    return Teacher(slots, probabilities, kept_mass, best, t2d[best])


def soft_cross_entropy(
    hidden: Tensor, head: Tensor, teacher: Teacher, teacher_rows: Tensor, weights: Tensor
) -> tuple[Tensor, RowLosses]:
    """``sum(weights * CE(teacher, softmax(hidden @ head.T)))`` and the details of each row.

    ``hidden`` [M, H], ``head`` [W, H], ``teacher_rows`` int64 [M] (rows of ``teacher``), ``weights`` fp32 [M], known
    beforehand. Gradients (with respect to ``hidden`` and ``head``) are computed in the forward, chunk by chunk, so that
    logits of all rows never exist at once. Softmax and sums are fp32 whatever the dtype of ``hidden``.
    """
    loss, *rows = _SoftCrossEntropy.apply(hidden, head, teacher, teacher_rows, weights, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss, RowLosses(*rows)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, teacher: Teacher, teacher_rows: Tensor, weights: Tensor, learn: bool
    ) -> tuple[Tensor, ...]:
        num_rows = hidden.shape[0]
        matrix = head.to(hidden.dtype)  # under autocast, hidden is in the lower precision and the head is not
        grad_hidden = torch.empty_like(hidden) if learn and ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if learn and ctx.needs_input_grad[1] else None
        entropy = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        overlap, proposal = torch.empty_like(entropy), torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
        step = max(1, LOSS_CHUNK_ELEMENTS // head.shape[0])
        for start in range(0, num_rows, step):
            chunk = slice(start, start + step)
            logits = torch.nn.functional.linear(hidden[chunk], matrix).float()
            probabilities = teacher.probabilities.index_select(0, teacher_rows[chunk])
            highest, proposal[chunk] = logits.max(-1)
            agreement = torch.linalg.vecdot(probabilities, logits)
            draft = logits.sub_(highest.unsqueeze(-1)).exp_()
            total = draft.sum(-1)
            entropy[chunk] = highest + total.log() - agreement
            draft.div_(total.unsqueeze(-1))
            if grad_hidden is not None or grad_head is not None:
                slope = (draft - probabilities).mul_(weights[chunk].unsqueeze(-1)).to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(slope, matrix, out=grad_hidden[chunk])
                if grad_head is not None:
                    grad_head += (slope.T @ hidden[chunk]).float()
            full = probabilities.mul_(teacher.kept_mass[teacher_rows[chunk]].unsqueeze(-1))
            overlap[chunk] = torch.minimum(full, draft, out=full).sum(-1)
        ctx.gradients = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        ctx.mark_non_differentiable(entropy, proposal, overlap)
        return torch.dot(entropy, weights), entropy, proposal, overlap

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        grad_hidden, grad_head = (None if g is None else g.mul_(upstream[0]) for g in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_head, None, None, None, None
