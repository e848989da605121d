"""The samples of a run and the order in which they are trained: a pure function of the run's seed."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from specforge.contracts.refs import Slot
from specforge.contracts.tasks import PromptTask
from specforge.control_plane.metadata.base import MetadataStore
from specforge.errors import ConfigError, ContractError


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
        if not 0 <= slot.position < self.num_samples or slot.epoch < 0:
            raise ContractError(f"{slot} is none of a run with {self.num_samples} samples an epoch")
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
    indices = array("I", range(num_samples))
    # Seeding by a string hashes it with SHA-512: the same permutation on every platform and Python version.
    random.Random(f"{seed}/{epoch}").shuffle(indices)  # noqa: S311
    return indices


class TaskSource(Protocol):
    """Where the controller reads prompts from when it leases them."""

    def __len__(self) -> int: ...

    def register(self, store: MetadataStore) -> None:
        """Record what the ledger does not have yet."""
        ...

    def num_tokens(self, index: int) -> int: ...

    def num_to_generate(self, index: int) -> int:
        """Tokens of the longest response that a prompt may be given; 0: it is not answered."""
        ...

    def at(self, indices: Sequence[int]) -> list[PromptTask]: ...


class ListedTasks:
    """Prompts in memory."""

    def __init__(self, tasks: Sequence[PromptTask]) -> None:
        self._tasks = tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def register(self, store: MetadataStore) -> None:
        store.register(self._tasks)

    def num_tokens(self, index: int) -> int:
        return self._tasks[index].num_tokens

    def num_to_generate(self, index: int) -> int:
        return self._tasks[index].num_to_generate

    def at(self, indices: Sequence[int]) -> list[PromptTask]:
        return [self._tasks[index] for index in indices]


class RecordedTasks:
    """Prompts that the ledger has recorded, read when they are leased: eight bytes a prompt stay in memory."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._lengths, self._to_generate = array("I"), array("I")
        for task in store.tasks():
            self._lengths.append(task.num_tokens)
            self._to_generate.append(task.num_to_generate)

    def __len__(self) -> int:
        return len(self._lengths)

    def register(self, store: MetadataStore) -> None:
        """They are there."""

    def num_tokens(self, index: int) -> int:
        return self._lengths[index]

    def num_to_generate(self, index: int) -> int:
        return self._to_generate[index]

    def at(self, indices: Sequence[int]) -> list[PromptTask]:
        return self._store.tasks_at(indices)
