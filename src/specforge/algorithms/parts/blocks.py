"""Blocks of a packed batch: where they start, which tokens their slots stand for, and how they are measured.

A block starts at an anchor token ``a`` and has slots ``0 .. b - 1`` at the positions ``a .. a + b - 1``. Slot 0 holds
the anchor's token, the others are masked.

Legend: T packed tokens, N blocks, b slots of a block, K trained slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specforge.algorithms.base import Runs, StepContext
from specforge.algorithms.parts.random import sample_generator
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks over a packed batch, each inside one document.

    * ``anchors`` int64 [N]: index of the first token in the pack
    * ``starts``, ``ends`` int64 [N]: bounds of the anchor's document in the pack
    """

    anchors: Tensor
    starts: Tensor
    ends: Tensor
    block_size: int

    @classmethod
    def at(cls, anchors: Tensor, batch: TrainBatch[Tensor], block_size: int) -> Blocks:
        """Blocks with the given ``anchors`` int64 [N], in their order."""
        lengths = torch.tensor(batch.lengths, dtype=torch.int64, device=anchors.device)
        ends = lengths.cumsum(0)
        documents = torch.searchsorted(ends, anchors, right=True)
        return cls(anchors, (ends - lengths)[documents], ends[documents], block_size)

    @property
    def num_blocks(self) -> int:
        """N."""
        return self.anchors.numel()

    def part(self, which: slice) -> Blocks:
        """Some of the blocks."""
        return Blocks(self.anchors[which], self.starts[which], self.ends[which], self.block_size)


def sample_blocks(batch: TrainBatch[Tensor], context: StepContext, block_size: int, num_anchors: int) -> Blocks:
    """Up to ``num_anchors`` blocks of every sample, uniformly without replacement, ascending.

    An anchor is a token whose loss mask and whose next token's are set, both in one document. What is drawn of a sample
    depends on the seed, its id and its epoch alone. A sample without such a token has no block.
    """
    mask = batch.loss_mask.cpu().numpy().astype(bool)
    drawn = [np.zeros(0, dtype=np.int64)]
    start = 0
    for index, length in enumerate(batch.lengths):
        inside = mask[start : start + length]
        candidates = np.flatnonzero(inside[:-1] & inside[1:])
        if candidates.size > num_anchors and not context.exhaustive:
            generator = sample_generator(batch, index, context, "anchors")
            candidates = np.sort(generator.choice(candidates, num_anchors, replace=False, shuffle=False))
        drawn.append(start + candidates)
        start += length
    anchors = torch.from_numpy(np.concatenate(drawn)).to(batch.input_ids.device)
    return Blocks.at(anchors, batch, block_size)


def slot_tokens(blocks: Blocks, shift: int) -> tuple[Tensor, Tensor]:
    """Token ``a + k + shift`` of every slot: its index in the pack, int64 [N, b], and whether it is in the document.

    An index outside is clamped to the nearest token of the document.
    """
    slots = torch.arange(blocks.block_size, device=blocks.anchors.device)
    index = blocks.anchors[:, None] + slots + shift
    starts, ends = blocks.starts[:, None], blocks.ends[:, None]
    clamped = torch.minimum(torch.maximum(index, starts), ends - 1)
    return clamped, clamped == index


def slot_labels(blocks: Blocks, batch: TrainBatch[Tensor], shift: int) -> tuple[Tensor, Tensor]:
    """Token id ``x[a + k + shift]`` of every slot, int64 [N, b], and whether it is in the document and its loss mask
    is set, bool [N, b].
    """
    index, inside = slot_tokens(blocks, shift)
    return batch.input_ids[index], inside & batch.loss_mask.to(torch.bool)[index]


def slot_embeddings(embed_tokens: Tensor, tokens: Tensor, block_size: int, mask_token_id: int) -> Tensor:
    """What enters a backbone, [N*b, H]: the embedding of ``tokens`` int64 [N] in slot 0 of each block, then the mask's.

    ``embed_tokens`` [V, H].
    """
    ids = torch.full((tokens.numel(), block_size), mask_token_id, dtype=torch.int64, device=embed_tokens.device)
    ids[:, 0] = tokens
    return embed_tokens.detach().index_select(0, ids.flatten())


def block_output(blocks: Blocks, correct: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Runs]:
    """(correct [K], count [K], runs) of ``correct`` and ``valid``, bool [N, K].

    The run of a block is its leading correct slots; a slot without a valid label ends it. Blocks without any valid
    label do not count.
    """
    right = correct & valid
    counted = valid.any(1)
    return right.sum(0), valid.sum(0), Runs(blocks.anchors[counted], right[counted].long().cumprod(1).sum(1))
