"""The EAGLE-3 draft: one decoder layer with a doubled attention input (Li et al., arXiv 2503.01840).

Parameters and buffers carry the names that SGLang and vLLM load.

Legend: T packed tokens, C context tokens, R computed rows, K unroll steps, H hidden size of the draft, Ht of the
target, n query heads, m key/value heads, d head size, W draft vocabulary, V target vocabulary.
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
from specforge.algorithms.parts.rotary import Rotary, rotate
from specforge.algorithms.parts.vocabulary import vocabulary_maps
from specforge.errors import DraftError


class Eagle3Attention(nn.Module):
    """Projections of the layer. Their input is ``concat(token, hidden)``, 2H wide, token half first.

    The two halves are projected apart and added, so that a token is projected once for all steps that embed it.
    """

    def __init__(self, config: Eagle3DraftConfig) -> None:
        super().__init__()
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_counts = (heads, groups, groups)
        self.head_dim = size
        self.hidden_size = config.hidden_size
        self.q_proj = nn.Linear(2 * config.hidden_size, heads * size, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, groups * size, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, groups * size, bias=False)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(size, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    def halves(self) -> tuple[Tensor, Tensor]:
        """Weights of the token half and of the hidden half, [(n + 2m) * d, H] each: queries, keys, values in order."""
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        token, hidden = weight.split(self.hidden_size, dim=1)
        return token, hidden

    @property
    def num_query_features(self) -> int:
        return self.head_counts[0] * self.head_dim

    def queries(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[.., n*d] -> [.., n, d], turned by the rotary ``angles`` of the rows."""
        heads = projected.unflatten(-1, (self.head_counts[0], self.head_dim))
        return rotate(self.q_norm(heads), *angles)

    def keys_values(self, projected: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[.., 2*m*d] -> two of [.., m, d], the keys turned by the rotary ``angles`` of the rows."""
        keys, values = projected.unflatten(-1, (2, self.head_counts[1], self.head_dim)).unbind(-3)
        return rotate(self.k_norm(keys), *angles), values


class Eagle3Layer(nn.Module):
    """The decoder layer, without its attention pattern: the unroll and the proposer each bring their own."""

    def __init__(self, config: Eagle3DraftConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.self_attn = Eagle3Attention(config)
        self.mlp = SwiGLU(size, config.intermediate_size)
        self.norm_before_residual = config.norm_before_residual

    def finish(self, hidden: Tensor, normed: Tensor, attended: Tensor) -> Tensor:
        """Residual, output projection and MLP.

        ``hidden`` [R, H] entered the layer, ``normed`` is its ``hidden_norm``, ``attended`` [R, n, d] the attention.
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
        token_weight, hidden_weight = attention.halves()
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
    if config.hidden_size != config.target_hidden_size or config.trains_embedding:
        raise DraftError(
            f"an EAGLE-3 draft embeds tokens with the target's table, so its hidden_size must be the target's "
            f"{config.target_hidden_size} and trains_embedding false; got {config.hidden_size} and "
            f"{config.trains_embedding}; change the draft config"
        )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise DraftError(
            f"num_attention_heads ({config.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}) and head_dim ({config.head_dim}) even; change the draft config"
        )
