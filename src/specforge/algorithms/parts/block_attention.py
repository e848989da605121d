"""Attention of blocks of slots over the context of their document, exact, at the cost of the documents.

A slot sees the context tokens of its document strictly before its anchor, and the slots of its own block. In a full
layer that is all of both; in a sliding layer of window W, slot ``k`` sees the tokens from ``a + k - (W - 1)`` on and
the slots up to itself. On a CPU the context part is one product for a strip of neighbouring blocks, over the tokens
that the strip can see, and the own part one product of all blocks; both join in one softmax. On a GPU it is a
block-sparse kernel whose mask is made from the bounds of the rows. No mask over all slots and tokens ever exists.

Legend: T packed tokens, C context tokens, N blocks, b slots of a block, R = N * b slots, n query heads, m key/value
heads, g = n // m, d head size; in a strip: B blocks, c columns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from specforge.algorithms.parts.blocks import Blocks
from specforge.algorithms.parts.eager import Eager
from specforge.contracts.batches import TrainBatch

STRIP_ROWS = 256
"""Slots of a strip: small enough that few of its columns are behind its first anchor, large enough for a product."""

TILE = 128
"""Rows and columns of a tile of the block-sparse kernel."""

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Strip:
    """Blocks ``first .. last - 1`` of one document; their context is the columns ``low .. high - 1``, of which all see
    those before ``nearest`` in a full layer.
    """

    first: int
    last: int
    low: int
    nearest: int
    high: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Where blocks and their context are. Blocks of a document are neighbours, in any order.

    * ``context`` int64 [C], ascending: tokens that some block sees, those before the last anchor of a document
    * ``context_positions`` int64 [C], ``slot_positions`` int64 [R]: rotary positions
    * ``lows``, ``highs`` int64 [N]: the columns (indices into ``context``) that a block sees in a full layer; ``highs``
      is where the anchor would be
    """

    block_size: int
    context: Tensor
    context_positions: Tensor
    slot_positions: Tensor
    lows: Tensor
    highs: Tensor
    strips: tuple[Strip, ...]
    _tiles: dict[int | None, BlockMask] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_blocks(self) -> int:
        """N."""
        return self.highs.numel()

    def visible(self, window: int | None, blocks: slice, columns: slice) -> Tensor:
        """bool [B, b or 1, c]: which ``columns`` each slot of ``blocks`` sees."""
        column = torch.arange(columns.start, columns.stop, device=self.highs.device)
        low, high = self.lows[blocks, None, None], self.highs[blocks, None, None]
        seen = (column >= low) & (column < high)
        if window is None:
            return seen
        slots = torch.arange(self.block_size, device=column.device)[:, None]
        return seen & (column >= high + slots - (window - 1))

    def tiles(self, window: int | None) -> BlockMask:
        """The mask of the block-sparse kernel, columns ``context`` then slots; made once for all layers."""
        if window not in self._tiles:
            self._tiles[window] = _tile_mask(self, window)
        return self._tiles[window]


def block_layout(blocks: Blocks, batch: TrainBatch[Tensor]) -> BlockLayout:
    """The layout of ``blocks`` (those of a document must be neighbours) over a packed ``batch``."""
    anchors, starts = blocks.anchors.cpu(), blocks.starts.cpu()
    changes = (starts[1:] != starts[:-1]).nonzero().squeeze(-1) + 1
    bounds = [0, *changes.tolist(), anchors.numel()] if anchors.numel() else [0]
    strips: list[Strip] = []
    lows = torch.zeros_like(anchors)
    tokens, offset = [torch.zeros(0, dtype=torch.int64)], 0
    step = max(1, STRIP_ROWS // blocks.block_size)
    for first, last in itertools.pairwise(bounds):
        start, end = int(starts[first]), int(anchors[first:last].max())
        tokens.append(torch.arange(start, end))
        lows[first:last] = offset
        for place in range(first, last, step):
            stop = min(place + step, last)
            nearest, furthest = (int(bound) + offset - start for bound in anchors[place:stop].aminmax())
            strips.append(Strip(place, stop, offset, nearest, furthest))
        offset += end - start
    device = blocks.anchors.device
    context = torch.cat(tokens).to(device)
    slots = torch.arange(blocks.block_size, device=device)
    return BlockLayout(
        block_size=blocks.block_size,
        context=context,
        context_positions=batch.position_ids[context],
        slot_positions=(batch.position_ids[blocks.anchors][:, None] + slots).flatten(),
        lows=lows.to(device),
        highs=lows.to(device) + blocks.anchors - blocks.starts,
        strips=tuple(strips),
    )


@Eager
def block_attention(
    layout: BlockLayout, queries: Tensor, context: KeysValues, own: KeysValues, window: int | None = None
) -> Tensor:
    """Attention output [R, n, d]. Softmax in fp32.

    ``queries`` [R, n, d]; ``context`` keys and values of ``layout.context``, [C, m, d] each; ``own`` keys and values of
    the slots, [R, m, d] each. ``window`` is that of a sliding layer, ``None`` for a full one.
    """
    if queries.device.type == "cpu" or not layout.num_blocks:
        return strip_attention(layout, queries, context, own, window)
    return tile_attention(layout, queries, context, own, window)


def strip_attention(
    layout: BlockLayout, queries: Tensor, context: KeysValues, own: KeysValues, window: int | None = None
) -> Tensor:
    """:func:`block_attention` by one product a strip."""
    output: Tensor = _StripAttention.apply(layout, window, queries, *context, *own)  # type: ignore[no-untyped-call]
    return output


class _StripAttention(torch.autograd.Function):
    """Keeps the joint probabilities for the backward."""

    @staticmethod
    def forward(ctx: Any, layout: BlockLayout, window: int | None, queries: Tensor, *operands: Tensor) -> Tensor:
        keys, values, own_keys, own_values = operands
        folded = _fold(queries, layout.block_size, keys.shape[1])
        scale = queries.shape[-1] ** -0.5
        own_scores = torch.matmul(folded, _fold_own(own_keys, layout.block_size).transpose(-1, -2)).float() * scale
        if window is not None:
            _hide_later_slots(own_scores, layout.block_size)
        parts, own_parts, saved = [], [], []
        for strip in layout.strips:
            columns = _columns(strip, window)
            scores = torch.bmm(_gather(folded, strip), keys[columns].permute(1, 2, 0)).float() * scale
            _hide(layout, strip, columns, window, scores)
            joint = torch.cat((scores, _gather(own_scores, strip)), dim=-1)
            probabilities = torch.softmax(joint, dim=-1)
            context_part, own_part = probabilities.split((scores.shape[-1], layout.block_size), dim=-1)
            parts.append(_scatter(torch.bmm(context_part.to(values.dtype), values[columns].transpose(0, 1)), strip))
            own_parts.append(_scatter(own_part, strip))
            saved.append(probabilities)
        own_weights = _joined(own_parts, own_scores)
        output = _joined(parts, folded)
        output = output + torch.matmul(own_weights.to(values.dtype), _fold_own(own_values, layout.block_size))
        ctx.layout, ctx.window = layout, window
        ctx.save_for_backward(queries, *operands, output, own_weights, *saved)
        return _unfold(output, layout.block_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        layout: BlockLayout = ctx.layout
        queries, keys, values, own_keys, own_values, output, own_weights, *saved = ctx.saved_tensors
        size = layout.block_size
        folded, upstream = (_fold(rows, size, keys.shape[1]) for rows in (queries, gradients[0]))
        folded_keys, folded_values = _fold_own(own_keys, size), _fold_own(own_values, size)
        scale = queries.shape[-1] ** -0.5
        inner = (upstream * output).sum(-1, keepdim=True, dtype=torch.float32)
        slope = torch.matmul(upstream, folded_values.transpose(-1, -2)).float()
        slope = slope.sub_(inner).mul_(own_weights).mul_(scale).to(keys.dtype)
        grad_queries = torch.matmul(slope, folded_keys)
        grad_own_keys = torch.matmul(slope.transpose(-1, -2), folded)
        grad_own_values = torch.matmul(own_weights.to(values.dtype).transpose(-1, -2), upstream)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for strip, probabilities in zip(layout.strips, saved, strict=True):
            columns = _columns(strip, ctx.window)
            shares = probabilities[..., : columns.stop - columns.start]
            above, below = _gather(upstream, strip), _gather(folded, strip)
            slope = torch.bmm(above, values[columns].permute(1, 2, 0)).float()
            slope = slope.sub_(_gather(inner, strip)).mul_(shares).mul_(scale).to(keys.dtype)
            grad_queries[strip.first : strip.last] += _scatter(torch.bmm(slope, keys[columns].transpose(0, 1)), strip)
            grad_keys[columns] += torch.bmm(slope.transpose(1, 2), below).transpose(0, 1)
            grad_values[columns] += torch.bmm(shares.to(values.dtype).transpose(1, 2), above).transpose(0, 1)
        own = _unfold_own(grad_own_keys), _unfold_own(grad_own_values)
        return None, None, _unfold(grad_queries, size), grad_keys, grad_values, *own


def _columns(strip: Strip, window: int | None) -> slice:
    """The columns that some slot of ``strip`` sees."""
    if window is None:
        return slice(strip.low, strip.high)
    return slice(min(max(strip.low, strip.nearest - (window - 1)), strip.high), strip.high)


def _hide(layout: BlockLayout, strip: Strip, columns: slice, window: int | None, scores: Tensor) -> None:
    """Context scores [m, B*g*b, c] of columns that a slot does not see become -inf."""
    if window is None:
        # all slots see what is before the first anchor
        scores = scores[..., strip.nearest - columns.start :]
        columns = slice(strip.nearest, columns.stop)
    hidden = ~layout.visible(window, slice(strip.first, strip.last), columns)
    num_blocks, size = strip.last - strip.first, layout.block_size
    split = scores.unflatten(1, (num_blocks, scores.shape[1] // (num_blocks * size), size))
    split.masked_fill_(hidden[:, None], float("-inf"))


def _hide_later_slots(own_scores: Tensor, block_size: int) -> None:
    """Own scores [N, m, g*b, b] of later slots become -inf."""
    later = torch.ones(block_size, block_size, dtype=torch.bool, device=own_scores.device).triu(1)
    own_scores.unflatten(2, (-1, block_size)).masked_fill_(later, float("-inf"))


def _fold(rows: Tensor, block_size: int, num_groups: int) -> Tensor:
    """[R, n, e] -> [N, m, g*b, e]."""
    split = rows.unflatten(1, (num_groups, -1)).unflatten(0, (-1, block_size))
    folded: Tensor = split.permute(0, 2, 3, 1, 4).flatten(2, 3)
    return folded


def _unfold(folded: Tensor, block_size: int) -> Tensor:
    """[N, m, g*b, e] -> [R, n, e]."""
    rows: Tensor = folded.unflatten(2, (-1, block_size)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    return rows


def _fold_own(slots: Tensor, block_size: int) -> Tensor:
    """[R, m, d] -> [N, m, b, d]."""
    folded: Tensor = slots.unflatten(0, (-1, block_size)).transpose(1, 2)
    return folded


def _unfold_own(folded: Tensor) -> Tensor:
    """[N, m, b, d] -> [R, m, d]."""
    return folded.transpose(1, 2).flatten(0, 1)


def _gather(folded: Tensor, strip: Strip) -> Tensor:
    """The blocks of ``strip`` of [N, m, g*b, e]: [m, B*g*b, e]."""
    return folded[strip.first : strip.last].transpose(0, 1).flatten(1, 2)


def _scatter(part: Tensor, strip: Strip) -> Tensor:
    """[m, B*g*b, e] -> [B, m, g*b, e]."""
    folded: Tensor = part.unflatten(1, (strip.last - strip.first, -1)).transpose(0, 1)
    return folded


def tile_attention(
    layout: BlockLayout,
    queries: Tensor,
    context: KeysValues,
    own: KeysValues,
    window: int | None = None,
    *,
    compiled: bool = True,
) -> Tensor:
    """:func:`block_attention` by a block-sparse kernel, or by its plain form (which has no backward on a CPU)."""
    keys, values = (torch.cat(pair).transpose(0, 1).unsqueeze(0) for pair in zip(context, own, strict=True))
    kernel: Callable[..., Tensor] = _kernel() if compiled else flex_attention  # type: ignore[assignment]
    output = kernel(
        queries.transpose(0, 1).unsqueeze(0), keys, values, block_mask=layout.tiles(window), enable_gqa=True
    )
    return output[0].transpose(0, 1)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _tile_mask(layout: BlockLayout, window: int | None) -> BlockMask:
    """Which tiles of [R, C + R] are visible in part or in whole, from the bounds of their rows alone."""
    size, num_context = layout.block_size, layout.context.numel()
    device, num_rows = layout.highs.device, layout.num_blocks * layout.block_size
    rows = torch.arange(num_rows, device=device)
    low, high = layout.lows.repeat_interleave(size), layout.highs.repeat_interleave(size)
    if window is not None:
        low = torch.maximum(low, high + rows % size - (window - 1))

    def mask(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = (column >= low[row]) & (column < high[row])
        slot = column - num_context
        same = (slot >= 0) & (slot // size == row // size)
        return seen | (same if window is None else same & (slot <= row))

    num_tiles = -(-num_rows // TILE)
    padded = torch.arange(num_tiles * TILE, device=device).clamp(max=num_rows - 1)
    of_tile = [values[padded].view(num_tiles, TILE) for values in (low, high, rows // size * size)]
    left = torch.arange(0, num_context + num_rows, TILE, device=device)
    right = left + TILE
    some = (left < of_tile[1].amax(1, keepdim=True)) & (right > of_tile[0].amin(1, keepdim=True))
    own_left, own_right = of_tile[2][:, :1] + num_context, of_tile[2][:, -1:] + size + num_context
    whole = some & (left >= of_tile[0].amax(1, keepdim=True)) & (right <= of_tile[1].amin(1, keepdim=True))
    some = (some | ((left < own_right) & (right > own_left))) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(whole), BLOCK_SIZE=TILE, mask_mod=mask, seq_lengths=(num_rows, num_context + num_rows)
    )


def _listed(tiles: Tensor) -> KeysValues:
    """How many columns of each row of ``tiles`` are set, int32 [1, 1, rows], and which: those first, int32."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The parts of all strips, [N, m, g*b, e]."""
    return torch.cat(parts) if parts else torch.zeros_like(like)
