"""DSpark: the module, parameters under their served names.

Legend: N blocks, b slots of a block, H hidden size, r rank of the bias, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specforge.algorithms.base import TargetTables
from specforge.algorithms.dspark.config import DSparkDraftConfig
from specforge.algorithms.dspark.features import SlotLabels
from specforge.algorithms.dspark.heads import MARKOV_HEADS, ConfidenceHead, MarkovHead
from specforge.algorithms.parts.block_backbone import BlockBackbone
from specforge.contracts.batches import TrainBatch
from specforge.errors import DraftError


@dataclass(frozen=True, slots=True)
class SlotOutputs:
    """Of all slots: the backbone's states [N, b, H], the inputs of the bias [N, b, r] and confidence logits [N, b]
    (``None`` where the draft has no such head).
    """

    hidden: Tensor
    markov: Tensor | None
    confidence: Tensor | None


class DSparkDraft(BlockBackbone):
    """A block backbone, a logit bias from the previous token, and the confidence in each proposal."""

    config: DSparkDraftConfig

    def __init__(self, config: DSparkDraftConfig) -> None:
        super().__init__(config)
        if config.markov_head_type not in MARKOV_HEADS:
            raise DraftError(
                f"markov_head_type must be one of {', '.join(MARKOV_HEADS)}, got {config.markov_head_type!r}; "
                "change the draft config"
            )
        reads_token = config.enable_confidence_head and config.confidence_head_with_markov
        if reads_token and not config.markov_rank:
            raise DraftError("confidence_head_with_markov needs a markov_rank above 0; change the draft config")
        self.markov_head: MarkovHead | None = None
        if config.markov_rank:
            self.markov_head = MARKOV_HEADS[config.markov_head_type](config)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None

    def vocabulary_tables(self) -> frozenset[str]:
        return super().vocabulary_tables() | {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}

    def slot_outputs(self, tables: TargetTables, batch: TrainBatch[Tensor], labels: SlotLabels) -> SlotOutputs:
        """All slots of the blocks of ``labels``, each told its true previous token."""
        states = self.block_states(tables, batch, labels.blocks)
        hidden = states.unflatten(0, (-1, self.config.block_size))
        markov = previous = None
        if self.markov_head is not None:
            previous = self.markov_head.markov_w1(batch.input_ids[labels.previous])
            markov = self.markov_head.inputs(hidden, previous)
        confidence = None if self.confidence_head is None else self.confidence_head(hidden, previous)
        return SlotOutputs(hidden, markov, confidence)
