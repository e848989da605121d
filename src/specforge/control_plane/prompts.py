"""The order in which samples are trained: a pure function of the run's seed."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from functools import lru_cache

from specforge.contracts.refs import Slot
from specforge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SampleOrder:
    """``num_epochs`` passes over ``num_samples`` prompts, each pass shuffled by (seed, epoch) alone.

    Slots are numbered linearly: slot ``s`` is position ``s % num_samples`` of epoch ``s // num_samples``.
    """

    num_samples: int
    num_epochs: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.num_epochs < 1:
            raise ConfigError(
                f"expected at least one sample and one epoch, got {self.num_samples} samples and {self.num_epochs} "
                "epochs; check the prompt file and num_epochs"
            )

    @property
    def total(self) -> int:
        """Number of slots of the whole run."""
        return self.num_samples * self.num_epochs

    def slot(self, linear: int) -> Slot:
        return Slot(*divmod(linear, self.num_samples))

    def linear(self, slot: Slot) -> int:
        return slot.epoch * self.num_samples + slot.position

    def index(self, slot: Slot) -> int:
        """The prompt index trained in ``slot``; each epoch is a permutation of all prompts."""
        if not self.shuffle:
            return slot.position
        return _permutation(self.num_samples, self.seed, slot.epoch)[slot.position]

    def index_at(self, linear: int) -> int:
        """The prompt index trained in the slot with number ``linear``."""
        return self.index(self.slot(linear))

    @property
    def key(self) -> str:
        """What must not change between two starts of a run (more epochs may be added)."""
        return f"num_samples={self.num_samples} seed={self.seed} shuffle={self.shuffle}"


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> array[int]:
    indices = array("L", range(num_samples))
    # Seeding by a string hashes it with SHA-512: the same permutation on every platform and Python version.
    random.Random(f"{seed}/{epoch}").shuffle(indices)  # noqa: S311
    return indices
