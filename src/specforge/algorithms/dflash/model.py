"""DFlash: the draft is the backbone alone; slots, context and positions of a packed batch are put together here.

Legend: N blocks, b slots of a block, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.algorithms.dflash.config import DFlashDraftConfig
from specforge.algorithms.parts.block_attention import block_layout
from specforge.algorithms.parts.block_backbone import BlockBackbone
from specforge.algorithms.parts.blocks import Blocks, slot_embeddings
from specforge.contracts.batches import TrainBatch


class DFlashDraft(BlockBackbone):
    """Parameters under their served names; embedding and head are the target's."""

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__(config)

    def states(self, tables: TargetTables, batch: TrainBatch[Tensor], blocks: Blocks) -> Tensor:
        """What the head reads, [N, b, H]."""
        tokens = batch.input_ids[blocks.anchors]
        slots = slot_embeddings(tables.embed_tokens, tokens, blocks.block_size, self.config.mask_token_id)
        states: Tensor = self(slots, batch.features["aux"], block_layout(blocks, batch))
        grouped: Tensor = states.unflatten(0, (-1, blocks.block_size))
        return grouped
