"""Growing a tree of drafted tokens (EAGLE-2, arXiv 2406.16858, section 4; EAGLE-3 drafts the same tree).

Candidates are numbered in the order in which they are scored. The score of one is the sum of the log-probabilities on
its path, so it never exceeds its parent's and the best candidates always contain their ancestors. Ties go to the lower
number, and among the children of a node to the lower token id.

Legend: b nodes of the beam, k children a node, W draft vocabulary, S speculative rows so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.algorithms.base import TreeShape


@dataclass(frozen=True, slots=True)
class Beam:
    """The nodes that are fed next, best first.

    * ``tokens`` int64 [b]: draft ids
    * ``sources`` int64 [b]: row of the last pass that each continues (its parent)
    * ``visible`` bool [b, S + b]: speculative rows that each sees, its ancestors' and its own
    """

    tokens: Tensor
    sources: Tensor
    visible: Tensor


class TreeGrowth:
    """All on the CPU. :meth:`extend` once with the children of the root, then once for each beam that was fed."""

    def __init__(self, shape: TreeShape) -> None:
        self._shape = shape
        self._tokens: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._num_candidates = 0
        self._beam_nodes = torch.tensor([-1])
        self._beam_scores = torch.zeros(1)
        self._visible = torch.zeros(1, 0, dtype=torch.bool)

    def extend(self, log_probabilities: Tensor) -> Beam:
        """Add the ``top_k`` best children of every node of the beam, and give the new beam, at most ``top_k`` nodes.

        ``log_probabilities`` fp32 [b, W]; b is 1 for the root.
        """
        values, tokens = largest(log_probabilities, self._shape.top_k)
        scores = (values + self._beam_scores.unsqueeze(-1)).flatten()
        num_children = tokens.shape[1]
        self._tokens.append(tokens.flatten())
        self._parents.append(self._beam_nodes.repeat_interleave(num_children))
        self._scores.append(scores)
        best = scores.argsort(descending=True, stable=True)[: self._shape.top_k]
        sources = best // num_children
        self._beam_nodes = self._num_candidates + best
        self._beam_scores = scores[best]
        self._num_candidates += scores.numel()
        own = torch.eye(best.numel(), dtype=torch.bool)
        self._visible = torch.cat((self._visible[sources], own), dim=1)
        return Beam(tokens.flatten()[best], sources, self._visible)

    def best_nodes(self) -> tuple[Tensor, tuple[int, ...]]:
        """Draft ids int64 [l] of the ``num_nodes - 1`` best candidates by number, and the index of each one's parent
        among them (-1: the root). Fewer where there are fewer candidates.
        """
        scores = torch.cat(self._scores)
        chosen = scores.argsort(descending=True, stable=True)[: max(self._shape.num_nodes - 1, 0)].sort().values
        index = {-1: -1} | {node: place for place, node in enumerate(chosen.tolist())}
        parents = torch.cat(self._parents)[chosen].tolist()
        return torch.cat(self._tokens)[chosen], tuple(index[parent] for parent in parents)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of every row of ``values`` [b, W] and their columns, [b, count] each, on the CPU.

    Descending, equal ones by column; all of a row where ``count`` is more than W.
    """
    count = min(count, values.shape[1])
    values = values.nan_to_num(nan=float("-inf"))  # a draft that broke down: its tokens are the last to be taken
    border = values.topk(count, dim=1).values[:, -1:]
    rows, columns = (values >= border).nonzero(as_tuple=True)
    kept = values[rows, columns].cpu()
    rows, columns = rows.cpu(), columns.cpu()
    order = kept.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    starts = torch.searchsorted(rows, torch.arange(values.shape[0]))
    picked = order[starts.unsqueeze(-1) + torch.arange(count)]
    return kept[picked], columns[picked]
