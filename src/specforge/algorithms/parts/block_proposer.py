"""What the proposers of block drafts share: the committed context of one sequence, and one pass over a block.

Legend: b slots of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.algorithms.base import Proposer, Sampling, TargetTables
from specforge.algorithms.parts.block_backbone import BlockBackbone, BlockSession
from specforge.algorithms.parts.blocks import slot_embeddings
from specforge.algorithms.parts.sampling import distribution, draw


class BlockProposer(Proposer):
    """Keeps the session of one sequence. Nothing of a block outlives its round."""

    def __init__(self, draft: BlockBackbone, tables: TargetTables) -> None:
        self.backbone = draft
        self.tables = tables
        self._session = BlockSession(draft)

    def reset(self) -> None:
        self._session.reset()

    def block_states(self, tokens: list[int], features: Mapping[str, Tensor]) -> Tensor:
        """Normed states [b, H] of the block that starts at the last of ``tokens``, after the new ``features``."""
        self._session.append(features["aux"])
        if self._session.num_tokens != len(tokens) - 1:
            raise ValueError(
                f"{len(tokens)} committed tokens need features of {len(tokens) - 1} positions, "
                f"got {self._session.num_tokens}"
            )
        config, table = self.backbone.config, self.tables.embed_tokens
        last = self.token(tokens[-1])
        return self._session.block(slot_embeddings(table, last, config.block_size, config.mask_token_id))

    def token(self, token: int) -> Tensor:
        """int64 [1] where the target's tables are."""
        return torch.tensor([token], device=self.tables.embed_tokens.device)


def choose(logits: Tensor, sampling: Sampling | None) -> tuple[int, Tensor | None]:
    """A token of ``logits`` [V] and the distribution [V] that it was drawn from (``None`` for the greedy one)."""
    if sampling is None:
        return int(logits.argmax()), None
    probabilities = distribution(logits, sampling)
    return draw(probabilities, sampling.generator), probabilities
