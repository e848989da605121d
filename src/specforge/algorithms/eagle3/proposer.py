"""EAGLE-3: chain drafting for one sequence (algorithms.md 10.1, 10.2).

Cache row ``j`` belongs to features ``a_j`` and token ``x_{j+1}``. Rows with the target's own features stay; the rows of
a round's speculation follow them and are overwritten by the next round.

Legend: C rows the cache can hold, H hidden size, n query heads, m key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import Proposal, Proposer, TargetTables
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.vocabulary import target_ids

INITIAL_ROWS = 256


class Eagle3Proposer(Proposer):
    """Greedy chains. The draft's weights are read when a sequence starts (:meth:`reset`)."""

    @torch.inference_mode()
    def __init__(self, draft: Eagle3Draft, tables: TargetTables) -> None:
        self.draft = draft
        self._embedding = tables.embed_tokens
        config = draft.config
        weight = draft.fc.weight
        self._num_rows = 0
        self._keys = weight.new_empty(config.num_key_value_heads, 0, config.head_dim).detach()
        self._values = self._keys
        self._grow(INITIAL_ROWS)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        attention = self.draft.midlayer.self_attn
        self._target_ids = target_ids(self.draft.d2t).tolist()
        self._token_weight, self._hidden_weight = (half.detach() for half in attention.halves())
        self._num_true = 0
        self._num_rows = 0
        self._next_hidden: Tensor | None = None
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], num_proposals: int) -> Proposal:
        aux = features["aux"]
        first = self._num_true + 1
        logits = self.append_true_rows(aux, tokens[first : first + aux.shape[0]]) if aux.shape[0] else self._logits
        if self._num_true != len(tokens) - 1 or logits is None:
            raise ValueError(
                f"{len(tokens)} committed tokens need features of {len(tokens) - 1} positions, got {self._num_true}"
            )
        proposed: list[int] = []
        while len(proposed) < num_proposals:
            proposed.append(self._target_ids[int(logits.argmax())])
            if len(proposed) < num_proposals:
                logits = self.speculate(proposed[-1])
        return Proposal(tuple(proposed))

    @torch.inference_mode()
    def append_true_rows(self, aux: Tensor, next_tokens: list[int]) -> Tensor:
        """Drop what was speculated, append rows with the target's features, and return the last row's logits [W].

        ``aux`` [rows, num_aux * Ht] of the next positions, ``next_tokens`` the token that follows each. Only the last
        row has an output: the layer is the only one, so the others serve as keys and values alone.
        """
        self._num_rows = self._num_true
        draft, layer = self.draft, self.draft.midlayer
        attention = layer.self_attn
        hidden = draft.fuse(aux)
        normed = layer.hidden_norm(hidden)
        split = attention.num_query_features
        token_part = self._embed(next_tokens)
        angles = self._angles(len(next_tokens))
        projected = F.linear(normed, self._hidden_weight[split:]) + F.linear(token_part, self._token_weight[split:])
        self._store(*attention.keys_values(projected, angles))
        self._num_true = self._num_rows
        query = F.linear(normed[-1:], self._hidden_weight[:split]) + F.linear(
            token_part[-1:], self._token_weight[:split]
        )
        self._logits = self._finish(
            hidden[-1:], normed[-1:], attention.queries(query, (angles[0][-1:], angles[1][-1:]))
        )
        return self._logits

    @torch.inference_mode()
    def speculate(self, token: int) -> Tensor:
        """One more row on the draft's own hidden state, for ``token`` (a target id); its logits [W]."""
        hidden = self._next_hidden
        assert hidden is not None, "speculation continues a sequence: append true rows first"
        layer = self.draft.midlayer
        attention = layer.self_attn
        normed = layer.hidden_norm(hidden)
        projected = F.linear(normed, self._hidden_weight) + F.linear(self._embed([token]), self._token_weight)
        split = attention.num_query_features
        angles = self._angles(1)
        self._store(*attention.keys_values(projected[:, split:], angles))
        return self._finish(hidden, normed, attention.queries(projected[:, :split], angles))

    def _embed(self, tokens: list[int]) -> Tensor:
        """Normed embeddings [rows, H] in the draft's dtype."""
        index = torch.tensor(tokens, device=self._embedding.device)
        rows = self._embedding.index_select(0, index).to(self._keys.device, self._keys.dtype)
        normed: Tensor = self.draft.midlayer.input_layernorm(rows)
        return normed

    def _angles(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Rotary angles of the next ``num_rows`` rows; makes room for them."""
        end = self._num_rows + num_rows
        if end > self._keys.shape[1]:
            self._grow(max(end, 2 * self._keys.shape[1]))
        cos, sin = self._rotary
        return cos[self._num_rows : end], sin[self._num_rows : end]

    def _grow(self, capacity: int) -> None:
        """Room for ``capacity`` rows, keeping those that are there."""
        old = (self._keys, self._values)
        self._keys = old[0].new_empty(old[0].shape[0], capacity, old[0].shape[2])
        self._values = torch.empty_like(self._keys)
        for new, kept in zip((self._keys, self._values), old, strict=True):
            new[:, : self._num_rows] = kept[:, : self._num_rows]
        self._rotary = self.draft.midlayer.self_attn.rotary(torch.arange(capacity, device=self._keys.device))

    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Append rows [rows, m, d] to the cache, which has room for them."""
        end = self._num_rows + keys.shape[0]
        self._keys[:, self._num_rows : end] = keys.transpose(0, 1)
        self._values[:, self._num_rows : end] = values.transpose(0, 1)
        self._num_rows = end

    def _finish(self, hidden: Tensor, normed: Tensor, queries: Tensor) -> Tensor:
        """Attend with one row over the whole cache, finish the layer, and read the logits [W] of that row."""
        groups, _, size = self._keys.shape
        keys, values = self._keys[:, : self._num_rows], self._values[:, : self._num_rows]
        folded = queries.view(groups, -1, size) * size**-0.5
        weights = torch.softmax(torch.bmm(folded, keys.transpose(1, 2)), dim=-1, dtype=torch.float32)
        attended = torch.bmm(weights.to(values.dtype), values).view(1, -1, size)
        readout, self._next_hidden = self.draft.read_out(self.draft.midlayer.finish(hidden, normed, attended))
        logits: Tensor = self.draft.lm_head(readout)[0]
        return logits
