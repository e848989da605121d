"""Attention of one target forward over a tree of tokens: positions and masks.

Legend: m tokens of the tree, S positions in the cache.
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
        """What a transformers backbone of ``config`` takes as ``attention_mask``: added to scores, [1, 1, m, S + m].

        Where its layers differ, one mask by type of layer. A window counts positions, as it does without a tree.
        """
        window = getattr(config, "sliding_window", None)
        types = set(getattr(config, "layer_types", None) or (FULL if window is None else SLIDING,))
        if unknown := sorted(types - {FULL, SLIDING}):
            raise TargetError(
                f"the target has layers of the type {unknown[0]}, which cannot verify a tree of proposals; "
                "decode with chains (no tree)"
            )
        masks = {kind: self._bias(window if kind == SLIDING else None, dtype).to(device) for kind in types}
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        num_cached = self.visible.shape[1] - self.visible.shape[0]
        visible = self.visible
        if window is not None:
            columns = torch.cat((torch.arange(num_cached), self.positions))
            visible = visible & (self.positions[:, None] - columns < window)
        hidden = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        return hidden[None, None]
