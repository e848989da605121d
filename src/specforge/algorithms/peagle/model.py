"""The P-EAGLE draft: an EAGLE layer and ordinary ones, over true rows and placeholders in one pass.

Parameters and buffers carry the names that vLLM loads.

Legend: T packed tokens, C context tokens, E_d elements of depth d, E elements of all depths, R rows, H hidden size, Ht
of the target, n query heads, m key/value heads, d head size, W draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel
from specforge.algorithms.parts.attention import PackedLayout, unrolled_attention
from specforge.algorithms.parts.decoder import DecoderLayer
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.vocabulary import vocabulary_maps
from specforge.algorithms.peagle.config import PEagleDraftConfig
from specforge.algorithms.peagle.features import ElementPlan
from specforge.errors import DraftError


class ElementLayer(DecoderLayer):
    """An ordinary layer over elements."""

    def __init__(self, config: PEagleDraftConfig) -> None:
        super().__init__(config, qk_norm=False)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], plan: ElementPlan, *, outputs_only: bool
    ) -> Tensor:
        """Next states of all elements, depth-major, from ``hidden`` [E, H] with the rotary ``angles`` of their rows.

        ``outputs_only`` leaves of depth 0 the rows ``plan.outputs``.
        """
        return self._next(hidden, self.input_layernorm(hidden), angles, plan, outputs_only=outputs_only)

    def _next(
        self,
        hidden: Tensor,
        inputs: Tensor,
        angles: tuple[Tensor, Tensor],
        plan: ElementPlan,
        *,
        outputs_only: bool,
    ) -> Tensor:
        """:meth:`forward`, with what the attention reads in ``inputs`` [E, H or 2H]."""
        attended = attend_elements(self, inputs, angles, plan, outputs_only=outputs_only)
        return self.finish(_drop_rows(hidden, plan.sizes[0], plan.outputs if outputs_only else None), attended)


class FirstLayer(ElementLayer):
    """Attention reads ``concat(input_layernorm(token), hidden_norm(hidden))``, 2H wide; the residual is ``hidden``."""

    def __init__(self, config: PEagleDraftConfig) -> None:
        super().__init__(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        attention, size = self.self_attn, 2 * config.hidden_size
        attention.q_proj = nn.Linear(size, config.num_attention_heads * config.head_dim, bias=False)
        attention.k_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=False)
        attention.v_proj = nn.Linear(size, config.num_key_value_heads * config.head_dim, bias=False)

    def attention_input(self, token: Tensor, hidden: Tensor) -> Tensor:
        """[R, H] and [R, H] -> [R, 2H]."""
        return torch.cat((self.input_layernorm(token), self.hidden_norm(hidden)), dim=-1)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        plan: ElementPlan,
        *,
        outputs_only: bool,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """As every layer; ``tokens`` and ``hidden`` [C + 1, H] are the context and, last, the row of placeholders."""
        assert tokens is not None, "the first layer reads tokens"
        num_context, num_elements = plan.sizes[0], sum(plan.sizes)
        elements = torch.arange(num_elements, device=hidden.device).clamp(max=num_context)
        inputs = self.attention_input(tokens, hidden).index_select(0, elements)
        return self._next(hidden.index_select(0, elements), inputs, angles, plan, outputs_only=outputs_only)


class PEagleDraft(DraftModel):
    """``kept_ids`` int64 [W] ascending are the target ids of the draft vocabulary, ``None`` for all.

    The embedding is the draft's own: the row ``mask_token_id``, that of unknown tokens, is learnt. ``mask_hidden``
    stands for unknown features. The buffers ``d2t`` int64 [W] and ``t2d`` bool [V] are always there.
    """

    def __init__(self, config: PEagleDraftConfig, kept_ids: Tensor | None = None) -> None:
        super().__init__()
        _check(config)
        self.config = config
        width = len(config.aux_layers) * config.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, width))
        self.fc = nn.Linear(width, config.hidden_size, bias=False)
        ordinary = (ElementLayer(config) for _ in range(config.num_layers - 1))
        self.layers = nn.ModuleList([FirstLayer(config), *ordinary])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        kept = torch.arange(config.draft_vocab_size) if kept_ids is None else kept_ids.cpu()
        d2t, t2d = vocabulary_maps(kept, config.vocab_size)
        self.d2t: Tensor
        self.t2d: Tensor
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)

    def enter(self, aux: Tensor, token_ids: Tensor, num_masked: int = 0) -> tuple[Tensor, Tensor]:
        """(tokens [R, H], hidden states [R, H]) of true rows ``aux`` [.., num_aux * Ht] and ``num_masked`` more."""
        mask_ids = token_ids.new_full((num_masked,), self.config.mask_token_id)
        masked = self.mask_hidden.view(1, -1).expand(num_masked, -1)
        features = torch.cat((aux.to(self.fc.weight.dtype), masked))
        return self.embed_tokens(torch.cat((token_ids, mask_ids))), self.fc(features)

    def attention_input(self, index: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What the projections of layer ``index`` read of rows with ``hidden`` [R, H] and, in the first, ``tokens``."""
        layer = self.layers[index]
        if isinstance(layer, FirstLayer):
            return layer.attention_input(tokens, hidden)
        assert isinstance(layer, DecoderLayer)
        normed: Tensor = layer.input_layernorm(hidden)
        return normed

    def training_blocks(self) -> Sequence[nn.Module]:
        return tuple(self.layers)

    def layer(self, index: int) -> DecoderLayer:
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def forward(self, aux: Tensor, plan: ElementPlan) -> list[Tensor]:
        """What the head reads of the read-out elements, [E_d, H] for each depth of ``plan``. ``aux`` [T, num_aux * Ht].

        All placeholders enter alike: they are one row behind the context up to the first layer's norms.
        """
        sizes = plan.sizes
        positions = [plan.positions]
        positions += [plan.positions[anchors] + depth for depth, anchors in enumerate(plan.anchors, start=1)]
        angles = self.layer(0).self_attn.rotary(torch.cat(positions))
        tokens, hidden = self.enter(aux[plan.context], plan.token_ids, num_masked=1)
        first, *others = self.layers
        hidden = first(hidden, angles, plan, outputs_only=not others, tokens=tokens)
        for layer in others:
            hidden = layer(hidden, angles, plan, outputs_only=layer is others[-1])
        sizes[0] = plan.outputs.numel()
        readouts: Tensor = self.norm(hidden)
        return list(readouts.split(sizes))


def attend_elements(
    layer: DecoderLayer, inputs: Tensor, angles: tuple[Tensor, Tensor], plan: ElementPlan, *, outputs_only: bool
) -> Tensor:
    """Attention [E, n, d] of all elements, depth-major; of depth 0 the rows ``plan.outputs`` where ``outputs_only``.

    ``inputs`` [E, H] or, in the first layer, [E, 2H]; ``angles`` of all E rows.
    """
    sizes, attention = plan.sizes, layer.self_attn
    keys, values = (part.split(sizes) for part in attention.keys_values(inputs, angles))
    layouts = list(plan.layouts)
    if outputs_only:
        inputs = _drop_rows(inputs, sizes[0], plan.outputs)
        angles = _drop_rows(angles[0], sizes[0], plan.outputs), _drop_rows(angles[1], sizes[0], plan.outputs)
        sizes[0], layouts[0] = plan.outputs.numel(), plan.output_layout
    queries = attention.queries(inputs, angles).split(sizes)
    return torch.cat(element_attention(layouts, plan.shallower, queries, keys, values))


def element_attention(
    layouts: Sequence[PackedLayout],
    shallower: Sequence[Tensor],
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> list[Tensor]:
    """Attention [E_d, n, d] of each depth: an element (a, d) sees depth 0 up to ``a``, and (a, 1) .. (a, d).

    All arguments have one entry a depth, except ``shallower`` (see :class:`ElementPlan`), which starts with depth 1.
    """
    attended: list[Tensor] = []
    own: list[tuple[Tensor, Tensor]] = []
    for depth, layout in enumerate(layouts):
        if depth:
            kept = shallower[depth - 1]
            own = [(k.index_select(0, kept), v.index_select(0, kept)) for k, v in own]
            own.append((keys[depth], values[depth]))
        attended.append(unrolled_attention(layout, queries[depth], (keys[0], values[0]), own))
    return attended


def _drop_rows(rows: Tensor, num_first: int, kept: Tensor | None) -> Tensor:
    """``rows`` with only ``kept`` of the first ``num_first``; ``None`` keeps all."""
    return rows if kept is None else torch.cat((rows[:num_first].index_select(0, kept), rows[num_first:]))


def _check(config: PEagleDraftConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise DraftError(
            f"num_attention_heads ({config.num_attention_heads}) must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}) and head_dim ({config.head_dim}) even; change the draft config"
        )
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise DraftError(
            f"mask_token_id must be an id below the vocabulary of {config.vocab_size}, got {config.mask_token_id}; "
            "change the draft config"
        )
