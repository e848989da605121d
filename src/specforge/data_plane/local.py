"""LocalFeatureStore: features of one process, kept by reference."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specforge.contracts.features import FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.tensors import materialised, specs_of
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import CorruptFeature, FeatureNotFound, FeatureStoreError, FeatureStoreFull, FeatureTooLarge


@dataclass(slots=True)
class _Sample:
    tensors: dict[str, torch.Tensor]
    specs: tuple[FeatureSpec, ...]
    num_bytes: int
    num_handles: int = 0
    readable: bool = True


class LocalFeatureStore:
    """``FeatureStore`` of one process. ``capacity_bytes=None`` means no budget. Safe to use from several threads."""

    name = "local"
    keeps_references = True

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._readable: dict[tuple[str, int], _Sample] = {}
        self._handles: dict[int, _Sample] = {}
        self._tokens = itertools.count(1)
        self._aborted = Tombstones()
        self._live_bytes = 0
        self._closed = False

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        with self._lock:
            if self._closed:
                raise FeatureStoreError("put on a closed feature store")
            samples = [self._sample(request) for request in requests]
            pairs = [(request.sample_id, request.generation) for request in requests]
            for position, pair in enumerate(pairs):
                if pair in self._readable or pair in pairs[:position]:
                    raise FeatureStoreError(
                        f"sample {pair[0]!r}, generation {pair[1]}: its features are already stored"
                    )
            wanted = {pair: sample for pair, sample in zip(pairs, samples, strict=True) if pair not in self._aborted}
            num_bytes = sum(sample.num_bytes for sample in wanted.values())
            if self._capacity_bytes is not None and self._live_bytes + num_bytes > self._capacity_bytes:
                raise FeatureStoreFull(
                    f"{num_bytes} bytes do not fit: {self._live_bytes} of {self._capacity_bytes} bytes are live"
                )
            self._readable.update(wanted)
            self._live_bytes += num_bytes
        return [StoredFeatures(self.name, "", sample.num_bytes, sample.specs) for sample in samples]

    @staticmethod
    def key_of(_pair: tuple[str, int]) -> str:
        """The pair itself finds features here."""
        return ""

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        with self._lock:
            samples = [self._find(ref) for ref in refs]
            answer = []
            for ref, sample in zip(refs, samples, strict=True):
                handle = FeatureHandle(self.name, ref.sample_id, ref.generation, next(self._tokens))
                sample.num_handles += 1
                self._handles[handle.token] = sample
                answer.append((dict(sample.tensors), handle))
        return answer

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        with self._lock:
            for handle in handles:
                sample = self._handles.pop(handle.token, None)
                if sample is not None:
                    sample.num_handles -= 1
                    self._reclaim(sample)

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        with self._lock:
            return [self._is_live(ref) for ref in refs]

    def stored(self) -> list[tuple[str, int]]:
        with self._lock:
            return list(self._readable)

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        with self._lock:
            for pair in samples:
                self._aborted.add(pair)
                sample = self._readable.pop(pair, None)
                if sample is not None:
                    sample.readable = False
                    self._reclaim(sample)

    def gc(self) -> int:
        """Nothing: the only writer and the only reader is this process."""
        return 0

    def health(self) -> StoreHealth:
        """``capacity_bytes`` 0 means no budget."""
        with self._lock:
            return StoreHealth(self._capacity_bytes or 0, self._live_bytes, len(self._readable), len(self._handles))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._readable.clear()
            self._handles.clear()
            self._live_bytes = 0

    def _sample(self, request: PutRequest) -> _Sample:
        specs, num_bytes = specs_of(request.tensors)
        if self._capacity_bytes is not None and num_bytes > self._capacity_bytes:
            raise FeatureTooLarge(
                f"sample {request.sample_id!r} has {num_bytes} bytes, the store holds {self._capacity_bytes} at most"
            )
        return _Sample({name: materialised(source) for name, source in request.tensors.items()}, specs, num_bytes)

    def _is_live(self, ref: SampleRef) -> bool:
        try:
            self._find(ref)
        except (FeatureNotFound, CorruptFeature):
            return False
        return True

    def _find(self, ref: SampleRef) -> _Sample:
        sample = self._readable.get((ref.sample_id, ref.generation))
        if sample is None or ref.store != self.name:
            raise FeatureNotFound(
                f"sample {ref.sample_id!r}, generation {ref.generation}: no live features in store {self.name!r}"
            )
        if (sample.specs, sample.num_bytes) != (ref.features, ref.num_bytes):
            raise CorruptFeature(
                f"sample {ref.sample_id!r}: stored as {sample.specs}, the reference says {ref.features}"
            )
        return sample

    def _reclaim(self, sample: _Sample) -> None:
        if not sample.readable and not sample.num_handles:
            self._live_bytes -= sample.num_bytes
            sample.tensors = {}
