"""AsideReader: what a train rank that does not lead sees of features that the leader put aside for later epochs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from specforge.contracts.features import FeatureHandle
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.retention import Tier
from specforge.errors import FeatureNotFound


class AsideReader:
    """``inner``, and what another process moved from it to ``aside``: a ``FeatureStore``.

    Features go from ``inner`` to ``aside`` only, are in one of them at any moment, and keep their ref.
    """

    def __init__(self, inner: FeatureStore, aside: Tier) -> None:
        self.name = inner.name
        self._inner, self._aside = inner, aside
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._handles: dict[int, tuple[FeatureStore, FeatureHandle]] = {}

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        return self._inner.put(requests)

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        try:
            return [(tensors, self._lend(self._inner, handle)) for tensors, handle in self._inner.get(refs)]
        except FeatureNotFound:
            found: list[tuple[dict[str, torch.Tensor], FeatureHandle]] = []
            try:
                for ref in refs:
                    found.append(self._find(ref))  # noqa: PERF401 - those found before a failure are given back
            except BaseException:
                self.release([handle for _, handle in found])
                raise
            return found

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        with self._lock:
            lent = [self._handles.pop(handle.token, None) for handle in handles]
        for store in (self._inner, self._aside):
            store.release([item[1] for item in lent if item is not None and item[0] is store])

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        inner, aside = self._inner.live(refs), self._aside.live([self._moved(ref) for ref in refs])
        return [here or there for here, there in zip(inner, aside, strict=True)]

    def stored(self) -> list[tuple[str, int]]:
        return self._inner.stored()

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """In ``inner``: what was put aside is the leader's to free."""
        self._inner.abort(samples)

    def gc(self) -> int:
        return self._inner.gc()

    def health(self) -> StoreHealth:
        return self._inner.health()

    def close(self) -> None:
        for store in (self._inner, self._aside):
            store.close()

    def _find(self, ref: SampleRef) -> tuple[dict[str, torch.Tensor], FeatureHandle]:
        store: FeatureStore = self._inner
        try:
            [(tensors, handle)] = store.get([ref])
        except FeatureNotFound:
            store = self._aside
            [(tensors, handle)] = store.get([self._moved(ref)])
        return tensors, self._lend(store, handle)

    def _moved(self, ref: SampleRef) -> SampleRef:
        return replace(ref, store=self._aside.name, key=self._aside.key_of((ref.sample_id, ref.generation)))

    def _lend(self, store: FeatureStore, handle: FeatureHandle) -> FeatureHandle:
        """A handle of this store: tokens of both may be the same."""
        token = next(self._tokens)
        with self._lock:
            self._handles[token] = store, handle
        return replace(handle, store=self.name, token=token)
