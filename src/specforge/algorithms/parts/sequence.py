"""Sequence parallelism in the manner of DeepSpeed-Ulysses (arXiv 2309.14509, section 3): the ranks of a group train the
same samples, each a slice of their rows.

Everything but attention is done to a rank's own rows. Around attention an all-to-all turns [own rows, all heads] into
[all rows, own heads], and what was attended back, so that each rank runs the ordinary attention of the algorithm, over
the ordinary layout of all rows, for a part of the heads. Its gradient is the all-to-all the other way.

``torch.distributed.tensor.experimental.context_parallel`` does not serve here: it shards the causal attention of one
sequence by exchanging keys inside ``scaled_dot_product_attention``. An unroll, whose rows see the keys of later steps
in the diagonal alone, and blocks, which see a context and themselves, in packs of documents, are no such attention.

Every call that moves rows is a collective of the group, and so is its backward. The group's ranks have the same rows in
all: what is decided from those is decided alike, and nothing that leads to a collective may be decided from the own.

Legend: R rows of all ranks, h heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from specforge.algorithms.draft_config import DraftConfig
from specforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SequenceShare:
    """The part of a sequence group's rows that this rank has: number ``rank`` of ``size`` in ``group``."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None

    def rows(self, num_rows: int) -> slice:
        """The own ones of ``num_rows``: neighbours, as many on every rank but for one, and none where there are few."""
        return slice(*self._bounds(self.rank, num_rows))

    def to_heads(self, rows: Tensor, num_rows: int) -> Tensor:
        """[own rows, .., h, d] of every rank -> [R, .., h / size, d], R = ``num_rows``. Has a gradient."""
        num_heads = rows.shape[-2]
        if num_heads % self.size:
            raise ConfigError(_uneven_heads(num_heads, self.size))
        found: Tensor = _ToHeads.apply(rows, self, num_rows)  # type: ignore[no-untyped-call]
        return found

    def to_rows(self, heads: Tensor) -> Tensor:
        """The inverse of :meth:`to_heads`: [R, .., h / size, d] of every rank -> [own rows, .., h, d]."""
        found: Tensor = _ToRows.apply(heads, self)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def sum(self, values: Tensor) -> Tensor:
        """The sum of everybody's ``values``, the same bits on all ranks. Without a gradient."""
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def exchange_to_heads(self, rows: Tensor, num_rows: int) -> Tensor:
        """:meth:`to_heads` of plain values."""
        own = rows.shape[0]
        # one part of the heads after the other, each for the rank that it goes to
        parts: Tensor = rows.unflatten(-2, (self.size, -1)).movedim(-3, 0).flatten(0, 1).contiguous()
        found: Tensor = parts.new_empty(num_rows, *parts.shape[1:])
        dist.all_to_all_single(found, parts, self._sizes(num_rows), [own] * self.size, group=self.group)
        return found

    def exchange_to_rows(self, heads: Tensor) -> Tensor:
        """:meth:`to_rows` of plain values."""
        sizes = self._sizes(heads.shape[0])
        own = sizes[self.rank]
        found = heads.new_empty(self.size * own, *heads.shape[1:])
        dist.all_to_all_single(found, heads.contiguous(), [own] * self.size, sizes, group=self.group)
        rows: Tensor = found.unflatten(0, (self.size, own)).movedim(0, -3).flatten(-3, -2)
        return rows

    def _sizes(self, num_rows: int) -> list[int]:
        return [last - first for first, last in (self._bounds(rank, num_rows) for rank in range(self.size))]

    def _bounds(self, rank: int, num_rows: int) -> tuple[int, int]:
        return num_rows * rank // self.size, num_rows * (rank + 1) // self.size


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: SequenceShare, num_rows: int) -> Tensor:
        ctx.share = share
        return share.exchange_to_heads(rows, num_rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return ctx.share.exchange_to_rows(upstream[0]), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, share: SequenceShare) -> Tensor:
        ctx.share, ctx.num_rows = share, heads.shape[0]
        return share.exchange_to_rows(heads)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return ctx.share.exchange_to_heads(upstream[0], ctx.num_rows), None


def check_heads(config: DraftConfig, size: int) -> None:
    """Raise :class:`ConfigError` for a draft whose heads cannot be dealt out to ``size`` ranks of a sequence group."""
    for num_heads in (config.num_attention_heads, config.num_key_value_heads):
        if num_heads % size:
            raise ConfigError(_uneven_heads(num_heads, size))


def _uneven_heads(num_heads: int, size: int) -> str:
    return (
        f"training.sequence_parallel is {size}, and every rank of a group attends with its part of the heads, but the "
        f"draft has {num_heads} query or key heads; choose a divisor of both numbers of heads, or set "
        "algorithm.num_attention_heads and algorithm.num_key_value_heads to multiples of it"
    )
