"""EAGLE-3: chain drafting for one sequence.

Cache row ``j`` belongs to features ``a_j`` and token ``x_{j+1}``. Rows with the target's own features stay; the rows of
a round's speculation follow them and are overwritten by the next round.

A step is one row of a small layer, so its cost is the number of operations: weights that read the same input are
joined, and token ids stay on the device until the chain is complete.

Legend: R new rows, C rows the cache can hold, H hidden size, I MLP size, n query heads, m key/value heads, d head size,
W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import Proposal, Proposer, TargetTables
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.parts.norm import RMSNorm
from specforge.algorithms.parts.vocabulary import target_ids

INITIAL_ROWS = 256


class Eagle3Proposer(Proposer):
    """Greedy chains. The draft's weights are read when a sequence starts (:meth:`reset`)."""

    @torch.inference_mode()
    def __init__(self, draft: Eagle3Draft, tables: TargetTables) -> None:
        self.draft = draft
        self._embedding = tables.embed_tokens
        config = draft.config
        self._head_counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self._num_rows = 0
        self._cache = draft.fc.weight.new_empty(0, 2 * config.num_key_value_heads, config.head_dim).detach()
        self._grow(INITIAL_ROWS)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        self._target_ids = target_ids(self.draft.d2t)
        self._weights = JoinedWeights.of(self.draft)
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
        if not num_proposals:
            return Proposal(())
        chosen = [self._best(logits)]
        while len(chosen) < num_proposals:
            chosen.append(self._best(self._speculate(chosen[-1])))
        return Proposal(tuple(torch.cat(chosen).tolist()))

    @torch.inference_mode()
    def append_true_rows(self, aux: Tensor, next_tokens: list[int]) -> Tensor:
        """Drop what was speculated, append rows with the target's features, and return the last row's logits [W].

        ``aux`` [rows, num_aux * Ht] of the next positions, ``next_tokens`` the token that follows each.
        """
        self._num_rows = self._num_true
        self._logits = self._append(self.draft.fuse(aux), torch.tensor(next_tokens))
        self._num_true = self._num_rows
        return self._logits

    @torch.inference_mode()
    def speculate(self, token: int) -> Tensor:
        """One more row on the draft's own hidden state, for ``token`` (a target id); its logits [W]."""
        return self._speculate(torch.tensor([token]))

    def _speculate(self, token: Tensor) -> Tensor:
        hidden = self._next_hidden
        assert hidden is not None, "speculation continues a sequence: append true rows first"
        return self._append(hidden, token)

    def _best(self, logits: Tensor) -> Tensor:
        """Target id of the largest logit, int64 [1] on the draft's device."""
        return self._target_ids.index_select(0, logits.argmax(dim=-1, keepdim=True))

    def _append(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Append rows of ``hidden`` [R, H] and ``tokens`` int64 [R]; the logits [W] of the last one.

        Only the last row has an output: the layer is the only one, so the others serve as keys and values alone.
        """
        weights, num_queries = self._weights, self._head_counts[0]
        embedded = self._embedding.index_select(0, tokens.to(self._embedding.device)).to(hidden)
        inputs = weights.normalise(torch.stack((embedded, hidden), dim=1), weights.input_norms)
        heads = (inputs.flatten(1) @ weights.qkv).unflatten(-1, (-1, self._cache.shape[2]))
        start, end = self._num_rows, self._num_rows + len(heads)
        if end > len(self._cache):
            self._grow(max(end, 2 * len(self._cache)))
        turning, values = heads.split((num_queries + self._head_counts[1], self._head_counts[2]), dim=1)
        if weights.head_norms is not None:
            turning = weights.normalise(turning, weights.head_norms)
        turned = torch.addcmul(
            turning * self._cos[start:end], turning.roll(turning.shape[2] // 2, dims=2), self._sin[start:end]
        )
        self._cache[start:end, : self._head_counts[1]] = turned[:, num_queries:]
        self._cache[start:end, self._head_counts[1] :] = values
        self._num_rows = end
        residual = (inputs[:, 1] if self.draft.config.norm_before_residual else hidden)[-1:]
        output = weights.finish(residual, self._attend(turned[-1, :num_queries]))
        readout, self._next_hidden = self.draft.read_out(output)
        logits: Tensor = self.draft.lm_head(readout)[0]
        return logits

    def _attend(self, queries: Tensor) -> Tensor:
        """One row of queries [n, d] over the whole cache: [1, n*d]."""
        keys, values = self._cache[: self._num_rows].transpose(0, 1).chunk(2)
        folded = queries.unflatten(0, (keys.shape[0], -1)) * queries.shape[1] ** -0.5
        shares = torch.softmax(torch.bmm(folded, keys.transpose(1, 2)), dim=-1, dtype=torch.float32)
        return torch.bmm(shares.to(values.dtype), values).view(1, -1)

    def _grow(self, capacity: int) -> None:
        """Room for ``capacity`` rows, keeping those that are there, and their rotary angles."""
        old = self._cache
        self._cache = old.new_empty(capacity, *old.shape[1:])
        self._cache[: self._num_rows] = old[: self._num_rows]
        cos, sin = self.draft.midlayer.self_attn.rotary(torch.arange(capacity, device=old.device))
        # the half that a head is rolled by enters its first half with a minus
        self._cos = torch.cat((cos, cos), dim=-1).unsqueeze(1).to(old.dtype)
        self._sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(old.dtype)


@dataclass(frozen=True, slots=True)
class JoinedWeights:
    """The layer's weights as a step multiplies them: from the right, [in, out]."""

    eps: Tensor  # scalar, fp32
    input_norms: Tensor  # [2, H]: of the token, of the hidden state
    qkv: Tensor  # [2H, (n + 2m) * d]
    head_norms: Tensor | None  # [n + m, d]
    output: Tensor  # [n * d, H]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [H, 2I]
    down: Tensor  # [I, H]

    @classmethod
    def of(cls, draft: Eagle3Draft) -> JoinedWeights:
        layer, attention, mlp = draft.midlayer, draft.midlayer.self_attn, draft.midlayer.mlp
        head_norms = None
        if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
            queries, groups, _ = attention.head_counts
            norms = attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(groups, -1)
            head_norms = torch.cat(norms).detach()
        return cls(
            eps=torch.tensor(draft.config.rms_norm_eps, device=draft.fc.weight.device),
            input_norms=torch.stack((layer.input_layernorm.weight, layer.hidden_norm.weight)).detach(),
            qkv=torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).detach().t(),
            head_norms=head_norms,
            output=attention.o_proj.weight.detach().t(),
            post_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach().t(),
            down=mlp.down_proj.weight.detach().t(),
        )

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension; the quotient is cast back before the weight, as ``parts.norm`` does."""
        wide = x.float()
        squares = torch.linalg.vecdot(wide, wide).unsqueeze(-1)
        return (wide * torch.add(self.eps, squares, alpha=1.0 / x.shape[-1]).rsqrt_()).to(x.dtype).mul_(weight)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP onto ``residual`` [R, H], with ``attended`` [R, n*d]."""
        residual = torch.addmm(residual, attended, self.output)
        gate, up = (self.normalise(residual, self.post_norm) @ self.gate_up).chunk(2, dim=-1)
        return torch.addmm(residual, F.silu(gate) * up, self.down)
