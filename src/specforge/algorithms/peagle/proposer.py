"""P-EAGLE: a chain for one sequence in one pass.

Cache row ``j`` belongs to features ``a_j`` and token ``x_{j+1}``. The last true row gives the first token, each of the
placeholder rows behind it one more; placeholders leave the cache at once.

Legend: R new rows, H hidden size, W draft vocabulary, V target vocabulary, l proposals.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer
from specforge.algorithms.parts.row_cache import RowCache
from specforge.algorithms.parts.sampling import distribution, draw
from specforge.algorithms.parts.vocabulary import target_ids
from specforge.algorithms.peagle.model import PEagleDraft


class PEagleProposer(Proposer):
    """Chains, greedy or sampled: the tokens of a chain are drawn independently, each from its row's distribution."""

    def __init__(self, draft: PEagleDraft) -> None:
        self.draft = draft
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        self._caches = [RowCache() for _ in range(self.draft.config.num_layers)]
        self._target_ids = target_ids(self.draft.d2t)
        self._readout: Tensor | None = None

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        aux, first = features["aux"], self._caches[0].num_rows
        if first + len(aux) != len(tokens) - 1:
            raise ValueError(
                f"{len(tokens)} committed tokens need features of {len(tokens) - 1} positions, got {first + len(aux)}"
            )
        logits = self.parallel_logits(aux, tokens[first + 1 : first + 1 + len(aux)], request.num_proposals)
        if request.sampling is None:
            return Proposal(tuple(self._target_ids[logits.argmax(-1)].tolist()))
        probabilities = self._expand(distribution(logits, request.sampling))
        return Proposal(tuple(draw(row, request.sampling.generator) for row in probabilities), probabilities)

    @torch.inference_mode()
    def parallel_logits(self, aux: Tensor, next_tokens: list[int], num_proposals: int) -> Tensor:
        """Append true rows (``aux`` [R, num_aux * Ht], the token that follows each); logits [l, W] of the proposals."""
        num_masked = max(num_proposals - 1, 0)
        ids = torch.tensor(next_tokens, dtype=torch.int64, device=self._target_ids.device)
        tokens, hidden = self.draft.enter(aux, ids, num_masked)
        first = self._caches[0].num_rows
        positions = torch.arange(first, first + len(hidden), device=hidden.device)
        angles = self.draft.layer(0).self_attn.rotary(positions)
        for index, cache in enumerate(self._caches):
            layer, inputs = self.draft.layer(index), self.draft.attention_input(index, tokens, hidden)
            queries = layer.self_attn.queries(inputs, angles)
            attended = cache.attend(queries, *layer.self_attn.keys_values(inputs, angles))
            hidden = layer.finish(hidden, attended)
            cache.truncate(first + len(aux))
        if len(aux):
            self._readout = hidden[len(aux) - 1 : len(aux)]
        assert self._readout is not None, "a sequence starts with true rows"
        read = torch.cat((self._readout, hidden[len(aux) :]))[:num_proposals]
        logits: Tensor = self.draft.lm_head(self.draft.norm(read)).float()
        return logits

    def _expand(self, probabilities: Tensor) -> Tensor:
        """[l, W] over the draft vocabulary -> [l, V], zeros outside."""
        full = probabilities.new_zeros(len(probabilities), self.draft.config.vocab_size)
        full[:, self._target_ids] = probabilities
        return full
