"""Medusa: chains and trees for one sequence, all heads from the last state that the target has computed.

Legend: H hidden size, V vocabulary, K heads, S largest number of children of a node.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, Proposer, TargetTables, TreeShape, target_logits
from specforge.algorithms.medusa.model import MedusaDraft
from specforge.algorithms.parts.sampling import distribution, draw


class MedusaProposer(Proposer):
    """At most one token a head. The heads know nothing of each other's tokens."""

    drafts_trees: ClassVar[bool] = True

    def __init__(self, draft: MedusaDraft, tables: TargetTables) -> None:
        self.draft = draft
        self._tables = tables
        self.reset()

    def reset(self) -> None:
        self._num_features = 0
        self._last: Tensor | None = None

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        last = features["last"]
        self._num_features += len(last)
        if len(last):
            self._last = last[-1:]
        if self._last is None or self._num_features != len(tokens) - 1:
            raise ValueError(
                f"{len(tokens)} committed tokens need features of {len(tokens) - 1} positions, got {self._num_features}"
            )
        num_heads = self.draft.config.num_heads
        if request.tree is not None:
            num_levels = min(request.tree.depth + 1, num_heads)
            return best_products(self._logits(num_levels).log_softmax(-1), request.tree)
        logits = self._logits(min(request.num_proposals, num_heads))
        if request.sampling is None or not len(logits):
            return Proposal(tuple(logits.argmax(-1).tolist()))
        probabilities = distribution(logits, request.sampling)
        drawn = tuple(draw(row, request.sampling.generator) for row in probabilities)
        return Proposal(drawn, probabilities)

    def _logits(self, num_heads: int) -> Tensor:
        """fp32 [num_heads, V] of the first heads."""
        assert self._last is not None
        rows = []
        for head in range(num_heads):
            state = self.draft(head, self._last)
            if self.draft.config.shared_head:
                rows.append(target_logits(self._tables, state))
            else:
                rows.append(torch.nn.functional.linear(state, self.draft.head_weight(head)).float())
        return torch.cat(rows) if rows else self._tables.lm_head.new_zeros(0, self._tables.lm_head.shape[0])


def best_products(scores: Tensor, shape: TreeShape) -> Proposal:
    """The tree of the ``shape.num_nodes - 1`` most probable paths. ``scores`` [levels, V] are log-probabilities.

    A path takes one of the ``top_k`` best tokens of each level; its probability is their product. It shrinks along a
    path, so the best paths are closed under parents, and they are found in order: after a path come its best child and
    its next sibling. Of equal paths the one whose ranks are lexicographically lower comes first.
    """
    ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    values: list[list[float]] = ordered[:, : shape.top_k].double().tolist()
    ids: list[list[int]] = order[:, : shape.top_k].tolist()
    found: dict[tuple[int, ...], int] = {}
    heap: list[tuple[float, tuple[int, ...]]] = []

    def consider(ranks: tuple[int, ...]) -> None:
        if len(ranks) <= len(values) and ranks[-1] < len(values[0]):
            heapq.heappush(heap, (-sum(level[rank] for level, rank in zip(values, ranks, strict=False)), ranks))

    consider((0,))
    while heap and len(found) < shape.num_nodes - 1:
        _, ranks = heapq.heappop(heap)
        found[ranks] = len(found)
        consider((*ranks[:-1], ranks[-1] + 1))
        consider((*ranks, 0))
    tokens = tuple(ids[len(ranks) - 1][ranks[-1]] for ranks in found)
    return Proposal(tokens, parents=tuple(found.get(ranks[:-1], -1) for ranks in found))
