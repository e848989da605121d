"""MooncakeFeatureStore: features between hosts, through Mooncake Store over TCP or RDMA.

The memory belongs to a standalone ``mooncake_client``, so no death of an engine or a trainer loses features; the death
of the owner or of the master does, and then a ``get`` says ``FeatureNotFound``: the run captures again. A put is one
copy into this process's registered buffer and one batched transfer, a get is one batched transfer, whose tensors are
views of that buffer until they are released.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specforge.contracts.features import FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.mooncake_connection import (
    HALF_WRITTEN,
    NO_ROOM,
    NOT_FOUND,
    WRONG_SIZE,
    MooncakeConnection,
    MooncakeSettings,
)
from specforge.data_plane.mooncake_objects import HEADER_BYTES, Names, Place, check_object, write_header
from specforge.data_plane.mooncake_pool import PoolSlot, TransferPool
from specforge.data_plane.tensors import check_specs, fill, specs_of, views
from specforge.data_plane.tombstones import Tombstones
from specforge.errors import (
    CorruptFeature,
    FeatureNotFound,
    FeatureStoreError,
    FeatureStoreFull,
    FeatureTooLarge,
    MissingExtraError,
    UserError,
)

__all__ = ["MooncakeFeatureStore", "MooncakeSettings", "load_library"]

_RECOUNT_AT_LEAST = 1024
"""Own samples; where there are more, and twice as many as at the last count, those that others freed are forgotten."""


@dataclass(frozen=True, slots=True)
class _Put:
    request: PutRequest
    specs: tuple[FeatureSpec, ...]
    num_bytes: int
    place: Place

    @property
    def pair(self) -> tuple[str, int]:
        return self.request.sample_id, self.request.generation

    @property
    def object_bytes(self) -> int:
        return HEADER_BYTES + self.num_bytes


class _Sizes:
    """Bytes of pairs, and their sum."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, int], int] = {}
        self.num_bytes = 0

    def add(self, pair: tuple[str, int], num_bytes: int) -> None:
        self.of[pair] = num_bytes
        self.num_bytes += num_bytes

    def discard(self, pair: tuple[str, int]) -> None:
        self.num_bytes -= self.of.pop(pair, 0)


class MooncakeFeatureStore:
    """``FeatureStore`` of many hosts. Safe to use from several threads; not across a fork: open another in the child.

    Handles are of this object alone: they hold room in its own transfer buffer (``buffer_bytes``), nothing in the
    service. While a put goes on, other processes may see some samples of its batch; when it fails they are gone.
    """

    name = "mooncake"

    def __init__(self, settings: MooncakeSettings) -> None:
        """Connects. Raises ``MissingExtraError`` or ``UserError`` where Mooncake cannot be loaded,
        ``FeatureStoreError`` where its master does not answer within ``reconnect_s``.
        """
        self._settings = settings
        self._names = Names(settings.run_id)
        library = load_library()
        self._pool = TransferPool(settings.buffer_bytes)
        self._connection = MooncakeConnection(settings, library)
        try:
            self._connection.register(self._pool.address, self._pool.num_bytes)
        except BaseException:
            self._connection.close()
            raise
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._handles: dict[int, PoolSlot] = {}
        self._aborted = Tombstones()
        self._own = _Sizes()
        """What this process put, and as far as it knows is not freed."""
        self._on_the_way = _Sizes()
        self._num_counted = 0

    def put(self, requests: Sequence[PutRequest]) -> list[StoredFeatures]:
        """See ``FeatureStore``. A pair that another process put is not noticed here: its bytes stay, and a get of this
        put's ref finds nothing.
        """
        puts = [self._plan(request) for request in requests]
        wanted = self._reserve(puts)
        is_stored = False
        try:
            self._store(wanted)
            is_stored = True
        finally:
            with self._lock:
                for put in wanted:
                    self._on_the_way.discard(put.pair)
                    if is_stored:
                        self._own.add(put.pair, put.num_bytes)
        self._forget_aborted(wanted)
        return [StoredFeatures(self.name, str(put.place), put.num_bytes, put.specs) for put in puts]

    def get(self, refs: Sequence[SampleRef]) -> list[tuple[dict[str, torch.Tensor], FeatureHandle]]:
        """See ``FeatureStore``. Raises ``FeatureStoreError`` while handles fill the transfer buffer."""
        places = [self._place(ref) for ref in refs]
        sizes = [HEADER_BYTES + ref.num_bytes for ref in refs]
        if sum(sizes) > self._pool.num_bytes:
            raise FeatureTooLarge(
                f"{sum(sizes)} bytes of {len(refs)} samples ({refs[0].sample_id!r}, ...) are more than the transfer "
                f"buffer of {self._pool.num_bytes} bytes: raise data_plane.mooncake.buffer_bytes, or get fewer at once"
            )
        slots = self._pool.take(sizes)
        try:
            keys = [place.object_key for place in places]
            counts = self._connection.get(keys, self._addresses(slots), sizes)
            for ref, place, slot, count in zip(refs, places, slots, counts, strict=True):
                self._check_read(ref, place, slot, count)
        except BaseException:
            self._pool.give_back(slots)
            raise
        self._pool.keep(slots)
        return [self._lend(ref, slot) for ref, slot in zip(refs, slots, strict=True)]

    def release(self, handles: Sequence[FeatureHandle]) -> None:
        with self._lock:
            slots = [self._handles.pop(handle.token, None) for handle in handles]
        self._pool.give_back([slot for slot in slots if slot is not None], kept=True)

    def live(self, refs: Sequence[SampleRef]) -> list[bool]:
        """See ``FeatureStore``; told from names and sizes. Takes a master that is away for as long as a ``get``."""
        keys = [self._live_key(ref) for ref in refs]
        asked = sorted({key for key in keys if key is not None})
        sizes = dict(zip(asked, self._connection.sizes(asked), strict=True))
        return [
            key is not None and sizes[key] == HEADER_BYTES + ref.num_bytes for key, ref in zip(keys, refs, strict=True)
        ]

    def stored(self) -> list[tuple[str, int]]:
        pairs = (self._names.pair(key) for key in self._connection.all_keys())
        return [pair for pair in pairs if pair is not None]

    def abort(self, samples: Sequence[tuple[str, int]]) -> None:
        """See ``FeatureStore``. The abort of a pair that is not stored is remembered by this process alone (the ledger
        refuses the commit of such a pair).
        """
        with self._lock:
            for pair in samples:
                self._aborted.add(pair)
                self._own.discard(pair)
        self._connection.remove([self._names.key(*pair) for pair in samples])

    def gc(self) -> int:
        """Nothing: Mooncake itself gives back what dead writers left half-written, after its
        ``put_start_release_timeout_sec``; what they left readable is the ledger's to abort.
        """
        return 0

    def health(self) -> StoreHealth:
        """``live_bytes`` and ``num_samples`` of what this process put and nobody freed, ``num_handles`` of this object;
        ``capacity_bytes`` is the budget of this process, without one that of the service.
        """
        self._recount()
        capacity = self._settings.capacity_bytes
        capacity = sum(self._connection.segments()) if capacity is None else capacity
        with self._lock:
            return StoreHealth(capacity, self._own.num_bytes, len(self._own.of), len(self._handles))

    def remove_all(self) -> int:
        """Free everything of the run, whoever put it; the number of samples. For a run that ends or starts anew."""
        with self._lock:
            self._own = _Sizes()
        return self._connection.remove_all(self._names.pattern)

    def close(self) -> None:
        """What was put stays readable. Tensors stay valid while they live."""
        self._connection.close()

    # Puts

    def _plan(self, request: PutRequest) -> _Put:
        specs, num_bytes = specs_of(request.tensors)
        place = Place(self._names.key(request.sample_id, request.generation), secrets.randbits(64))
        put = _Put(request, specs, num_bytes, place)
        if put.object_bytes > self._pool.num_bytes:
            raise FeatureTooLarge(
                f"sample {request.sample_id!r} has {num_bytes} bytes, the transfer buffer {self._pool.num_bytes}: "
                "raise data_plane.mooncake.buffer_bytes"
            )
        capacity = self._settings.capacity_bytes
        if capacity is not None and num_bytes > capacity:
            raise FeatureTooLarge(
                f"sample {request.sample_id!r} has {num_bytes} bytes, the store holds {capacity} at most: raise "
                "data_plane.mooncake.capacity_bytes"
            )
        return put

    def _reserve(self, puts: Sequence[_Put]) -> list[_Put]:
        """Those that no abort has overtaken, entered as on their way, after the checks that need no transfer."""
        if self._should_count(puts):
            self._recount()
        with self._lock:
            wanted: list[_Put] = []
            pairs = set[tuple[str, int]]()
            for put in puts:
                if put.pair in self._own.of or put.pair in self._on_the_way.of or put.pair in pairs:
                    raise FeatureStoreError(
                        f"sample {put.pair[0]!r}, generation {put.pair[1]}: its features are already stored"
                    )
                pairs.add(put.pair)
                if put.pair not in self._aborted:
                    wanted.append(put)
            num_bytes = sum(put.num_bytes for put in wanted)
            capacity = self._settings.capacity_bytes
            if capacity is not None and self._num_bytes() + num_bytes > capacity:
                raise FeatureStoreFull(
                    f"{num_bytes} bytes do not fit: {self._num_bytes()} of {capacity} bytes are live"
                )
            for put in wanted:
                self._on_the_way.add(put.pair, put.num_bytes)
        return wanted

    def _should_count(self, puts: Sequence[_Put]) -> bool:
        """Whether it matters now what others freed of this process's samples."""
        with self._lock:
            capacity = self._settings.capacity_bytes
            return (
                any(put.pair in self._own.of for put in puts)
                or len(self._own.of) > max(_RECOUNT_AT_LEAST, 2 * self._num_counted)
                or (capacity is not None and self._num_bytes() + sum(put.num_bytes for put in puts) > capacity)
            )

    def _recount(self) -> None:
        with self._lock:
            pairs = list(self._own.of)
        exist = self._connection.exist([self._names.key(*pair) for pair in pairs])
        with self._lock:
            for pair, exists in zip(pairs, exist, strict=True):
                if not exists:
                    self._own.discard(pair)
            self._num_counted = len(self._own.of)

    def _num_bytes(self) -> int:
        return self._own.num_bytes + self._on_the_way.num_bytes

    def _store(self, puts: Sequence[_Put]) -> None:
        """All or none; as many at a time as the pool has room for."""
        tried: list[str] = []
        try:
            left = list(puts)
            while left:
                slots = self._pool.take([put.object_bytes for put in left], partly=True)
                some, left = left[: len(slots)], left[len(slots) :]
                tried += [put.place.object_key for put in some]
                try:
                    self._transfer(some, slots)
                finally:
                    self._pool.give_back(slots)
        except BaseException:
            # The failure that is on its way says more than one of the clean-up would.
            with contextlib.suppress(FeatureStoreError):
                self._connection.try_to_remove(tried)
            raise

    def _transfer(self, puts: Sequence[_Put], slots: Sequence[PoolSlot]) -> None:
        for put, slot in zip(puts, slots, strict=True):
            write_header(self._pool.memory, slot.offset, put.place.nonce, (*put.pair, put.num_bytes))
            start = slot.offset + HEADER_BYTES
            fill(self._pool.tensor[start : start + put.num_bytes], put.specs, put.request.tensors)
        keys = [put.place.object_key for put in puts]
        codes = self._connection.put(keys, self._addresses(slots), [put.object_bytes for put in puts])
        for put, code in zip(puts, codes, strict=True):
            if code == NO_ROOM:
                self._raise_no_room(put)
            if code != 0:
                raise FeatureStoreError(f"sample {put.pair[0]!r}: Mooncake refused to store it with code {code}")

    def _raise_no_room(self, put: _Put) -> None:
        segments = self._connection.segments()
        # No segment at all: the owner of the memory is on its way back.
        if segments and put.object_bytes > max(segments):
            raise FeatureTooLarge(
                f"sample {put.pair[0]!r} has {put.object_bytes} bytes, the largest segment of Mooncake "
                f"{max(segments)}: raise data_plane.mooncake.capacity_bytes"
            )
        raise FeatureStoreFull(
            f"sample {put.pair[0]!r} of {put.object_bytes} bytes does not fit: Mooncake has {sum(segments)} bytes in "
            f"{len(segments)} segments, and no room"
        )

    def _forget_aborted(self, puts: Sequence[_Put]) -> None:
        """Free what was aborted while it was on its way."""
        with self._lock:
            late = [put for put in puts if put.pair in self._aborted]
            for put in late:
                self._own.discard(put.pair)
        self._connection.remove([put.place.object_key for put in late])

    def _addresses(self, slots: Sequence[PoolSlot]) -> list[int]:
        return [self._pool.address + slot.offset for slot in slots]

    # Gets

    def _place(self, ref: SampleRef) -> Place:
        place = Place.parse(ref.key)
        is_named = place is not None and place.object_key == self._names.key(ref.sample_id, ref.generation)
        if place is None or not is_named or ref.store != self.name or (ref.sample_id, ref.generation) in self._aborted:
            raise self._not_found(ref)
        check_specs(ref)
        return place

    def _live_key(self, ref: SampleRef) -> str | None:
        try:
            return self._place(ref).object_key
        except (FeatureNotFound, CorruptFeature):
            return None

    def _check_read(self, ref: SampleRef, place: Place, slot: PoolSlot, count: int) -> None:
        if count in (NOT_FOUND, HALF_WRITTEN):
            raise self._not_found(ref)
        if count == WRONG_SIZE:
            raise CorruptFeature(
                f"sample {ref.sample_id!r}: the object at {ref.key} is larger than the {ref.num_bytes} bytes that the "
                "reference says"
            )
        if count < 0:
            raise FeatureStoreError(f"sample {ref.sample_id!r}: Mooncake could not read {ref.key}: code {count}")
        check_object(ref, place.nonce, self._pool.memory[slot.offset : slot.offset + slot.num_bytes], count)

    def _lend(self, ref: SampleRef, slot: PoolSlot) -> tuple[dict[str, torch.Tensor], FeatureHandle]:
        start = slot.offset + HEADER_BYTES
        tensors = views(self._pool.tensor[start : start + ref.num_bytes], ref.features)
        with self._lock:
            handle = FeatureHandle(self.name, ref.sample_id, ref.generation, next(self._tokens))
            self._handles[handle.token] = slot
        return tensors, handle

    @staticmethod
    def _not_found(ref: SampleRef) -> FeatureNotFound:
        return FeatureNotFound(
            f"sample {ref.sample_id!r}, generation {ref.generation}: no live features at {ref.store}:{ref.key} (freed, "
            "or lost with the Mooncake process that had them)"
        )


def load_library() -> Any:
    """The module ``mooncake.store``. Raises ``MissingExtraError``, or ``UserError`` where it cannot be loaded."""
    # Read when it is loaded: the lines about every connection it opens are of no use beside a run's own log.
    os.environ.setdefault("MC_LOG_LEVEL", "WARNING")
    try:
        from mooncake import store  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtraError("mooncake", "mooncake") from None
    except ImportError as error:
        raise UserError(
            f"Mooncake cannot be loaded: {error}. Install the library it names (libibverbs.so.1 is in libibverbs1 of "
            "Debian, in libibverbs of RHEL); on a host with CUDA install mooncake-transfer-engine, on others "
            "mooncake-transfer-engine-non-cuda, never both"
        ) from None
    return store
