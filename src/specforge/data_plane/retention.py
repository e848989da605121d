"""RetainingFeatureStore: a feature store with room beside it, where features wait between the epochs that need them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from specforge.contracts.features import FeatureHandle
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures, StoreHealth
from specforge.errors import FeatureNotFound, FeatureStoreError, FeatureStoreFull, FeatureTooLarge

_LOG = logging.getLogger(__name__)

Pair = tuple[str, int]


class Tier(FeatureStore, Protocol):
    """Room beside a store. ``keeps_references``: a put keeps the tensors that it is given, instead of a copy."""

    keeps_references: bool

    def key_of(self, pair: Pair) -> str:
        """The key of a ref to ``pair``, should it be stored here."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where features were put aside: the tier, and the ref that finds them there."""

    tier: Tier
    ref: SampleRef


class RetainingFeatureStore:
    """``inner`` with ``tiers`` (fastest first) beside it. Implements ``FeatureStore``, and the controller's retention.

    ``retain`` moves features from ``inner`` into the first tier with room; from then on they are read there with the
    same ref, and no longer use the room of ``inner``. Every tier has its own budget. ``by_reference``: the tensors of
    ``inner`` outlive their handle, so that a tier in memory shares them; else they are copied once. A tier that
    outlives its process (``shared_dir``) gives back what an earlier process of the run put aside.
    """

    def __init__(self, inner: FeatureStore, tiers: Sequence[Tier], *, by_reference: bool = False) -> None:
        self.name = inner.name
        self._inner, self._tiers, self._by_reference = inner, tiers, by_reference
        self._usable = list(tiers)
        self._lock = threading.Lock()
        self._places: dict[Pair, _Place] = {}
        # What earlier processes put aside, until somebody asks for it with a ref.
        self._found: dict[Pair, Tier] = {pair: tier for tier in tiers for pair in tier.stored()}
        self._tokens = itertools.count(1)
        self._handles: dict[int, tuple[FeatureStore, FeatureHandle]] = {}

    # Retention

    def retain(self, refs: Sequence[SampleRef]) -> list[bool]:
        """See ``control_plane.base.Retention``. ``False`` too where the features are gone from ``inner``."""
        return [self._retain(ref) for ref in refs]

    def retained(self, refs: Sequence[SampleRef]) -> list[bool]:
        return [self._place(ref) is not None for ref in refs]

    # FeatureStore

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        return self._inner.put(requests)

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        while True:
            places = [self._place(ref) for ref in refs]
            try:
                return self._get(refs, places)
            except FeatureNotFound:
                # Put aside between the look and the get?
                if places == [self._place(ref) for ref in refs]:
                    raise

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        with self._lock:
            lent = [self._handles.pop(handle.token, None) for handle in handles]
        for store, handles_there in _grouped(item for item in lent if item is not None):
            store.release(handles_there)

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        aside = self.retained(refs)
        inner = iter(self._inner.live([ref for ref, is_aside in zip(refs, aside, strict=True) if not is_aside]))
        return [is_aside or next(inner) for is_aside in aside]

    def stored(self) -> list[Pair]:
        """What is in ``inner``, and what earlier processes put aside and nobody asked for yet."""
        with self._lock:
            found = list(self._found)
        return self._inner.stored() + found

    def abort(self, samples: Sequence[Pair]) -> None:
        with self._lock:
            for pair in samples:
                self._places.pop(pair, None)
                self._found.pop(pair, None)
        for store in (self._inner, *self._tiers):
            store.abort(samples)

    def gc(self) -> int:
        return sum(store.gc() for store in (self._inner, *self._tiers))

    def health(self) -> StoreHealth:
        """Of ``inner``, whose room is what capture waits for."""
        return self._inner.health()

    def close(self) -> None:
        for store in (self._inner, *self._tiers):
            store.close()

    # Inside

    def _retain(self, ref: SampleRef) -> bool:
        if self._place(ref) is not None:
            return True
        try:
            [(tensors, handle)] = self._inner.get([ref])
        except FeatureStoreError:
            # Gone, damaged, or no room to read it now: it is freed, and captured again.
            return False
        pair = ref.sample_id, ref.generation
        try:
            place = self._put_aside(ref, tensors)
        finally:
            self._inner.release([handle])
        if place is None:
            return False
        with self._lock:
            self._places[pair] = place
        self._inner.abort([pair])
        return True

    def _put_aside(self, ref: SampleRef, tensors: dict[str, torch.Tensor]) -> _Place | None:
        for tier in list(self._usable):
            kept: dict[str, torch.Tensor] = tensors
            if tier.keeps_references:
                health = tier.health()
                if health.live_bytes + ref.num_bytes > health.capacity_bytes:
                    continue  # not copied in vain
                kept = {name: self._host_copy(tensor) for name, tensor in tensors.items()}
            try:
                [stored] = tier.put([PutRequest(ref.sample_id, ref.generation, kept)])
            except (FeatureStoreFull, FeatureTooLarge):
                continue
            except FeatureStoreError as error:
                # Room to spare is no reason to end a run.
                _LOG.warning(
                    "features are not kept in %s any more, the target runs again for them: %s", tier.name, error
                )
                self._usable.remove(tier)
                continue
            return _Place(tier, replace(ref, store=stored.store, key=stored.key))
        return None

    def _host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` itself where it outlives its handle and is in host memory."""
        return tensor if self._by_reference and tensor.device.type == "cpu" else tensor.to("cpu", copy=True)

    def _place(self, ref: SampleRef) -> _Place | None:
        pair = ref.sample_id, ref.generation
        with self._lock:
            place = self._places.get(pair)
            tier = self._found.get(pair)
        if place is not None or tier is None:
            return place
        place = _Place(tier, replace(ref, store=tier.name, key=tier.key_of(pair)))
        if not tier.live([place.ref])[0]:
            return None
        with self._lock:
            self._found.pop(pair, None)
            self._places[pair] = place
        # An earlier process may have died between the two steps of putting it aside.
        self._inner.abort([pair])
        return place

    def _get(
        self, refs: Sequence[SampleRef], places: Sequence[_Place | None]
    ) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        stores = [self._inner if place is None else place.tier for place in places]
        asked = [ref if place is None else place.ref for ref, place in zip(refs, places, strict=True)]
        lent: dict[int, tuple[dict[str, torch.Tensor], FeatureHandle]] = {}
        try:
            for store in {id(store): store for store in stores}.values():
                mine = [index for index, other in enumerate(stores) if other is store]
                for index, (tensors, handle) in zip(mine, store.get([asked[i] for i in mine]), strict=True):
                    lent[index] = tensors, self._lend(store, handle)
        except BaseException:
            self.release([handle for _, handle in lent.values()])
            raise
        return [lent[index] for index in range(len(refs))]

    def _lend(self, store: FeatureStore, handle: FeatureHandle) -> FeatureHandle:
        """A handle of this store: tokens of several stores may be the same."""
        token = next(self._tokens)
        with self._lock:
            self._handles[token] = store, handle
        return replace(handle, store=self.name, token=token)


def _grouped(
    lent: Iterable[tuple[FeatureStore, FeatureHandle]],
) -> list[tuple[FeatureStore, list[FeatureHandle]]]:
    groups: dict[int, tuple[FeatureStore, list[FeatureHandle]]] = {}
    for store, handle in lent:
        groups.setdefault(id(store), (store, []))[1].append(handle)
    return list(groups.values())
