"""The layers of block drafts: slots that attend to a context which the layers do not change, and to their own block.

Legend: T packed tokens, C context tokens, N blocks, b slots of a block, R = N * b slots, H hidden size, Ht of the
target, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel, Pace, TargetTables
from specforge.algorithms.parts.block_attention import BlockLayout, KeysValues, block_attention, block_layout
from specforge.algorithms.parts.block_config import BlockDraftConfig
from specforge.algorithms.parts.blocks import Blocks, slot_embeddings
from specforge.algorithms.parts.decoder import Attention, DecoderLayer
from specforge.algorithms.parts.eager import Eager
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.contracts.batches import TrainBatch
from specforge.errors import DraftError

INIT_STD = 0.02
INITIAL_TOKENS = 256


BLOCK_TRAINING = Pace(lr=6e-4, warmup_ratio=0.04, max_grad_norm=1.0)
"""How block drafts are trained: the published recipe of DFlash."""


class BlockLayer(DecoderLayer):
    """A layer over slots. ``window`` is that of a sliding layer, ``None`` for a full one."""

    def __init__(self, config: BlockDraftConfig, window: int | None) -> None:
        super().__init__(config, qk_norm=True)
        self.window = window

    def forward(
        self,
        rows: Tensor,
        context: Tensor,
        context_angles: tuple[Tensor, Tensor],
        slot_angles: tuple[Tensor, Tensor],
        layout: BlockLayout,
        share: SequenceShare | None = None,
    ) -> Tensor:
        """The slots' next states [R, H] of ``rows`` [R, H] and ``context`` [C, H], with the rotary angles of both. With
        a ``share`` all are its own, and the ``layout`` is that of the sequence group.
        """
        attention, normed = self.self_attn, self.input_layernorm(rows)
        attended = _block_attention(
            layout,
            share,
            attention.queries(normed, slot_angles),
            attention.keys_values(context, context_angles),
            attention.keys_values(normed, slot_angles),
            self.window,
        )
        return self.finish(rows, attended)


@Eager
def _block_attention(
    layout: BlockLayout,
    share: SequenceShare | None,
    queries: Tensor,
    context: KeysValues,
    own: KeysValues,
    window: int | None,
) -> Tensor:
    """Attention output [R, n, d]; with a ``share`` the slots are its own, by whole blocks."""
    if share is None:
        return block_attention(layout, queries, context, own, window)
    num_columns, num_blocks, block = layout.context.numel(), layout.num_blocks, (-1, layout.block_size)
    keys, values = (share.to_heads(rows, num_columns) for rows in context)
    queries, own_keys, own_values = (
        share.to_heads(rows.unflatten(0, block), num_blocks).flatten(0, 1) for rows in (queries, *own)
    )
    attended = block_attention(layout, queries, (keys, values), (own_keys, own_values), window)
    return share.to_rows(attended.unflatten(0, block)).flatten(0, 1)


class BlockBackbone(DraftModel):
    """Parameters under their served names. A draft with more modules inherits and adds them.

    Embedding and head are the target's and never in the draft.
    """

    def __init__(self, config: BlockDraftConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.fc = nn.Linear(len(config.aux_layers) * config.target_hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config, window) for window in config.windows())
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def fuse(self, features: Tensor) -> Tensor:
        """The context that every layer reads, [.., H], of captured ``features`` [.., num_aux * Ht]."""
        context: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return context

    def forward(
        self, slots: Tensor, features: Tensor, layout: BlockLayout, share: SequenceShare | None = None
    ) -> Tensor:
        """Normed states of the slots, [R, H].

        ``slots`` [R, H] are the embeddings that enter (:func:`specforge.algorithms.parts.blocks.slot_embeddings`),
        ``features`` [T, num_aux * Ht] those of the whole pack, of which only the context is read. With a ``share`` the
        slots are those of its own blocks, and of the context it reads its own slice.
        """
        tokens, context_positions, slot_positions = layout.context, layout.context_positions, layout.slot_positions
        if share is not None:
            columns, own = share.rows(tokens.numel()), share.rows(layout.num_blocks)
            tokens, context_positions = tokens[columns], context_positions[columns]
            slot_positions = slot_positions[own.start * layout.block_size : own.stop * layout.block_size]
        context = self.fuse(features.index_select(0, tokens))
        rows = slots.to(self.fc.weight.dtype)
        rotary = self.attention(0).rotary
        context_angles, slot_angles = rotary(context_positions), rotary(slot_positions)
        for layer in self.layers:
            rows = layer(rows, context, context_angles, slot_angles, layout, share)
        output: Tensor = self.norm(rows)
        return output

    def training_blocks(self) -> Sequence[nn.Module]:
        return tuple(self.layers)

    def block_states(
        self, tables: TargetTables, batch: TrainBatch[Tensor], blocks: Blocks, share: SequenceShare | None = None
    ) -> Tensor:
        """Normed states [N * b, H] of the slots of ``blocks`` of ``batch``; with a ``share``, of its own blocks."""
        own = blocks if share is None else blocks.part(share.rows(blocks.num_blocks))
        tokens = batch.input_ids[own.anchors]
        slots = slot_embeddings(tables.embed_tokens, tokens, blocks.block_size, self.config.mask_token_id)
        states: Tensor = self(slots, batch.features["aux"], block_layout(blocks, batch), share)
        return states

    def no_states(self, tables: TargetTables, batch: TrainBatch[Tensor]) -> Tensor:
        """:meth:`block_states` of no block, [0, H]."""
        none = batch.input_ids.new_zeros(0, dtype=torch.int64)
        return self.block_states(tables, batch, Blocks.at(none, batch, self.config.block_size))

    def layer(self, index: int) -> BlockLayer:
        layer = self.layers[index]
        assert isinstance(layer, BlockLayer)
        return layer

    def attention(self, index: int) -> Attention:
        return self.layer(index).self_attn


class BlockSession:
    """Drafting for one sequence: the context's keys and values of every layer, and one block at a time behind them.

    A block leaves no trace. The draft's weights are read as they are; :meth:`reset` after they change.
    """

    def __init__(self, backbone: BlockBackbone) -> None:
        self.backbone = backbone
        config = backbone.config
        heads = (2 * config.num_key_value_heads, config.head_dim)
        self._caches = [backbone.fc.weight.new_empty(INITIAL_TOKENS, *heads).detach() for _ in backbone.layers]
        self.num_tokens = 0

    def reset(self) -> None:
        """Forget the context."""
        self.num_tokens = 0

    @torch.inference_mode()
    def append(self, features: Tensor) -> None:
        """Features [new tokens, num_aux * Ht] of the next positions."""
        if not features.shape[0]:
            return
        start, end = self.num_tokens, self.num_tokens + features.shape[0]
        context = self.backbone.fuse(features)
        angles = self.backbone.attention(0).rotary(torch.arange(start, end, device=context.device))
        for index, old in enumerate(self._caches):
            if end > old.shape[0]:
                self._caches[index] = old.new_empty(max(end, 2 * old.shape[0]), *old.shape[1:])
                self._caches[index][:start] = old[:start]
            self._caches[index][start:end] = torch.cat(
                self.backbone.attention(index).keys_values(context, angles), dim=1
            )
        self.num_tokens = end

    @torch.inference_mode()
    def block(self, slots: Tensor) -> Tensor:
        """Normed states [b, H] of a block whose first slot is the position after the context; ``slots`` [b, H]."""
        rows = slots.to(self.backbone.fc.weight.dtype)
        positions = self.num_tokens + torch.arange(rows.shape[0], device=rows.device)
        angles = self.backbone.attention(0).rotary(positions)
        for index in range(len(self._caches)):
            layer, attention = self.backbone.layer(index), self.backbone.attention(index)
            normed = layer.input_layernorm(rows)
            own = torch.cat(attention.keys_values(normed, angles), dim=1)
            first = 0 if layer.window is None else max(0, self.num_tokens - (layer.window - 1))
            joint = torch.cat((self._caches[index][first : self.num_tokens], own))
            rows = layer.finish(rows, _attend(attention.queries(normed, angles), joint, layer.window))
        output: Tensor = self.backbone.norm(rows)
        return output


def _attend(queries: Tensor, joint: Tensor, window: int | None) -> Tensor:
    """One block of queries [b, n, d] over ``joint`` [columns, 2m, d], whose last b columns are the block: [b, n, d]."""
    size, num_columns = queries.shape[0], joint.shape[0]
    keys, values = joint.transpose(0, 1).chunk(2)
    folded = queries.unflatten(1, (keys.shape[0], -1)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(folded, keys.transpose(1, 2)).float() * queries.shape[-1] ** -0.5
    if window is not None:
        ahead = torch.arange(num_columns, device=joint.device) - (num_columns - size)
        behind = torch.arange(size, device=joint.device)[:, None] - ahead
        scores.unflatten(1, (-1, size)).masked_fill_((behind < 0) | ((behind >= window) & (ahead < 0)), float("-inf"))
    attended = torch.bmm(torch.softmax(scores, dim=-1).to(values.dtype), values)
    rows: Tensor = attended.unflatten(1, (-1, size)).permute(2, 0, 1, 3).flatten(1, 2)
    return rows


def initialise(draft: BlockBackbone, tables: TargetTables, seed: int) -> None:
    """Matrices of linear layers N(0, 0.02) from ``seed`` alone, norms 1; then the draft moves to the tables' device."""
    if tables.embed_tokens.shape != (draft.config.vocab_size, draft.config.hidden_size):
        raise DraftError(
            f"expected a target embedding of {[draft.config.vocab_size, draft.config.hidden_size]}, got "
            f"{list(tables.embed_tokens.shape)}; the draft config belongs to another target"
        )
    generator = torch.Generator().manual_seed(seed)
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    draft.to(tables.embed_tokens.device)


def _check(config: BlockDraftConfig) -> None:
    if config.hidden_size != config.target_hidden_size:
        raise DraftError(
            f"a block draft embeds tokens with the target's table, so its hidden_size must be the target's "
            f"{config.target_hidden_size}, got {config.hidden_size}; change the draft config"
        )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise DraftError(
            f"num_attention_heads ({config.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}) and head_dim ({config.head_dim}) even; change the draft config"
        )
