"""Randomness keyed by what it is for: the same key draws the same, in every process, order and grouping."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from specforge.algorithms.base import StepContext
from specforge.contracts.batches import TrainBatch


def keyed_generator(seed: int, epoch: int, sample_id: str, purpose: str) -> np.random.Generator:
    """A counter-based generator (Philox) that depends on the four values alone."""
    digest = hashlib.sha256(f"{seed}|{epoch}|{purpose}|{sample_id}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def sample_generator(batch: TrainBatch[Any], index: int, context: StepContext, purpose: str) -> np.random.Generator:
    """The generator of sample ``index`` of a packed batch in the epoch in which it is trained."""
    return keyed_generator(context.seed, batch.slots[index].epoch, batch.sample_ids[index], purpose)
