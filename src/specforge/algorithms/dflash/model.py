"""DFlash: the draft is the backbone alone; slots, context and positions of a packed batch are put together here.

Legend: N blocks, b slots of a block, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.algorithms.dflash.config import DFlashDraftConfig
from specforge.algorithms.parts.block_backbone import BlockBackbone
from specforge.algorithms.parts.blocks import Blocks
from specforge.algorithms.parts.sequence import SequenceShare
from specforge.contracts.batches import TrainBatch


class DFlashDraft(BlockBackbone):
    """Parameters under their served names; embedding and head are the target's."""

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__(config)

    def states(
        self, tables: TargetTables, batch: TrainBatch[Tensor], blocks: Blocks, share: SequenceShare | None = None
    ) -> Tensor:
        """What the head reads, [N, b, H]; with a ``share``, of its own blocks."""
        grouped: Tensor = self.block_states(tables, batch, blocks, share).unflatten(0, (-1, blocks.block_size))
        return grouped
