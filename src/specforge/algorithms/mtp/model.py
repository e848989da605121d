"""The MTP draft: one layer of the target's kind, applied again to its own output (DeepSeek-V3, arXiv 2412.19437, 2.2).

Parameters carry the names of Qwen's multi-token-prediction weights.

Legend: T packed tokens, C context tokens, R rows, K steps, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel
from specforge.algorithms.mtp.config import MtpDraftConfig
from specforge.algorithms.mtp.features import StepPlan
from specforge.algorithms.parts.attention import PackedLayout, unrolled_attention
from specforge.algorithms.parts.decoder import DecoderLayer
from specforge.algorithms.parts.norm import RMSNorm
from specforge.errors import DraftError


class MtpLayer(DecoderLayer):
    """A layer over the rows of one step."""

    def forward(self, rows: Tensor, angles: tuple[Tensor, Tensor], layout: PackedLayout, kept: Tensor | None) -> Tensor:
        """Next states [R, H] of the ``kept`` [R] of ``rows`` [C, H] (``None``: of all), which see all of them.

        ``angles`` are the rotary ones of the C rows, ``layout`` is that of the kept ones.
        """
        attention, normed = self.self_attn, self.input_layernorm(rows)
        context = attention.keys_values(normed, angles)
        if kept is not None:
            rows, normed = rows.index_select(0, kept), normed.index_select(0, kept)
            angles = angles[0][kept], angles[1][kept]
        attended = unrolled_attention(layout, attention.queries(normed, angles), context, [])
        return self.finish(rows, attended)


class MultiTokenPredictor(nn.Module):
    """``norm(layer(fc(concat(pre_fc_norm_embedding(token), pre_fc_norm_hidden(hidden)))))``."""

    def __init__(self, config: MtpDraftConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(size, eps)
        self.pre_fc_norm_hidden = RMSNorm(size, eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([MtpLayer(config, qk_norm=config.qk_norm)])
        self.norm = RMSNorm(size, eps)

    @property
    def layer(self) -> MtpLayer:
        layer = self.layers[0]
        assert isinstance(layer, MtpLayer)
        return layer

    def project_tokens(self, embeddings: Tensor) -> Tensor:
        """What token embeddings [R, H] add to a layer's input, [R, H]."""
        weight = self.fc.weight[:, : embeddings.shape[-1]]
        return F.linear(self.pre_fc_norm_embedding(embeddings.to(weight.dtype)), weight)

    def project_hidden(self, hidden: Tensor) -> Tensor:
        """What hidden states [R, H] add to a layer's input, [R, H]."""
        weight = self.fc.weight[:, -hidden.shape[-1] :]
        return F.linear(self.pre_fc_norm_hidden(hidden.to(weight.dtype)), weight)


class MtpDraft(DraftModel):
    """Embedding and output head are the target's and never owned. The layer is called at every step of the unroll."""

    blocks_run_once: ClassVar[bool] = False

    def __init__(self, config: MtpDraftConfig) -> None:
        super().__init__()
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise DraftError(
                f"num_attention_heads ({config.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({config.num_key_value_heads}) and head_dim ({config.head_dim}) even; change the draft config"
            )
        self.config = config
        self.mtp = MultiTokenPredictor(config)

    def forward(self, last: Tensor, token_embeddings: Tensor, plan: StepPlan) -> list[Tensor]:
        """The training unroll: what the head reads after each step, K tensors [C, H], the last one [R, H].

        ``last`` [T, H]; ``token_embeddings`` [T + 1, H], the last row being that of id 0 (see :class:`StepPlan`).
        """
        mtp = self.mtp
        token_part = mtp.project_tokens(token_embeddings)
        angles = mtp.layer.self_attn.rotary(plan.positions)
        hidden, readouts = last[plan.context].to(token_part.dtype), []
        for step in range(plan.num_steps):
            is_last = step == plan.num_steps - 1
            if is_last and not plan.last_rows.numel():
                readouts.append(hidden[:0])
                break
            rows = token_part.index_select(0, plan.tokens[step]) + mtp.project_hidden(hidden)
            layout, kept = (plan.last_layout, plan.last_rows) if is_last else (plan.layout, None)
            hidden = mtp.norm(mtp.layer(rows, angles, layout, kept))
            readouts.append(hidden)
        return readouts

    def training_blocks(self) -> Sequence[nn.Module]:
        return (self.mtp.layer,)


def step_embeddings(input_ids: Tensor, embed_tokens: Tensor) -> Tensor:
    """Embeddings of the packed tokens and, last, of id 0: [T + 1, H]."""
    return embed_tokens[torch.cat((input_ids, input_ids.new_zeros(1)))]
