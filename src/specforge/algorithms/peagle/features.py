"""P-EAGLE: which elements of a packed batch are trained (docs/algorithms/peagle.md).

An element is a pair (anchor ``a``, depth ``d``) and predicts what the position ``p = a + d`` of depth 0 predicts, token
``p + 2``, with features known up to ``a`` only. Depth 0 has every position; deeper ones are drawn (conditional drop of
depths, COD), a document at a time. A drawn element's shallower ones are always there: (a, d) needs (a, d - 1).

Legend: T packed tokens, C context tokens, K depths, E_d elements of depth d, E all elements of a depth-major list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specforge.algorithms.base import StepContext
from specforge.algorithms.parts.alignment import supervised_rows, visible_context
from specforge.algorithms.parts.attention import PackedLayout, packed_layout
from specforge.algorithms.parts.random import sample_generator
from specforge.contracts.batches import TrainBatch

Choose = Callable[[NDArray[np.int64], int], NDArray[np.int64]]
"""(eligible positions ascending, how many) -> those chosen."""


@dataclass(frozen=True, slots=True)
class CodShares:
    """How much is drawn: ``max(ratio**d, min_ratio)`` of the positions that can have depth ``d``.

    ``exhaustive``: all of them, and nothing is left to chance.
    """

    num_depths: int
    ratio: float
    min_ratio: float
    exhaustive: bool = False


def cod_positions(valid: NDArray[np.bool_], shares: CodShares, choose: Choose) -> list[NDArray[np.int64]]:
    """Positions ``p`` of the elements of depth 1, 2, .. of one document, ascending; ends before an empty depth.

    ``valid`` bool [tokens] are the supervised positions, which depth 0 has anyway.
    """
    supervised = np.flatnonzero(valid)
    drawn: list[NDArray[np.int64]] = []
    pool = supervised
    for depth in range(1, shares.num_depths):
        eligible = pool[pool >= depth]
        share = max(shares.ratio**depth, shares.min_ratio)
        count = eligible.size if shares.exhaustive else min(int((supervised.size - depth) * share), eligible.size)
        if count <= 0:
            break
        drawn.append(np.sort(choose(eligible, count)))
        pool = np.intersect1d(drawn[-1] + 1, supervised)
    return drawn


def draw_depths(batch: TrainBatch[Tensor], valid: Tensor, shares: CodShares, context: StepContext) -> list[Tensor]:
    """Anchors (packed token index, int64 [E_d] ascending) of every depth from 1 on, as long as there are some.

    ``valid`` bool [T]. The draw of a document depends on its sample, its epoch and the seed alone.
    """
    shares = replace(shares, exhaustive=context.exhaustive)
    flags = valid.cpu().numpy()
    found: list[list[NDArray[np.int64]]] = [[] for _ in range(shares.num_depths - 1)]
    start = 0
    for index, length in enumerate(batch.lengths):
        generator = sample_generator(batch, index, context, "cod")

        def choose(
            eligible: NDArray[np.int64], count: int, generator: np.random.Generator = generator
        ) -> NDArray[np.int64]:
            return generator.choice(eligible, count, replace=False)

        for depth, positions in enumerate(cod_positions(flags[start : start + length], shares, choose), start=1):
            found[depth - 1].append(positions - depth + start)
        start += length
    return [torch.from_numpy(np.concatenate(anchors)).to(valid.device) for anchors in found if anchors]


@dataclass(frozen=True, slots=True)
class ElementPlan:
    """What the model computes: depth 0 of all context tokens, and the drawn elements of the other depths.

    * ``context`` int64 [C], ascending: packed tokens that some supervised element can see
    * ``token_ids`` int64 [C]: id embedded at depth 0, that of the token after each context token
    * ``positions`` int64 [C]: rotary position at depth 0; depth ``d`` adds ``d``
    * ``anchors``: for each depth from 1 on, int64 [E_d] ascending, index into ``context``
    * ``shallower``: for each depth from 1 on, int64 [E_d]: the same anchors' places among those of the depth before
    * ``outputs`` int64 [E_0], ascending: index into ``context`` of the depth-0 rows that are read out
    * ``layouts``: attention of each depth from 0 on; ``output_layout`` that of ``outputs``
    """

    context: Tensor
    token_ids: Tensor
    positions: Tensor
    anchors: tuple[Tensor, ...]
    shallower: tuple[Tensor, ...]
    outputs: Tensor
    layouts: tuple[PackedLayout, ...]
    output_layout: PackedLayout

    @property
    def sizes(self) -> list[int]:
        """Rows of every depth while keys are needed: C, E_1, E_2, .."""
        return [self.context.numel(), *(anchors.numel() for anchors in self.anchors)]

    def packed_positions(self) -> list[Tensor]:
        """The packed position ``p`` that each read-out element stands for: one tensor a depth."""
        deeper = [self.context[anchors] + depth for depth, anchors in enumerate(self.anchors, start=1)]
        return [self.context[self.outputs], *deeper]


def make_plan(
    context: Tensor,
    lengths: Sequence[int],
    token_ids: Tensor,
    positions: Tensor,
    anchors: list[Tensor],
    outputs: Tensor,
) -> ElementPlan:
    """A plan from its parts; ``lengths`` are the context tokens of each document."""
    everything = torch.arange(context.numel(), device=context.device)
    before = [everything, *anchors[:-1]]
    return ElementPlan(
        context=context,
        token_ids=token_ids,
        positions=positions,
        anchors=tuple(anchors),
        shallower=tuple(torch.searchsorted(b, a) for b, a in zip(before, anchors, strict=False)),
        outputs=outputs,
        layouts=tuple(packed_layout(lengths, rows) for rows in (everything, *anchors)),
        output_layout=packed_layout(lengths, outputs),
    )


def plan_elements(batch: TrainBatch[Tensor], valid: Tensor, anchors: list[Tensor]) -> ElementPlan:
    """The plan for the supervised positions ``valid`` bool [T] and the ``anchors`` of :func:`draw_depths`.

    Context ends at the last supervised position of a document, which is never its last token.
    """
    rows = valid.nonzero().squeeze(-1)
    context, lengths = visible_context(batch, rows)
    return make_plan(
        context=context,
        lengths=lengths,
        token_ids=batch.input_ids[context + 1],
        positions=batch.position_ids[context],
        anchors=[torch.searchsorted(context, found) for found in anchors],
        outputs=torch.searchsorted(context, rows),
    )


def supervised_positions(batch: TrainBatch[Tensor], mask_offset: int) -> Tensor:
    """bool [T]: positions that are trained at depth 0, and at other depths where they are drawn."""
    return supervised_rows(batch, 1, mask_offset)[0]
