"""EAGLE-3: drafting chains and trees for one sequence.

Cache row ``j`` belongs to features ``a_j`` and token ``x_{j+1}``. Rows with the target's own features stay; the rows of
a round's speculation follow them and are overwritten by the next round. In a chain row ``n + i`` has position
``n + i``; in a tree all rows of level ``i`` have it.

A step is a row or a few of a small layer, so its cost is the number of operations: token ids stay on the device until
a greedy chain is complete.

Legend: R new rows, C rows the cache can hold, H hidden size, n query heads, m key/value heads, d size of a query or key
head, e of a value head, V target vocabulary, W draft vocabulary, l proposals.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, Sampling, TargetTables, TreeShape
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.algorithms.eagle3.step import Angles, shared_step
from specforge.algorithms.eagle3.tree import Beam, TreeGrowth
from specforge.algorithms.parts.sampling import distribution, draw
from specforge.algorithms.parts.vocabulary import target_ids

INITIAL_ROWS = 256


class Eagle3Proposer(Proposer):
    """Chains, greedy or drawn, and trees. The draft's weights are read when a sequence starts (:meth:`reset`), and only
    once by all proposers of the draft.
    """

    drafts_trees = True

    @torch.inference_mode()
    def __init__(self, draft: Eagle3Draft, tables: TargetTables) -> None:
        self.draft = draft
        self._embedding = tables.embed_tokens
        attention, weight = draft.midlayer.self_attn, draft.fc.weight.detach()
        self._keys = weight.new_empty(0, attention.num_groups, attention.head_dim)
        self._values = weight.new_empty(0, attention.num_groups, attention.value_dim)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        self._target_ids = target_ids(self.draft.d2t)
        self._step = shared_step(self.draft)
        self._num_true = 0
        self._num_rows = 0
        self._grow(max(INITIAL_ROWS, len(self._keys)))
        self._next_hidden: Tensor | None = None
        self._true: tuple[Tensor, Tensor | None] | None = None

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        aux = features["aux"]
        first = self._num_true + 1
        if aux.shape[0]:
            self.append_true_rows(aux, tokens[first : first + aux.shape[0]])
        if self._num_true != len(tokens) - 1 or self._true is None:
            raise ValueError(
                f"{len(tokens)} committed tokens need features of {len(tokens) - 1} positions, got {self._num_true}"
            )
        self._num_rows = self._num_true
        logits, self._next_hidden = self._true
        if request.tree is not None:
            return self._tree(logits, request.tree)
        if not request.num_proposals:
            return Proposal(())
        if request.sampling is not None:
            return self._drawn_chain(logits, request.num_proposals, request.sampling)
        chosen = [self._best(logits)]
        while len(chosen) < request.num_proposals:
            chosen.append(self._best(self._speculate(chosen[-1])))
        return Proposal(tuple(torch.cat(chosen).tolist()))

    @torch.inference_mode()
    def append_true_rows(self, aux: Tensor, next_tokens: list[int]) -> Tensor:
        """Drop what was speculated, append rows with the target's features, and return the last row's logits [W].

        ``aux`` [rows, num_aux * Ht] of the next positions, ``next_tokens`` the token that follows each.
        """
        self._num_rows = self._num_true
        logits = self._append(self.draft.fuse(aux), torch.tensor(next_tokens))
        self._num_true = self._num_rows
        self._true = logits, self._next_hidden
        return logits

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

    def _drawn_chain(self, logits: Tensor, num_proposals: int, sampling: Sampling) -> Proposal:
        """Every token is drawn from the distribution after those before it; outside the draft vocabulary that is 0."""
        tokens, drawn_from = [], []
        while True:
            drawn_from.append(distribution(logits, sampling))
            tokens.append(self._target_ids[draw(drawn_from[-1], sampling.generator)])
            if len(tokens) == num_proposals:
                break
            logits = self._speculate(tokens[-1].view(1))
        probabilities = logits.new_zeros(num_proposals, self.draft.config.vocab_size, dtype=torch.float32)
        probabilities[:, self._target_ids] = torch.stack(drawn_from)
        return Proposal(tuple(torch.stack(tokens).tolist()), probabilities)

    def _tree(self, logits: Tensor, shape: TreeShape) -> Proposal:
        """One pass a level; a node sees the committed rows, its ancestors and itself."""
        growth, hidden = TreeGrowth(shape), self._next_hidden
        assert hidden is not None
        beam = growth.extend(torch.log_softmax(logits.float().unsqueeze(0), dim=-1))
        for level in range(shape.depth):
            logits, hidden = self._append_level(hidden, beam, self._num_true + level)
            beam = growth.extend(torch.log_softmax(logits.float(), dim=-1))
        nodes, parents = growth.best_nodes()
        return Proposal(tuple(self._target_ids[nodes.to(self._target_ids.device)].tolist()), None, parents)

    def _append_level(self, hidden: Tensor, beam: Beam, position: int) -> tuple[Tensor, Tensor]:
        """Append the rows of ``beam``, all at ``position``, on their parents' states ``hidden`` [last pass's rows, H].

        Gives logits [b, W] and the states [b, H] that the next level continues.
        """
        tokens = self._target_ids[beam.tokens.to(self._target_ids.device)]
        queries, residual = self._extend(hidden[beam.sources.to(hidden.device)], tokens, position, shared_position=True)
        output = self._step.finish(residual, self._attend_rows(queries, beam.visible))
        readout, carried = self.draft.read_out(output)
        level_logits: Tensor = self.draft.lm_head(readout)
        return level_logits, carried

    def _append(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Append rows of ``hidden`` [R, H] and ``tokens`` int64 [R]; the logits [W] of the last one.

        Only the last row has an output: the layer is the only one, so the others serve as keys and values alone.
        """
        queries, residual = self._extend(hidden, tokens, self._num_rows)
        output = self._step.finish(residual[-1:], self._attend(queries[-1]))
        readout, self._next_hidden = self.draft.read_out(output)
        logits: Tensor = self.draft.lm_head(readout)[0]
        return logits

    def _extend(
        self, hidden: Tensor, tokens: Tensor, position: int, *, shared_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of R rows, the first (or all) at ``position``; queries [R, n, d], residual [R, H]."""
        start, end = self._num_rows, self._num_rows + len(hidden)
        if end > len(self._keys):
            self._grow(max(end, 2 * len(self._keys)))
        places = slice(position, position + (1 if shared_position else len(hidden)))
        embedded = self._embedding.index_select(0, tokens.to(self._embedding.device)).to(hidden)
        heads = self._step.project(embedded, hidden, (self._angles[0][places], self._angles[1][places]))
        self._keys[start:end] = heads.keys
        self._values[start:end] = heads.values
        self._num_rows = end
        return heads.queries, heads.residual

    def _attend(self, queries: Tensor) -> Tensor:
        """One row of queries [n, d] over the whole cache: [1, n*e]."""
        keys, values = self._keys[: self._num_rows].transpose(0, 1), self._values[: self._num_rows].transpose(0, 1)
        folded = queries.unflatten(0, (keys.shape[0], -1)) * queries.shape[1] ** -0.5
        shares = torch.softmax(torch.bmm(folded, keys.transpose(1, 2)), dim=-1, dtype=torch.float32)
        return torch.bmm(shares.to(values.dtype), values).view(1, -1)

    def _attend_rows(self, queries: Tensor, visible: Tensor) -> Tensor:
        """Queries [R, n, d] over the true rows and the ``visible`` bool [R, S] of the speculative ones: [R, n*e]."""
        keys, values = self._keys[: self._num_rows].transpose(0, 1), self._values[: self._num_rows].transpose(0, 1)
        num_rows, num_groups = len(queries), len(keys)
        folded = queries.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(1, 2) * queries.shape[2] ** -0.5
        scores = torch.bmm(folded, keys.transpose(1, 2)).float().unflatten(1, (-1, num_rows))
        scores[..., self._num_true :].masked_fill_(~visible.to(scores.device), float("-inf"))
        shares = torch.softmax(scores, dim=-1).to(values.dtype)
        attended: Tensor = torch.bmm(shares.flatten(1, 2), values).unflatten(1, (-1, num_rows))
        return attended.permute(2, 0, 1, 3).flatten(1)

    def _grow(self, capacity: int) -> None:
        """Room for ``capacity`` rows, keeping those that are there, and their rotary angles."""
        used = self._num_rows
        keys, values = (old.new_empty(capacity, *old.shape[1:]) for old in (self._keys, self._values))
        keys[:used], values[:used] = self._keys[:used], self._values[:used]
        self._keys, self._values = keys, values
        self._angles: Angles = self._step.angles(torch.arange(capacity, device=keys.device))
