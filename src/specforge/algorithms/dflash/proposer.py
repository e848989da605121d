"""DFlash: drafting for one sequence, a block a round.

Legend: b slots of a block, l proposals, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, target_logits
from specforge.algorithms.parts.block_proposer import BlockProposer
from specforge.algorithms.parts.sampling import distribution, draw


class DFlashProposer(BlockProposer):
    """At most ``b - 1`` tokens of one pass. Slots do not see each other's tokens: each is drawn by itself."""

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        states = self.block_states(tokens, features)
        num_proposals = min(request.num_proposals, states.shape[0] - 1)
        if not num_proposals:
            return Proposal(())
        logits = target_logits(self.tables, states[1 : num_proposals + 1])
        if request.sampling is None:
            return Proposal(tuple(logits.argmax(-1).tolist()))
        probabilities = distribution(logits, request.sampling)
        return Proposal(tuple(draw(row, request.sampling.generator) for row in probabilities), probabilities)
