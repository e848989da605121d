"""The obvious form of the EAGLE-3 unroll: one dense mask over a growing cache. For tests, which compare with it.

Legend: T packed tokens, K steps, W draft vocabulary, C columns, n query heads, d size of a query or
key head, e of a value head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.eagle3.model import Eagle3Draft


def unroll_mask(document_ids: Tensor, step: int) -> Tensor:
    """bool [T, (step + 1) * T]: what each row sees at ``step``; columns are the rows of step 0, then of step 1, ..."""
    num_rows = document_ids.numel()
    rows = torch.arange(num_rows)
    same = document_ids[:, None] == document_ids[None, :]
    causal = same & (rows[None, :] <= rows[:, None])
    diagonal = torch.eye(num_rows, dtype=torch.bool)
    return torch.cat([causal] + [diagonal] * step, dim=1)


@dataclass(frozen=True, slots=True)
class DenseInputs:
    """``aux`` [T, D], ``token_ids`` int64 [K, T] (embedded at each step), ``positions``, ``document_ids`` int64 [T]."""

    aux: Tensor
    embed_tokens: Tensor
    token_ids: Tensor
    positions: Tensor
    document_ids: Tensor


DenseAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries [T, n, d], keys [C, n, d], values [C, n, e], mask bool [T, C] -> [T, n, e]."""


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The formula."""
    scores = torch.einsum("qhd,chd->hqc", queries, keys) * queries.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")).float(), dim=-1)
    return torch.einsum("hqc,che->qhe", weights, values)


def library_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's own."""
    q, k, v = (tensor.transpose(0, 1) for tensor in (queries, keys, values))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def dense_unroll(draft: Eagle3Draft, inputs: DenseInputs, attend: DenseAttention = softmax_attention) -> list[Tensor]:
    """Logits of every step, K tensors [T, W], all rows computed."""
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    hidden = draft.fuse(inputs.aux)
    weight, split = attention.input_weight(), attention.num_query_features
    repeats = attention.num_heads // attention.num_groups
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = []
    for step, ids in enumerate(inputs.token_ids):
        normed = layer.hidden_norm(hidden)
        both = torch.cat((layer.input_layernorm(inputs.embed_tokens[ids]), normed), dim=-1)
        angles = attention.rotary(inputs.positions + step)
        projected = torch.nn.functional.linear(both, weight)
        queries = attention.queries(projected[:, :split], angles)
        new_keys, new_values = attention.keys_values(projected[:, split:], angles)
        keys.append(new_keys.repeat_interleave(repeats, dim=1))
        values.append(new_values.repeat_interleave(repeats, dim=1))
        attended = attend(queries, torch.cat(keys), torch.cat(values), unroll_mask(inputs.document_ids, step))
        readout, hidden = draft.read_out(layer.finish(hidden, normed, attended))
        logits.append(draft.lm_head(readout))
    return logits


@dataclass(frozen=True, slots=True)
class DenseTeacher:
    """The target's distributions at every token, restricted to the draft vocabulary.

    ``probabilities`` fp32 [T, W] add up to 1 over the kept ids, which have ``kept_mass`` [T] of the full distribution;
    ``best`` int64 [T] is the greedy token, ``in_vocabulary`` bool [T] whether the draft has it.
    """

    probabilities: Tensor
    kept_mass: Tensor
    best: Tensor
    in_vocabulary: Tensor


def dense_teacher(lm_head: Tensor, last: Tensor, t2d: Tensor) -> DenseTeacher:
    """The teacher at every token from logits [T, V] that all exist at once."""
    logits = torch.nn.functional.linear(last, lm_head).float()
    best = logits.argmax(-1)
    return DenseTeacher(
        probabilities=torch.softmax(logits[:, t2d], dim=-1),
        kept_mass=torch.softmax(logits, dim=-1)[:, t2d].sum(-1),
        best=best,
        in_vocabulary=t2d[best],
    )
