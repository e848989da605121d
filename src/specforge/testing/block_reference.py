"""The obvious form of block attention: one dense mask over all slots and tokens. For tests and benchmarks.

Legend: T packed tokens, N blocks, b slots of a block, R = N * b slots, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.parts.block_backbone import BlockBackbone
from specforge.algorithms.parts.blocks import Blocks


def block_mask(blocks: Blocks, num_tokens: int, window: int | None = None, keep: Tensor | None = None) -> Tensor:
    """bool [R, T + R]: what each slot sees, of tokens and of slots. ``keep`` bool [N]: blocks that see anything."""
    size, num_rows = blocks.block_size, blocks.num_blocks * blocks.block_size
    rows, tokens = torch.arange(num_rows), torch.arange(num_tokens)
    anchors, starts = (values.repeat_interleave(size)[:, None] for values in (blocks.anchors, blocks.starts))
    offsets = (rows % size)[:, None]
    context = (tokens >= starts) & (tokens < anchors)
    own = rows[:, None] // size == rows // size
    if window is not None:
        context &= tokens >= anchors + offsets - (window - 1)
        own &= rows <= rows[:, None]
    mask = torch.cat((context, own), dim=1)
    return mask if keep is None else mask & keep.repeat_interleave(size)[:, None]


def dense_block_attention(
    mask: Tensor, queries: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention output [R, n, d] under ``mask`` bool [R, T + R]; 0 for a row that sees nothing.

    ``queries`` [R, n, d]; ``context`` keys and values of all tokens [T, m, d]; ``own`` those of the slots [R, m, d].
    """
    keys, values = (torch.cat(pair).transpose(0, 1)[None] for pair in zip(context, own, strict=True))
    attended = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys, values, attn_mask=mask | ~mask.any(1, keepdim=True), enable_gqa=True
    )
    return attended[0].transpose(0, 1) * mask.any(1)[:, None, None]


def dense_backbone(backbone: BlockBackbone, slots: Tensor, features: Tensor, blocks: Blocks) -> Tensor:
    """Normed states [R, H] of the slots, as ``backbone`` gives them, over all tokens of the pack.

    ``slots`` [R, H], ``features`` [T, num_aux * Ht].
    """
    context, rows = backbone.fuse(features), slots
    tokens = torch.arange(features.shape[0])
    offsets = torch.arange(blocks.block_size)
    # only distances matter to a rotation, and they are inside a document
    positions = (blocks.anchors[:, None] + offsets).flatten()
    for index, window in enumerate(backbone.config.windows()):
        layer, attention = backbone.layer(index), backbone.attention(index)
        token_angles, slot_angles = attention.rotary(tokens), attention.rotary(positions)
        normed = layer.input_layernorm(rows)
        attended = dense_block_attention(
            block_mask(blocks, features.shape[0], window),
            attention.queries(normed, slot_angles),
            attention.keys_values(context, token_angles),
            attention.keys_values(normed, slot_angles),
        )
        rows = layer.finish(rows, attended)
    output: Tensor = backbone.norm(rows)
    return output
