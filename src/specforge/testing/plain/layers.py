"""Layers as they are written down in papers, on functions of PyTorch.

Legend: R rows, C columns, H hidden size, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.parts.rotary import Rotary
from specforge.contracts.batches import TrainBatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def turned(heads: Tensor, positions: Tensor, config: Any) -> Tensor:
    """Rotary embedding of ``heads`` [R, heads, d] at ``positions`` int64 [R]."""
    rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    cos, sin = (torch.cat((half, half), dim=-1).unsqueeze(1) for half in rotary(positions))
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def queries_keys_values(
    weights: Mapping[str, Tensor], prefix: str, rows: Tensor, positions: Tensor, config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads [R, n, d], [R, m, d], [R, m, d] of the attention below ``prefix``, normed where it has norms."""
    found = []
    for name in ("q", "k", "v"):
        heads = F.linear(rows, weights[f"{prefix}.{name}_proj.weight"]).unflatten(-1, (-1, config.head_dim))
        if f"{prefix}.{name}_norm.weight" in weights:
            heads = rms_norm(heads, weights[f"{prefix}.{name}_norm.weight"], config.rms_norm_eps)
        found.append(heads if name == "v" else turned(heads, positions, config))
    return found[0], found[1], found[2]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """[R, n * d] of ``queries`` [R, n, d] over ``keys``, ``values`` [C, m, d]; ``mask`` bool [R, C]: who sees what."""
    q, k, v = (heads.transpose(0, 1).unsqueeze(0) for heads in (queries, keys, values))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return output[0].transpose(0, 1).flatten(1)


def mlp(weights: Mapping[str, Tensor], prefix: str, rows: Tensor) -> Tensor:
    gate = F.silu(F.linear(rows, weights[f"{prefix}.gate_proj.weight"]))
    return F.linear(gate * F.linear(rows, weights[f"{prefix}.up_proj.weight"]), weights[f"{prefix}.down_proj.weight"])


def finish(weights: Mapping[str, Tensor], layer: str, residual: Tensor, attended: Tensor, eps: float) -> Tensor:
    """The output projection onto ``residual`` [R, H], and the MLP onto that."""
    rows = residual + F.linear(attended, weights[f"{layer}.self_attn.o_proj.weight"])
    return rows + mlp(weights, f"{layer}.mlp", rms_norm(rows, weights[f"{layer}.post_attention_layernorm.weight"], eps))


def decoder_layer(
    weights: Mapping[str, Tensor], layer: str, rows: Tensor, positions: Tensor, mask: Tensor, config: Any
) -> Tensor:
    """An ordinary pre-norm layer over its own rows [R, H]; ``mask`` bool [R, R]."""
    normed = rms_norm(rows, weights[f"{layer}.input_layernorm.weight"], config.rms_norm_eps)
    heads = queries_keys_values(weights, f"{layer}.self_attn", normed, positions, config)
    return finish(weights, layer, rows, attend(*heads, mask), config.rms_norm_eps)


def causal_mask(batch: TrainBatch[Tensor]) -> Tensor:
    """bool [T, T]: the rows up to itself in its document."""
    documents = batch.document_ids
    return (documents[:, None] == documents[None, :]).tril()


def ahead(batch: TrainBatch[Tensor], shift: int) -> tuple[Tensor, Tensor]:
    """Of every token, the index of the one ``shift`` later (clamped to the pack), and whether it is in its document."""
    last = batch.input_ids.numel() - 1
    index = (torch.arange(last + 1, device=batch.input_ids.device) + shift).clamp(max=last)
    inside = batch.document_ids[index] == batch.document_ids
    return index, inside & (torch.arange(last + 1, device=index.device) + shift <= last)


def labelled(batch: TrainBatch[Tensor], shift: int) -> tuple[Tensor, Tensor]:
    """Of every token, the id ``shift`` later, and whether that is in its document and supervised."""
    index, inside = ahead(batch, shift)
    return batch.input_ids[index], inside & batch.loss_mask[index]


def tokens_ahead(batch: TrainBatch[Tensor], shift: int) -> Tensor:
    """Of every token, the id ``shift`` later, 0 behind the end of the document."""
    index, inside = ahead(batch, shift)
    return batch.input_ids[index] * inside
