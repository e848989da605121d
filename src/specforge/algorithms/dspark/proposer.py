"""DSpark: drafting for one sequence. The backbone fills a block in one pass; bias and confidence follow the tokens.

Legend: b slots of a block, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.algorithms.base import DraftRequest, Proposal, TargetTables, target_logits
from specforge.algorithms.dspark.model import DSparkDraft
from specforge.algorithms.parts.block_proposer import BlockProposer, choose


class DSparkProposer(BlockProposer):
    """At most ``block_size`` tokens a round, in a chain.

    It ends before the first proposal whose predicted acceptance is below ``threshold``. The prediction reads tokens
    before that proposal alone, so what is kept does not depend on what was drawn there. ``confidences`` are the logits
    of the last round's predictions, that of a refused proposal included (empty without a confidence head).
    """

    def __init__(self, draft: DSparkDraft, tables: TargetTables, threshold: float = 0.0) -> None:
        self.draft = draft
        # a sigmoid rounds to 1 where its logit is large, so it is the logits that are compared
        self._limit = (
            -math.inf if threshold <= 0 else math.inf if threshold >= 1 else math.log(threshold / (1 - threshold))
        )
        self.confidences: tuple[float, ...] = ()
        super().__init__(draft, tables)

    def reset(self) -> None:
        super().reset()
        self.confidences = ()

    @torch.inference_mode()
    def propose(self, tokens: list[int], features: Mapping[str, Tensor], request: DraftRequest) -> Proposal:
        hidden = self.block_states(tokens, features)
        count = min(request.num_proposals, self.draft.config.num_proposals)
        base = target_logits(self.tables, hidden[:count])
        markov, head = self.draft.markov_head, self.draft.confidence_head
        token, state = tokens[-1], hidden.new_zeros(1, self.draft.config.markov_rank)
        chosen: list[int] = []
        drawn: list[Tensor] = []
        confidences: list[float] = []
        for slot in range(count):
            logits, at, previous = base[slot], hidden[slot : slot + 1], None
            if markov is not None:
                previous = markov.markov_w1(self.token(token))
            if head is not None:
                confidences.append(float(head(at, previous)))
                if confidences[-1] < self._limit:
                    break
            if markov is not None and previous is not None:
                inputs, state = markov.step(at, previous, state)
                logits = logits + F.linear(inputs[0], markov.markov_w2.weight).float()
            token, probabilities = choose(logits, request.sampling)
            chosen.append(token)
            if probabilities is not None:
                drawn.append(probabilities)
        self.confidences = tuple(confidences)
        return Proposal(tuple(chosen), torch.stack(drawn) if drawn else None)
