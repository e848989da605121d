"""Pruned draft vocabularies: which target ids a draft keeps, and the two served maps.

Legend: V target vocabulary, W draft vocabulary, u_0 < u_1 < ... the kept target ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.errors import ConfigError


def kept_ids(counts: Tensor, size: int) -> Tensor:
    """The ``size`` most frequent ids, ascending, int64 [W].

    ``counts`` int [V] are occurrences of each target id among supervised tokens. Ties go to the lower id, and where
    fewer than ``size`` ids occur the smallest unused ones fill up, so the result depends on the counts alone.
    """
    vocab_size = counts.numel()
    if not 0 < size <= vocab_size:
        raise ConfigError(
            f"draft_vocab_size must be between 1 and the target's vocabulary of {vocab_size}, got {size}; lower it"
        )
    order = torch.sort(counts.to(torch.int64), descending=True, stable=True).indices
    return order[:size].sort().values


def vocabulary_maps(kept: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """``d2t`` int64 [W] with ``target id = i + d2t[i]``, and ``t2d`` bool [V] that marks the kept ids.

    ``kept`` [W] are target ids in strictly ascending order, so that selecting columns with ``t2d`` gives draft order.
    """
    kept = kept.to(torch.int64)
    ascending = bool((kept[1:] > kept[:-1]).all())
    if kept.numel() == 0 or not ascending or int(kept[0]) < 0 or int(kept[-1]) >= vocab_size:
        raise ConfigError(
            f"the kept ids of a draft vocabulary must be strictly ascending ids below {vocab_size}; "
            "make them with specforge.algorithms.parts.vocabulary.kept_ids"
        )
    known = torch.zeros(vocab_size, dtype=torch.bool, device=kept.device)
    known[kept] = True
    return kept - torch.arange(kept.numel(), device=kept.device), known


def target_ids(d2t: Tensor) -> Tensor:
    """Target id of every draft id, int64 [W]."""
    return d2t + torch.arange(d2t.numel(), device=d2t.device)
