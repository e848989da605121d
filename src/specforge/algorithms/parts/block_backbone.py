"""The layers of block drafts: slots that attend to a context which the layers do not change, and to their own block.

Legend: T packed tokens, C context tokens, N blocks, b slots of a block, R = N * b slots, H hidden size, Ht of the
target, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel, Pace, TargetTables
from specforge.algorithms.parts.block_attention import BlockLayout, block_attention
from specforge.algorithms.parts.block_config import BlockDraftConfig
from specforge.algorithms.parts.decoder import Attention, DecoderLayer
from specforge.algorithms.parts.norm import RMSNorm
from specforge.errors import DraftError

INIT_STD = 0.02
INITIAL_TOKENS = 256


BLOCK_TRAINING = Pace(lr=6e-4, warmup_ratio=0.04, max_grad_norm=1.0)
"""How block drafts are trained: the published recipe of DFlash."""


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
        self.layers = nn.ModuleList(DecoderLayer(config, qk_norm=True) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def fuse(self, features: Tensor) -> Tensor:
        """The context that every layer reads, [.., H], of captured ``features`` [.., num_aux * Ht]."""
        context: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return context

    def forward(self, slots: Tensor, features: Tensor, layout: BlockLayout) -> Tensor:
        """Normed states of the slots, [R, H].

        ``slots`` [R, H] are the embeddings that enter (:func:`specforge.algorithms.parts.blocks.slot_embeddings`),
        ``features`` [T, num_aux * Ht] those of the whole pack, of which only the context is read.
        """
        context = self.fuse(features.index_select(0, layout.context))
        rows = slots.to(self.fc.weight.dtype)
        rotary = self.attention(0).rotary
        context_angles, slot_angles = rotary(layout.context_positions), rotary(layout.slot_positions)
        for index, window in enumerate(self.config.windows()):
            layer, attention = self.layer(index), self.attention(index)
            normed = layer.input_layernorm(rows)
            attended = block_attention(
                layout,
                attention.queries(normed, slot_angles),
                attention.keys_values(context, context_angles),
                attention.keys_values(normed, slot_angles),
                window,
            )
            rows = layer.finish(rows, attended)
        output: Tensor = self.norm(rows)
        return output

    def layer(self, index: int) -> DecoderLayer:
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
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
        for index, window in enumerate(self.backbone.config.windows()):
            layer, attention = self.backbone.layer(index), self.backbone.attention(index)
            normed = layer.input_layernorm(rows)
            own = torch.cat(attention.keys_values(normed, angles), dim=1)
            first = 0 if window is None else max(0, self.num_tokens - (window - 1))
            joint = torch.cat((self._caches[index][first : self.num_tokens], own))
            rows = layer.finish(rows, _attend(attention.queries(normed, angles), joint, window))
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
