"""FeatureStore: the contract of the data plane. Tensors move here and nowhere else.

A sample's features live under (sample_id, generation) in one contiguous buffer laid out by
:func:`specforge.contracts.features.layout`. The life of a generation in a store:

    put --> readable --> abort --> freed
               |  get / release by any number of readers

Where a store serves several processes, what is readable outlives the process that put it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specforge.contracts.features import FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef
from specforge.data_plane.tensors import Source


@dataclass(frozen=True, slots=True)
class StoredFeatures:
    """What ``put`` answers: the store-dependent half of a ``SampleRef``."""

    store: str
    key: str
    num_bytes: int
    features: tuple[FeatureSpec, ...]


@dataclass(frozen=True, slots=True)
class PutRequest:
    """Features of one sample, ready to be stored. Tensors may be on any device and of any stride."""

    sample_id: str
    generation: int
    tensors: Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class StoreHealth:
    """Numbers of a store. ``live_bytes`` counts buffers that are readable or still held by a reader's handle."""

    capacity_bytes: int
    live_bytes: int
    num_samples: int
    num_handles: int


class FeatureStore(Protocol):
    """Stores and lends features. Batch forms are the contract; a single call is a batch of one."""

    name: str

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        """Store all or nothing; readable by every process when it returns.

        Copies each tensor once into the store's buffer (a ``LocalFeatureStore`` keeps references).
        Raises ``FeatureStoreFull`` (back-pressure) or ``FeatureTooLarge`` before anything is visible. A second put
        of a live (sample_id, generation) is a ``FeatureStoreError``.
        """
        ...

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        """Tensors of each ref, without a copy where the store can, and a handle that keeps them valid.

        Raises ``FeatureNotFound`` (freed, or another generation lives) or ``CorruptFeature``; then no handle is
        kept. The tensors are read-only by convention.
        """
        ...

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        """End readers' claims. Releasing twice does nothing."""
        ...

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        """Which refs a ``get`` would find now. Keeps no handle, so an answer may be old when it arrives."""
        ...

    def stored(self) -> list[tuple[str, int]]:
        """Every readable (sample_id, generation) of the run, in no order, whoever wrote it, dead writers included."""
        ...

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """Free (sample_id, generation) pairs, known or not; no later ``get`` finds them, in any process.

        The bytes are reused only when the last handle on them is released.
        """
        ...

    def gc(self) -> int:
        """Reclaim what dead writers and readers left behind; the number of samples whose bytes came back by it.

        What a dead writer left readable stays readable until it is aborted.
        """
        ...

    def health(self) -> StoreHealth: ...

    def close(self) -> None:
        """Let go of this process's resources. Idempotent."""
        ...
