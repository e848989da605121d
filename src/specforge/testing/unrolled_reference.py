"""The obvious form of the EAGLE-3 unroll: one dense mask over a growing cache. For tests, which compare with it.

Legend: T packed tokens, K steps, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.losses import Teacher


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


def dense_unroll(draft: Eagle3Draft, inputs: DenseInputs) -> list[Tensor]:
    """Logits of every step, K tensors [T, W], all rows computed."""
    layer, attention = draft.midlayer, draft.midlayer.self_attn
    hidden = draft.fuse(inputs.aux)
    heads, groups, _ = attention.head_counts
    keys: list[Tensor] = []
    values: list[Tensor] = []
    logits = []
    for step, ids in enumerate(inputs.token_ids):
        normed = layer.hidden_norm(hidden)
        both = torch.cat((layer.input_layernorm(inputs.embed_tokens[ids]), normed), dim=-1)
        angles = attention.rotary(inputs.positions + step)
        queries = attention.queries(attention.q_proj(both), angles)
        new = attention.keys_values(torch.cat((attention.k_proj(both), attention.v_proj(both)), dim=-1), angles)
        keys.append(new[0].repeat_interleave(heads // groups, dim=1))
        values.append(new[1].repeat_interleave(heads // groups, dim=1))
        scores = torch.einsum("qhd,chd->hqc", queries, torch.cat(keys)) * attention.head_dim**-0.5
        scores = scores.masked_fill(~unroll_mask(inputs.document_ids, step), float("-inf"))
        attended = torch.einsum("hqc,chd->qhd", torch.softmax(scores.float(), dim=-1), torch.cat(values))
        readout, hidden = draft.read_out(layer.finish(hidden, normed, attended))
        logits.append(draft.lm_head(readout))
    return logits


def dense_teacher(lm_head: Tensor, last: Tensor, t2d: Tensor) -> Teacher:
    """The teacher at every token from logits [T, V] that all exist at once."""
    logits = torch.nn.functional.linear(last, lm_head).float()
    full = torch.softmax(logits, dim=-1)
    best = logits.argmax(-1)
    return Teacher(
        slots=torch.arange(last.shape[0]),
        probabilities=torch.softmax(logits[:, t2d], dim=-1),
        kept_mass=full[:, t2d].sum(-1),
        best=best,
        in_vocabulary=t2d[best],
    )
