"""MTP: chain drafting for one sequence, equal to the training unroll.

In training, row ``j`` of step ``k`` reads token ``j + 1 + k`` and sees the rows of step ``k`` alone. So every step has
its own cache, and a drafted token is read by one more row of every step that it reaches: with committed tokens up to
``x_n`` and ``i`` drafted ones, step ``k`` has the rows ``0 .. min(n - 1, n - 1 - k + i)``. A round of ``l`` proposals
costs ``l * (l - 1) / 2`` speculative rows in ``l - 1`` passes, and a committed token one row of every step.

Legend: R new rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, TargetTables, target_logits
from specforge.algorithms.mtp.model import MtpDraft
from specforge.algorithms.parts.row_cache import RowBuffer, RowCache
from specforge.algorithms.parts.sampling import distribution, draw


class MtpProposer(Proposer):
    """Chains, greedy or sampled. ``_states[k]`` are the states that enter step ``k``, ``_caches[k]`` its rows."""

    def __init__(self, draft: MtpDraft, tables: TargetTables) -> None:
        self.draft = draft
        self._tables = tables
        self.reset()

    def reset(self) -> None:
        self._caches: list[RowCache] = []
        self._states = [RowBuffer()]
        self._num_committed = 0

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        self._drop_speculation()
        last = features["last"]
        if len(last):
            self._states[0].append(last)
        if self._states[0].num_rows != len(tokens) - 1:
            raise ValueError(
                f"{len(tokens)} committed tokens need features of {len(tokens) - 1} positions, "
                f"got {self._states[0].num_rows}"
            )
        self._num_committed = len(tokens)
        extended, rows = list(tokens), []
        for step in range(request.num_proposals):
            logits = self.extend(extended, step + 1)
            if request.sampling is None:
                extended.append(int(logits.argmax()))
            else:
                rows.append(distribution(logits, request.sampling))
                extended.append(draw(rows[-1], request.sampling.generator))
        return Proposal(tuple(extended[len(tokens) :]), torch.stack(rows) if rows else None)

    @torch.inference_mode()
    def extend(self, tokens: list[int], num_steps: int) -> Tensor:
        """Compute the missing rows of the first ``num_steps`` steps; the logits [V] of the last one's last row.

        ``tokens`` are the committed ones and those drafted so far, at least ``num_steps - 1``.
        """
        while len(self._caches) < num_steps:
            self._caches.append(RowCache())
            self._states.append(RowBuffer())
        for step in range(num_steps):
            start = self._caches[step].num_rows
            end = min(self._states[0].num_rows, len(tokens) - 1 - step)
            if start < end:
                ids = torch.tensor(tokens[start + step + 1 : end + step + 1])
                self._append(step, self._states[step].rows(start, end), ids)
        states = self._states[num_steps]
        return target_logits(self._tables, states.rows(states.num_rows - 1, states.num_rows))[0]

    def _append(self, step: int, hidden: Tensor, ids: Tensor) -> None:
        """Append the next rows of ``step`` from ``hidden`` [R, H] and the tokens ``ids`` [R]."""
        mtp, cache = self.draft.mtp, self._caches[step]
        attention = mtp.layer.self_attn
        embedded = self._tables.embed_tokens.index_select(0, ids.to(self._tables.embed_tokens.device))
        rows = mtp.project_tokens(embedded) + mtp.project_hidden(hidden)
        normed = mtp.layer.input_layernorm(rows)
        first = cache.num_rows
        angles = attention.rotary(torch.arange(first, first + len(rows), device=rows.device))
        attended = cache.attend(attention.queries(normed, angles), *attention.keys_values(normed, angles))
        self._states[step + 1].append(mtp.norm(mtp.layer.finish(rows, attended)))

    def _drop_speculation(self) -> None:
        """Keep the rows whose token was committed at the last call: of step ``k`` all but the last ``k``."""
        for step, cache in enumerate(self._caches):
            num_rows = self._num_committed - 1 - step
            cache.truncate(num_rows)
            self._states[step + 1].truncate(num_rows)
