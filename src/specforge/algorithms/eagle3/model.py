"""The EAGLE-3 draft: one decoder layer with a doubled attention input (Li et al., arXiv 2503.01840).

Parameters and buffers carry the names that SGLang and vLLM load.

Legend: T packed tokens, C context tokens, R computed rows, K unroll steps, H hidden size of the draft, Ht of the
target, n query heads, m key/value heads, d size of a key head, e of a value head, W draft vocabulary, V target
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel
from specforge.algorithms.eagle3.config import Eagle3DraftConfig
from specforge.algorithms.eagle3.features import UnrollPlan
from specforge.algorithms.parts.attention import unrolled_attention
from specforge.algorithms.parts.mlp import SwiGLU
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.projections import build_attention
from specforge.algorithms.parts.vocabulary import vocabulary_maps
from specforge.errors import DraftError


class Eagle3Layer(nn.Module):
    """The decoder layer, without its attention pattern: the unroll and the proposer each bring their own.

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

    def finish(self, hidden: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """Residual, output projection and MLP.

        ``hidden`` [R, H] entered the layer, ``normed`` is its ``hidden_norm``, ``attended`` [R, n, e] the attention.
        """
        residual = (normed if self.norm_before_residual else hidden) + self.self_attn.o_proj(attended.flatten(-2))
        output: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return output


class Eagle3Draft(DraftModel):
    """Parameters under their served names; the target's embedding is passed in, never owned.

    ``kept_ids`` int64 [W] ascending are the target ids of the draft vocabulary, ``None`` for all. The buffers ``d2t``
    int64 [W] and ``t2d`` bool [V] are always there (identity maps for a full vocabulary).
    """

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

    def forward(self, aux: Tensor, token_embeddings: Tensor, plan: UnrollPlan) -> list[Tensor]:
        """The training unroll: what the head reads after each step, K tensors [R, H].

        ``aux`` [T, num_aux * Ht]; ``token_embeddings`` [T + 1, H], the last row being that of id 0 (see
        :class:`UnrollPlan`). Gradients flow through every stored key, value and hidden state.
        """
        layer, attention = self.midlayer, self.midlayer.self_attn
        split = attention.num_query_features
        token_weight, hidden_weight = attention.input_weight().chunk(2, dim=1)
        token_part = F.linear(layer.input_layernorm(token_embeddings.to(self.fc.weight.dtype)), token_weight)
        all_hidden = self.fuse(aux.index_select(0, plan.context))
        all_normed = layer.hidden_norm(all_hidden)
        first = F.linear(all_normed, hidden_weight[split:]) + token_part[:, split:].index_select(0, plan.first_tokens)
        context = attention.keys_values(first, attention.rotary(plan.positions))
        hidden, normed = all_hidden.index_select(0, plan.rows), all_normed.index_select(0, plan.rows)
        positions = plan.positions.index_select(0, plan.rows)
        own: list[tuple[Tensor, Tensor]] = []
        outputs = []
        for step in range(plan.num_steps):
            tokens, angles = plan.tokens[step], attention.rotary(positions + step)
            if step == 0:
                projected = F.linear(normed, hidden_weight[:split]) + token_part[:, :split].index_select(0, tokens)
            else:
                normed = layer.hidden_norm(hidden)
                projected = F.linear(normed, hidden_weight) + token_part.index_select(0, tokens)
                own.append(attention.keys_values(projected[:, split:], angles))
            queries = attention.queries(projected[:, :split], angles)
            attended = unrolled_attention(plan.layout, queries, context, own)
            readout, hidden = self.read_out(layer.finish(hidden, normed, attended))
            outputs.append(readout)
        return outputs


def _check(config: Eagle3DraftConfig) -> None:
    if config.hidden_size != config.target_hidden_size:
        raise DraftError(
            f"an EAGLE-3 draft embeds tokens with the target's table, so its hidden_size must be the target's "
            f"{config.target_hidden_size}, got {config.hidden_size}; change the draft config"
        )
