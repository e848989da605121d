"""The Medusa draft: residual blocks on the target's last hidden state (Cai et al., arXiv 2401.10774).

Parameters carry the names that vLLM loads.

Legend: R rows, H hidden size, V vocabulary, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from specforge.algorithms.base import DraftModel
from specforge.algorithms.medusa.config import MedusaDraftConfig


class ResidualBlocks(nn.Module):
    """``g + silu(W g + c)``, one after the other."""

    def __init__(self, hidden_size: int, num_blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_blocks))

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, H], in the precision of the weights."""
        hidden = hidden.to(next(self.parameters()).dtype)
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        return hidden


class MedusaDraft(DraftModel):
    """``blocks[k]`` and ``lm_heads[k]`` are head ``k``; there are no ``lm_heads`` where the target's head is shared."""

    def __init__(self, config: MedusaDraftConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.blocks = nn.ModuleList(ResidualBlocks(size, config.num_blocks) for _ in range(config.num_heads))
        if not config.shared_head:
            heads = (nn.Linear(size, config.draft_vocab_size, bias=False) for _ in range(config.num_heads))
            self.lm_heads = nn.ModuleList(heads)

    def forward(self, head: int, last: Tensor) -> Tensor:
        """What the output matrix of ``head`` reads, [R, H], for the target's last hidden states [R, H]."""
        state: Tensor = self.blocks[head](last)
        return state

    def training_blocks(self) -> Sequence[nn.Module]:
        return tuple(self.blocks)

    def vocabulary_tables(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters() if name.startswith("lm_heads."))

    def head_weight(self, head: int) -> Tensor:
        """[V, H]; only where the target's head is not shared."""
        module = self.lm_heads[head]
        assert isinstance(module, nn.Linear)
        return module.weight
