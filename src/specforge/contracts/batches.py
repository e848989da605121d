"""TrainBatch: what the trainer sees. Generic in the tensor type, so that this module needs no tensor library.

Legend: T tokens of all samples of the micro-batch, one after the other, no padding; D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from specforge.contracts.refs import Slot

TensorT = TypeVar("TensorT")


@dataclass(frozen=True, slots=True)
class TrainBatch(Generic[TensorT]):
    """Packed samples of one micro-batch, unshifted: row ``j`` of every tensor belongs to token ``j``.

    * ``input_ids`` int64 [T], ``loss_mask`` bool [T], ``position_ids`` int64 [T] (0-based inside each sample),
      ``document_ids`` int64 [T] (index of the sample inside this batch)
    * ``features``: name -> [T, D], e.g. ``aux`` and ``last``
    * ``lengths``, ``sample_ids``, ``slots``: one entry a sample, in packing order
    """

    input_ids: TensorT
    loss_mask: TensorT
    position_ids: TensorT
    document_ids: TensorT
    features: dict[str, TensorT]
    lengths: tuple[int, ...]
    sample_ids: tuple[str, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class StepBatches(Generic[TensorT]):
    """One rank's share of one optimizer step.

    ``slots`` are all slots of the global batch (every rank's), in order. ``micro_batches`` may hold empty batches (no
    sample), so that every rank runs the same number. ``num_slots`` is where training stands after this step: in
    strict order the number of the first slot that is not covered (skipped ones are), in arrival order how many were
    trained.
    """

    micro_batches: tuple[TrainBatch[TensorT], ...]
    slots: tuple[Slot, ...]
    num_slots: int
