"""Attention of one target forward over trees of tokens, or over sequences of different lengths: positions and masks.

Legend: n sequences, m tokens of the tree, or at most of a sequence, S positions in the cache, W slots of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge.errors import TargetError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class TreeAttention:
    """``positions`` int64 [m] of the tokens, and ``visible`` bool [m, S + m]: the cache, the ancestors and itself."""

    positions: Tensor
    visible: Tensor

    @classmethod
    def of(cls, parents: Sequence[int], num_cached: int) -> TreeAttention:
        """``parents`` [m]: an earlier index of the tree, or -1 for a token that follows the cache."""
        related = torch.eye(len(parents), dtype=torch.bool)
        depths: list[int] = []
        for index, parent in enumerate(parents):
            if not -1 <= parent < index:
                raise ValueError(f"token {index} of a tree has the parent {parent}; expected -1 or an earlier token")
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                related[index] |= related[parent]
        cached = torch.ones(len(parents), num_cached, dtype=torch.bool)
        return cls(num_cached + torch.tensor(depths), torch.cat((cached, related), dim=1))

    def mask(self, config: Any, dtype: torch.dtype, device: torch.device) -> Tensor | dict[str, Tensor]:
        """What a transformers backbone of ``config`` takes as ``attention_mask``: added to scores, [1, 1, m, S + m]."""
        columns = torch.cat((torch.arange(self.visible.shape[1] - self.visible.shape[0]), self.positions))
        return _masks(config, _Visible(self.visible[None], self.positions[None], columns[None]), dtype, device)


@dataclass(frozen=True, slots=True)
class BatchAttention:
    """Sequences that follow their own parts of a cache, in which position p of a sequence is in slot p.

    ``positions`` int64 [n, m] of the new tokens. ``slots`` int64 [n, m]: where they go in the cache. A sequence with
    fewer than m tokens is padded: what its last rows see and say means nothing.
    """

    positions: Tensor
    slots: Tensor
    _visible: _Visible
    _is_beginning: bool

    @classmethod
    def of(
        cls, starts: Sequence[int], counts: Sequence[int], parents: Sequence[Sequence[int] | None]
    ) -> BatchAttention:
        """``starts`` [n] positions in the cache, ``counts`` [n] new tokens; ``parents`` as in :class:`TreeAttention`
        for each, ``None`` for a chain.
        """
        width = max(counts)
        first = torch.tensor(starts)[:, None]
        slots = first + torch.arange(width)
        columns = torch.arange(max(starts) + width).repeat(len(starts), 1)
        visible = columns[:, None, :] <= slots[:, :, None]
        # a padding token has a position that the model surely knows
        positions = torch.where(slots < first + torch.tensor(counts)[:, None], slots, first)
        for row, (start, tree) in enumerate(zip(starts, parents, strict=True)):
            if tree is not None:
                attention, end = TreeAttention.of(tree, start), start + len(tree)
                positions[row, : len(tree)] = columns[row, start:end] = attention.positions
                visible[row, : len(tree)] = False
                visible[row, : len(tree), :end] = attention.visible
        is_beginning = len(starts) == 1 and starts[0] == 0 and parents[0] is None
        return cls(positions, slots, _Visible(visible, positions, columns), is_beginning)

    @property
    def num_slots(self) -> int:
        """W, the slots that the new tokens may see."""
        return self._visible.rows.shape[2]

    def mask(self, config: Any, dtype: torch.dtype, device: torch.device) -> Tensor | dict[str, Tensor] | None:
        """As :meth:`TreeAttention.mask`, [n, 1, m, W]; ``None`` for the beginning of one sequence, which the model
        masks itself.
        """
        if self._is_beginning:
            return None
        return _masks(config, self._visible, dtype, device)


@dataclass(frozen=True, slots=True)
class _Visible:
    """``rows`` bool [n, m, W]; the positions of the tokens [n, m] and of the slots [n, W]."""

    rows: Tensor
    positions: Tensor
    columns: Tensor

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores, [n, 1, m, W]. A window counts positions, as it does without a tree."""
        rows = self.rows
        if window is not None:
            rows = rows & (self.positions[:, :, None] - self.columns[:, None, :] < window)
        return torch.zeros(rows.shape, dtype=dtype).masked_fill_(~rows, torch.finfo(dtype).min)[:, None]


def _masks(config: Any, visible: _Visible, dtype: torch.dtype, device: torch.device) -> Tensor | dict[str, Tensor]:
    """One mask; where the layers of ``config`` differ, one by type of layer."""
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or (FULL if window is None else SLIDING,))
    if unknown := sorted(types - {FULL, SLIDING}):
        raise TargetError(
            f"the target has layers of the type {unknown[0]}, which cannot verify a tree of proposals or a batch of "
            "sequences; decode with chains (no tree) and a batch size of 1"
        )
    masks = {kind: visible.bias(window if kind == SLIDING else None, dtype).to(device) for kind in types}
    return masks if len(masks) > 1 else masks.popitem()[1]
