"""DSpark: the bias from the previous token and the confidence of a proposal.

Legend: M slots in any order, N blocks, k slots of a block, H hidden size, r rank of the bias, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specforge.algorithms.dspark.config import DSparkDraftConfig


class MarkovHead(nn.Module):
    """A low-rank logit bias, ``markov_w2 @ inputs``; the subclasses differ in ``inputs``. Parameters by served name."""

    def __init__(self, config: DSparkDraftConfig) -> None:
        super().__init__()
        self.rank = config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, self.rank)
        self.markov_w2 = nn.Linear(self.rank, config.vocab_size, bias=False)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the bias [N, r] and the next state [N, r] of one slot of N blocks.

        ``hidden`` [N, H]; ``previous`` [N, r] embeds the token before the one that the slot predicts; ``state`` [N, r]
        is 0 at the first slot.
        """
        del hidden
        return previous, state

    def inputs(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Inputs of the bias [N, k, r] of the first k slots of blocks: ``hidden`` [N, k, H], ``previous`` [N, k, r]."""
        state, found = previous.new_zeros(len(previous), self.rank), []
        for slot in range(previous.shape[1]):
            inputs, state = self.step(hidden[:, slot], previous[:, slot], state)
            found.append(inputs)
        return torch.stack(found, dim=1)


class GatedMarkovHead(MarkovHead):
    """The embedding of the previous token times a gate that also reads the slot's state."""

    def __init__(self, config: DSparkDraftConfig) -> None:
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + self.rank, self.rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(self.gate_proj(torch.cat((hidden, previous), dim=-1))) * previous, state


class RecurrentMarkovHead(MarkovHead):
    """A gated recurrence along the block, from a state of 0 in each."""

    def __init__(self, config: DSparkDraftConfig) -> None:
        super().__init__(config)
        self.joint_proj = nn.Linear(config.hidden_size + 2 * self.rank, 3 * self.rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        gate, candidate, output = self.joint_proj(torch.cat((state, previous, hidden), dim=-1)).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1.0 - gate) * torch.tanh(candidate)


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RecurrentMarkovHead,
}


class ConfidenceHead(nn.Module):
    """The logit of a proposal's acceptance, from the slot's state and, with Markov, the previous token's embedding."""

    def __init__(self, config: DSparkDraftConfig) -> None:
        super().__init__()
        self.reads_token = config.confidence_head_with_markov
        self.proj = nn.Linear(config.hidden_size + self.reads_token * config.markov_rank, 1)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """[..] from ``hidden`` [.., H] and ``previous`` [.., r] (``None`` where there is no Markov head)."""
        if self.reads_token:
            assert previous is not None, "a confidence head that reads tokens needs a Markov head"
            hidden = torch.cat((hidden, previous), dim=-1)
        logits: Tensor = self.proj(hidden).squeeze(-1)
        return logits
