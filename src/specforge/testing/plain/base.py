"""What a plain path is. It reads the draft's parameters by their served names, so it shares them and no code.

Legend: T packed tokens, R rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specforge.algorithms.base import Algorithm, DraftModel, StepContext, TargetTables
from specforge.contracts.batches import TrainBatch


@dataclass(frozen=True, slots=True)
class PlainInputs:
    """What ``forward_loss`` of ``algorithm`` gets."""

    algorithm: Algorithm
    draft: DraftModel
    tables: TargetTables
    batch: TrainBatch[Tensor]
    context: StepContext

    @property
    def options(self) -> Any:
        return self.algorithm.options  # type: ignore[attr-defined]

    @property
    def config(self) -> Any:
        return self.draft.config

    @property
    def weights(self) -> dict[str, Tensor]:
        """The draft's parameters and buffers by served name."""
        return {**dict(self.draft.named_parameters()), **dict(self.draft.named_buffers())}


@dataclass(frozen=True, slots=True)
class PlainPath:
    """``backbone``: what heads and losses read, tensors [R, H]. ``loss``: the undivided loss of a micro-batch, from it.

    ``backbone`` is everything that a step does before there is anything with a vocabulary dimension.
    """

    backbone: Callable[[PlainInputs], list[Tensor]]
    loss: Callable[[PlainInputs, list[Tensor]], Tensor]

    def __call__(self, inputs: PlainInputs) -> Tensor:
        return self.loss(inputs, self.backbone(inputs))
