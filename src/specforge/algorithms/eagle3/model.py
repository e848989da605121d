"""The EAGLE-3 draft: one decoder layer with a doubled attention input (Li et al., arXiv 2503.01840).

Parameters and buffers carry the names that SGLang and vLLM load.

Legend: T packed tokens, C context tokens, R computed rows, K unroll steps, H hidden size of the draft, Ht of the
target, n query heads, m key/value heads, d size of a key head, e of a value head, W draft vocabulary, V target
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.eagle3.features import UnrollPlan
from specforge.algorithms.parts.attention import PackedLayout, unrolled_attention
from specforge.algorithms.parts.eager import Eager
from specforge.algorithms.parts.mlp import SwiGLU
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.projections import build_attention
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.algorithms.parts.vocabulary import vocabulary_maps
from specforge.errors import DraftError

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LaterRows:
    """Keys and values of the computed rows at the steps from 1 on, [R, m, d] and [R, m, e] each. In a sequence group,
    those of all its rows and of the own heads.

    A record, because a layer compiled for a plain tuple is compiled again for every length of it.
    """

    steps: tuple[KeysValues, ...] = ()

    def and_those(self, added: KeysValues | None) -> LaterRows:
        return self if added is None else LaterRows((*self.steps, added))


class Eagle3Layer(nn.Module):
    """The decoder layer. The unroll calls it once a step; the proposer brings its own attention.

    The attention reads ``concat(token, hidden)``, 2H wide, token half first. The unroll projects the two halves apart
    and adds them, so that a token is projected once for all steps that embed it.
    """

    def __init__(self, config: Eagle3DraftConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.self_attn = build_attention(config, 2 * size)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.norm_before_residual = config.norm_before_residual

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        weight: Tensor,
        angles: tuple[Tensor, Tensor],
        layout: PackedLayout,
        context: KeysValues,
        own: LaterRows,
        share: SequenceShare | None = None,
    ) -> tuple[Tensor, KeysValues | None]:
        """The output [R, H] of one step of the unroll, and the keys and values that it adds to ``own``.

        ``hidden`` [R, H] enters; ``tokens`` [R, F] is the projected token half of the input and ``weight`` [F, H] what
        projects the other. Step 0 projects queries alone and adds nothing: its keys and values are the ``context``'s.
        With a ``share`` the rows are its own, and ``layout``, ``context`` and ``own`` those of the sequence group.
        """
        attention, split = self.self_attn, self.self_attn.num_query_features
        normed = self.hidden_norm(hidden)
        projected = F.linear(normed, weight) + tokens
        added = None if len(weight) == split else attention.keys_values(projected[:, split:], angles)
        queries = attention.queries(projected[:, :split], angles)
        attended, added = _attend(layout, share, queries, context, own, added)
        return self.finish(hidden, normed, attended), added

    def finish(self, hidden: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """Residual, output projection and MLP.

        ``hidden`` [R, H] entered the layer, ``normed`` is its ``hidden_norm``, ``attended`` [R, n, e] the attention.
        """
        residual = (normed if self.norm_before_residual else hidden) + self.self_attn.o_proj(attended.flatten(-2))
        output: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return output


@Eager
def _attend(
    layout: PackedLayout,
    share: SequenceShare | None,
    queries: Tensor,
    context: KeysValues,
    own: LaterRows,
    added: KeysValues | None,
) -> tuple[Tensor, KeysValues | None]:
    """The attention [R, n, e], and ``added`` as :class:`LaterRows` keeps it."""
    if share is None:
        return unrolled_attention(layout, queries, context, own.and_those(added).steps), added
    num_rows = layout.row_slots.numel()
    queries = share.to_heads(queries, num_rows)
    if added is not None:
        added = share.to_heads(added[0], num_rows), share.to_heads(added[1], num_rows)
    return share.to_rows(unrolled_attention(layout, queries, context, own.and_those(added).steps)), added


class Eagle3Draft(DraftModel):
    """Parameters under their served names; the target's embedding is passed in, never owned.

    ``kept_ids`` int64 [W] ascending are the target ids of the draft vocabulary, ``None`` for all. The buffers ``d2t``
    int64 [W] and ``t2d`` bool [V] are always there (identity maps for a full vocabulary).
    """

    blocks_run_once: ClassVar[bool] = False

    def __init__(self, config: Eagle3DraftConfig, kept_ids: Tensor | None = None) -> None:
        super().__init__()
        _check(config)
        self.config = config
        width = len(config.aux_layers) * config.target_hidden_size
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in config.aux_layers
            )
        if config.norm_before_fc:
            self.input_norm = RMSNorm(width, config.rms_norm_eps)
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        kept = torch.arange(config.draft_vocab_size) if kept_ids is None else kept_ids.cpu()
        d2t, t2d = vocabulary_maps(kept, config.vocab_size)
        self.d2t: Tensor
        self.t2d: Tensor
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)

    def fuse(self, aux: Tensor) -> Tensor:
        """Hidden states that enter step 0, [T, H], from captured features [T, num_aux * Ht]."""
        aux = aux.to(self.fc.weight.dtype)
        if self.config.fc_norm:
            blocks = aux.split(self.config.target_hidden_size, dim=-1)
            aux = torch.cat([norm(block) for norm, block in zip(self.fc_norm, blocks, strict=True)], dim=-1)
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        fused: Tensor = self.fc(aux)
        return fused

    def read_out(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """(what the head reads, what the next step receives) of a layer output [R, H] (3.6: ``norm_output``)."""
        normed = self.norm(output)
        return normed, normed if self.config.norm_output else output

    def training_blocks(self) -> Sequence[nn.Module]:
        return (self.midlayer,)

    def forward(self, aux: Tensor, token_embeddings: Tensor, plan: UnrollPlan) -> list[Tensor]:
        """The training unroll: what the head reads after each step, K tensors [R, H].

        ``aux`` [T, num_aux * Ht]; ``token_embeddings`` [T + 1, H], the last row being that of id 0, or [E, H] (see
        :class:`UnrollPlan`). Gradients flow through every stored key, value and hidden state.
        """
        layer, attention, share = self.midlayer, self.midlayer.self_attn, plan.share
        split, num_context = attention.num_query_features, plan.first_tokens.numel()
        token_weight, hidden_weight = attention.input_weight().chunk(2, dim=1)
        token_part = F.linear(layer.input_layernorm(token_embeddings.to(self.fc.weight.dtype)), token_weight)
        all_hidden = self.fuse(aux.index_select(0, plan.context))
        first = F.linear(layer.hidden_norm(all_hidden[:num_context]), hidden_weight[split:])
        first = first + token_part[:, split:].index_select(0, plan.first_tokens)
        context = attention.keys_values(first, attention.rotary(plan.positions[:num_context]))
        if share is not None:
            num_keys = plan.layout.key_slots.numel()
            context = share.to_heads(context[0], num_keys), share.to_heads(context[1], num_keys)
        hidden = all_hidden.index_select(0, plan.rows)
        positions = plan.positions.index_select(0, plan.rows)
        own = LaterRows()
        outputs = []
        for step in range(plan.num_steps):
            needed = slice(split) if step == 0 else slice(None)
            tokens = token_part[:, needed].index_select(0, plan.tokens[step])
            angles = attention.rotary(positions + step)
            output, added = layer(hidden, tokens, hidden_weight[needed], angles, plan.layout, context, own, share)
            own = own.and_those(added)
            readout, hidden = self.read_out(output)
            outputs.append(readout)
        return outputs


def _check(config: Eagle3DraftConfig) -> None:
    if config.hidden_size != config.target_hidden_size:
        raise DraftError(
            f"an EAGLE-3 draft embeds tokens with the target's table, so its hidden_size must be the target's "
            f"{config.target_hidden_size}, got {config.hidden_size}; change the draft config"
        )
