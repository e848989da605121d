"""Domino: the module, parameters under their served names.

Legend: N blocks, b slots of a block, H hidden size, G state of the GRU, E width of the correction, V vocabulary,
M slots in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specforge.algorithms.domino.config import DominoDraftConfig
from specforge.algorithms.parts.block_backbone import BlockBackbone


class DominoDraft(BlockBackbone):
    """A block backbone, and a low-rank logit correction from a GRU over the tokens of the block."""

    config: DominoDraftConfig

    def __init__(self, config: DominoDraftConfig) -> None:
        super().__init__(config)
        self.prefix_gru = nn.GRU(config.hidden_size, config.gru_hidden_dim, bias=False, batch_first=True)
        self.embed_proj = nn.Sequential(
            nn.Linear(config.hidden_size + config.gru_hidden_dim, config.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(config.emb_dim, config.vocab_size, bias=False),
        )

    def vocabulary_tables(self) -> frozenset[str]:
        return super().vocabulary_tables() | {"embed_proj.2.weight"}

    @property
    def correction_head(self) -> Tensor:
        """[V, E]."""
        weight: Tensor = self.embed_proj[2].weight  # type: ignore[assignment]
        return weight

    def prefix_states(self, embedded: Tensor) -> Tensor:
        """States [N, k, G] after each of the embedded tokens [N, k, H] of blocks, from 0 in each block."""
        states: Tensor = self.prefix_gru(embedded.to(self.fc.weight.dtype))[0]
        return states

    def advance(self, embedded: Tensor, state: Tensor | None) -> Tensor:
        """The state [G] after one more embedded token [H]; ``None`` is the state of an empty block."""
        before = None if state is None else state[None]
        states: Tensor = self.prefix_gru(embedded[None].to(self.fc.weight.dtype), before)[0]
        return states[0]

    def correction_inputs(self, hidden: Tensor, states: Tensor) -> Tensor:
        """What the correction's head reads, [M, E], of slots' states [M, H] and the GRU's [M, G]."""
        inputs: Tensor = self.embed_proj[1](self.embed_proj[0](torch.cat((hidden, states.to(hidden.dtype)), dim=-1)))
        return inputs
