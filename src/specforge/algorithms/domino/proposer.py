"""Domino: drafting for one sequence. The backbone fills a block in one pass; the correction then reads what is drafted.

Legend: b slots of a block, H hidden size, G state of the GRU, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, TargetTables, target_logits
from specforge.algorithms.domino.model import DominoDraft
from specforge.algorithms.parts.block_proposer import BlockProposer, choose


class DominoProposer(BlockProposer):
    """At most ``block_size - 1`` tokens a round, in a chain."""

    def __init__(self, draft: DominoDraft, tables: TargetTables) -> None:
        self.draft = draft
        super().__init__(draft, tables)

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        hidden = self.block_states(tokens, features)
        config = self.draft.config
        count = min(request.num_proposals, config.num_proposals)
        if not count:
            return Proposal(())
        hidden = hidden[config.first_label : config.first_label + count]
        base = target_logits(self.tables, hidden)
        token, state = tokens[-1], None
        chosen: list[int] = []
        drawn: list[Tensor] = []
        for place in range(count):
            logits = base[place]
            state = self.draft.advance(self.tables.embed_tokens[token], state)
            if place >= config.pure_draft_prefix_len:
                logits = logits + self.correction(hidden[place], state)
            token, probabilities = choose(logits, request.sampling)
            chosen.append(token)
            if probabilities is not None:
                drawn.append(probabilities)
        return Proposal(tuple(chosen), torch.stack(drawn) if drawn else None)

    def correction(self, hidden: Tensor, state: Tensor) -> Tensor:
        """The correction fp32 [V] of a slot's state [H] after tokens that led to ``state`` [G]."""
        inputs = self.draft.correction_inputs(hidden, state)
        return F.linear(inputs, self.draft.correction_head).float()
