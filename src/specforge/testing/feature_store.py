"""The conformance suite of ``FeatureStore``. A store is done when it passes.

    class TestMyStore(FeatureStoreSuite):
        def make_store(self, capacity_bytes): return MyStore(capacity_bytes)

A store for several processes also overrides ``make_reader`` and ``make_writer``. What stores may differ in is said by
the attributes at the top of the suite.
"""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, NoReturn

import psutil
import pytest
import torch

from specforge.contracts.features import ALIGNMENT, ITEM_BYTES, FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef
from specforge.data_plane.base import FeatureStore, PutRequest, StoredFeatures, StoreHealth
from specforge.data_plane.tensors import DTYPES, Columns, Source
from specforge.errors import (
    CorruptFeature,
    FeatureNotFound,
    FeatureStoreError,
    FeatureStoreFull,
    FeatureTooLarge,
)

CAPACITY = 1 << 20
LARGEST = CAPACITY // 64
"""Bytes. Every store takes a sample of this size at ``CAPACITY``."""


def make_ref(sample_id: str, generation: int, stored: StoredFeatures, num_tokens: int = 1) -> SampleRef:
    """The ref that a rollout worker would commit for ``stored``."""
    return SampleRef(
        sample_id=sample_id,
        generation=generation,
        num_tokens=num_tokens,
        loss_spans=(),
        store=stored.store,
        key=stored.key,
        num_bytes=stored.num_bytes,
        features=stored.features,
        target_revision="revision",
        capture_fingerprint="fingerprint",
        worker_id="worker",
    )


def altered(ref: SampleRef, features: tuple[FeatureSpec, ...]) -> SampleRef:
    """``ref`` with other specs, as a broken peer would send it."""
    stored = StoredFeatures(ref.store, ref.key, ref.num_bytes, features)
    return make_ref(ref.sample_id, ref.generation, stored, ref.num_tokens)


def put_one(store: FeatureStore, sample_id: str, tensors: Mapping[str, Source], generation: int = 1) -> SampleRef:
    [stored] = store.put([PutRequest(sample_id, generation, tensors)])
    return make_ref(sample_id, generation, stored)


def filled(num_bytes: int, value: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((num_bytes,), value % 251, dtype=torch.uint8)}


def assert_same_bits(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(
            got[name].contiguous().reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
        )


class FeatureStoreSuite:
    """Inherit, name the class ``Test...`` and override ``make_store``."""

    handles_hold_bytes = True
    """Freed bytes stay in the store's count until the last handle is released. ``False``: a handle keeps tensors valid,
    but the bytes leave the count with the abort (files, objects of a service)."""

    handles_are_shared = True
    """``health`` of any object counts the handles of all. ``False``: those of that object."""

    num_cycles = 3000
    """Of puts and aborts at three quarters of the capacity. A store that cannot fragment may do with fewer."""

    def make_store(self, capacity_bytes: int) -> FeatureStore:
        """A new, empty store that this test may put into."""
        raise NotImplementedError

    def make_large_store(self, num_bytes: int) -> FeatureStore:
        """A new, empty store that takes one sample of a little more than ``num_bytes``."""
        return self.make_store(num_bytes + CAPACITY)

    def make_reader(self, store: FeatureStore) -> FeatureStore:
        """Another object that reads what ``store`` holds; the store itself where there is only one."""
        return store

    def make_writer(self, store: FeatureStore) -> FeatureStore:
        """Another object that puts where readers of ``store`` look; the store itself where there is only one."""
        return store

    def truncate(self, store: FeatureStore, ref: SampleRef) -> str | None:  # noqa: ARG002 (for those who override)
        """Cut what is stored for ``ref`` short, as a broken disk would; or the reason why nothing can."""
        return "the bytes are memory of the store's own, whose size is fixed"

    def leftovers(self, store: FeatureStore) -> list[str]:  # noqa: ARG002 (for those who override)
        """What lies around that is no stored sample, such as temporary files. Must be empty after every test."""
        return []

    def room(self, num_bytes: int) -> int:
        """Bytes that a store of this machine could take, of the ``num_bytes`` that a test wants to put."""
        return min(int(psutil.virtual_memory().available) // 2, num_bytes)

    @pytest.fixture
    def store(self) -> Iterator[FeatureStore]:
        store = self.make_store(CAPACITY)
        yield store
        assert self.leftovers(store) == []
        store.close()

    @pytest.fixture
    def reader(self, store: FeatureStore) -> Iterator[FeatureStore]:
        reader = self.make_reader(store)
        yield reader
        reader.close()

    @pytest.fixture
    def second_reader(self, store: FeatureStore) -> Iterator[FeatureStore]:
        reader = self.make_reader(store)
        yield reader
        reader.close()

    @pytest.fixture
    def writer(self, store: FeatureStore) -> Iterator[FeatureStore]:
        writer = self.make_writer(store)
        yield writer
        writer.close()

    def num_handles(self, store: FeatureStore, *readers: FeatureStore) -> int:
        """Handles that ``store`` and ``readers`` lent."""
        if self.handles_are_shared:
            return store.health().num_handles
        return sum(each.health().num_handles for each in {id(each): each for each in (store, *readers)}.values())

    def held(self, num_bytes: int) -> int:
        """How many of ``num_bytes`` that were aborted under a handle are still counted."""
        return num_bytes if self.handles_hold_bytes else 0

    # Bits

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.randn(7, 5),
            torch.randn(7, 5).to(torch.bfloat16),
            torch.randn(7, 5).to(torch.float16),
            torch.randn(7, 5).to(torch.float8_e4m3fn),
            torch.arange(-3, 4),
            torch.arange(-3, 4, dtype=torch.int32),
            torch.arange(200, dtype=torch.uint8),
            torch.tensor([True, False, True]),
            torch.tensor(3.5),
            torch.tensor([[[True]]]),
            torch.tensor([2.5], dtype=torch.bfloat16),
            torch.tensor([float("nan"), float("inf"), -0.0]),
            torch.empty(0, 4),
            torch.randn(6, 8).t(),
            torch.randn(9, 8)[::2, 1:7:2],
            torch.randn(1, 4).expand(5, 4),
            torch.randn(4, requires_grad=True),
        ],
        ids=lambda tensor: f"{tensor.dtype}-{list(tensor.shape)}-{tensor.stride()}",
    )
    def test_reader_gets_the_bits_that_were_put(
        self, store: FeatureStore, reader: FeatureStore, tensor: torch.Tensor
    ) -> None:
        ref = put_one(store, "a", {"before": torch.ones(3), "tensor": tensor, "after": torch.ones(1)})
        [(tensors, handle)] = reader.get([ref])
        assert_same_bits(tensors, {"before": torch.ones(3), "tensor": tensor.detach(), "after": torch.ones(1)})
        reader.release([handle])

    def test_sample_of_no_bytes_is_stored(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", {"x": torch.empty(0, 3, dtype=torch.bfloat16)})
        [(tensors, handle)] = reader.get([ref])
        assert tensors["x"].shape == (0, 3)
        reader.release([handle])

    def test_every_dtype_travels_in_one_sample(self, store: FeatureStore, reader: FeatureStore) -> None:
        assert set(DTYPES) == set(ITEM_BYTES)
        tensors: dict[str, torch.Tensor] = {}
        for index, (name, dtype) in enumerate(DTYPES.items()):
            # Any bits: NaNs of every kind too. A bool is 0 or 1.
            bits = torch.randint(2 if name == "bool" else 256, (3 * 8 * ITEM_BYTES[name],), dtype=torch.uint8)
            tensors[name] = bits.view(dtype).reshape(3, 8)
            tensors[f"one {name}"] = torch.ones(1).to(dtype)
            tensors[f"none {name}"] = torch.empty((0, index), dtype=dtype)
        [(got, handle)] = reader.get([put_one(store, "a", tensors)])
        assert_same_bits(got, tensors)
        reader.release([handle])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
    def test_columns_are_joined_and_cast_on_the_way(
        self, store: FeatureStore, reader: FeatureStore, dtype: str
    ) -> None:
        parts = (torch.randn(5, 3), torch.randn(7, 5).t(), torch.randn(5, 1).expand(5, 4), torch.randn(5, 6).bfloat16())
        empty = Columns((torch.empty(0, 3), torch.empty(0, 2)), dtype)
        sources: dict[str, Source] = {
            "ids": torch.arange(5),
            "none": empty,
            "joined": Columns(parts, dtype),
            "last": torch.ones(1),
        }
        [(got, handle)] = reader.get([put_one(store, "a", sources)])
        assert_same_bits(
            got,
            {
                "ids": torch.arange(5),
                "none": torch.empty(0, 5, dtype=DTYPES[dtype]),
                "joined": torch.cat(parts, dim=1).to(DTYPES[dtype]),
                "last": torch.ones(1),
            },
        )
        reader.release([handle])

    def test_nothing_is_pickled(
        self, store: FeatureStore, reader: FeatureStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_arguments: Any, **_options: Any) -> NoReturn:
            raise AssertionError("a feature was pickled")

        for module, name in (
            (pickle, "dump"),
            (pickle, "dumps"),
            (pickle, "load"),
            (pickle, "loads"),
            (pickle, "Pickler"),
            (pickle, "Unpickler"),
            (torch, "save"),
            (torch, "load"),
        ):
            monkeypatch.setattr(module, name, refuse)
        ref = put_one(store, "a", {"x": torch.ones(3), "y": Columns((torch.ones(2, 2),), "bfloat16")})
        assert reader.live([ref]) == [True]
        [(tensors, handle)] = reader.get([ref])
        assert_same_bits(tensors, {"x": torch.ones(3), "y": torch.ones(2, 2, dtype=torch.bfloat16)})
        reader.release([handle])
        assert reader.stored() == [("a", 1)]
        reader.abort([("a", 1)])
        store.gc()

    @pytest.mark.full
    def test_tensor_of_more_than_2_gib(self) -> None:
        num_bytes = (1 << 31) + 100
        if self.room(num_bytes + CAPACITY) < num_bytes + CAPACITY:
            pytest.skip(f"needs {num_bytes + CAPACITY:,} bytes where the store keeps features")
        with closing(self.make_large_store(num_bytes)) as store, closing(self.make_reader(store)) as reader:
            # The source costs one byte, however large it is.
            large = torch.tensor([7], dtype=torch.uint8).expand(num_bytes)
            ref = put_one(store, "a", {"before": torch.ones(3), "large": large, "after": torch.arange(5)})
            [(tensors, handle)] = reader.get([ref])
            assert tensors["large"].shape == (num_bytes,)
            assert all(bool((piece == 7).all()) for piece in tensors["large"].split(1 << 26))
            assert_same_bits({"after": tensors["after"]}, {"after": torch.arange(5)})
            reader.release([handle])
            reader.abort([("a", 1)])
            assert store.health().live_bytes == 0

    def test_specs_are_the_contracts_layout(self, store: FeatureStore) -> None:
        [stored] = store.put([PutRequest("a", 1, {"x": torch.ones(3), "y": torch.ones(2, 2, dtype=torch.int64)})])
        assert stored.store == store.name
        assert stored.features == (
            FeatureSpec("x", "float32", (3,), 0),
            FeatureSpec("y", "int64", (2, 2), ALIGNMENT),
        )
        assert stored.num_bytes == 2 * ALIGNMENT

    def test_dtype_that_may_not_travel_is_refused(self, store: FeatureStore) -> None:
        with pytest.raises(FeatureStoreError, match="complex64"):
            put_one(store, "a", {"x": torch.ones(2, dtype=torch.complex64)})
        assert store.health().num_samples == 0

    def test_batch_equals_single_calls(self, store: FeatureStore, reader: FeatureStore) -> None:
        samples = {f"s{index}": filled(100 + index, index) for index in range(5)}
        stored = store.put([PutRequest(name, 1, tensors) for name, tensors in samples.items()])
        batch = [make_ref(name, 1, item) for name, item in zip(samples, stored, strict=True)]
        single = [put_one(store, name, tensors, generation=2) for name, tensors in samples.items()]
        together = reader.get(batch)
        one_by_one = [reader.get([ref])[0] for ref in single]
        for (got, _), (other, _), tensors in zip(together, one_by_one, samples.values(), strict=True):
            assert_same_bits(got, tensors)
            assert_same_bits(other, tensors)
        reader.release([handle for _, handle in together + one_by_one])
        reader.abort([(name, 1) for name in samples])
        for name in samples:
            reader.abort([(name, 2)])
        for ref in batch + single:
            with pytest.raises(FeatureNotFound):
                reader.get([ref])

    def test_batches_count_like_single_calls(self, store: FeatureStore, reader: FeatureStore) -> None:
        names = ["a", "b", "c"]

        def counts() -> tuple[int, int, int]:
            return store.health().live_bytes, store.health().num_samples, self.num_handles(store, reader)

        refs = [put_one(store, name, filled(640, 1)) for name in names]
        after_puts = counts()
        handles = [reader.get([ref])[0][1] for ref in refs]
        after_gets = counts()
        for name in names:
            reader.abort([(name, 1)])
        after_aborts = counts()
        for handle in handles:
            reader.release([handle])
        assert after_puts == (3 * 640, 3, 0)
        assert after_gets == (3 * 640, 3, 3)
        assert after_aborts == (self.held(3 * 640), 0, 3)
        assert counts() == (0, 0, 0)

        stored = store.put([PutRequest(name, 2, filled(640, 1)) for name in names])
        assert counts() == after_puts
        lent = reader.get([make_ref(name, 2, item) for name, item in zip(names, stored, strict=True)])
        assert counts() == after_gets
        reader.abort([(name, 2) for name in names for _ in range(2)])
        assert counts() == after_aborts
        reader.release([handle for _, handle in lent for _ in range(2)])
        assert counts() == (0, 0, 0)

    def test_empty_batches_do_nothing(self, store: FeatureStore, reader: FeatureStore) -> None:
        assert store.put([]) == []
        assert reader.get([]) == []
        reader.release([])
        reader.abort([])

    # Generations and aborts

    def test_second_put_of_a_live_generation_is_refused(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", filled(64, 1))
        with pytest.raises(FeatureStoreError, match="'a'"):
            store.put([PutRequest("b", 1, filled(64, 2)), PutRequest("a", 1, filled(64, 3))])
        with pytest.raises(FeatureStoreError, match="'c'"):
            store.put([PutRequest("c", 1, filled(64, 2)), PutRequest("c", 1, filled(64, 2))])
        assert store.health().num_samples == 1
        [(tensors, handle)] = reader.get([ref])
        assert_same_bits(tensors, filled(64, 1))
        reader.release([handle])

    def test_stale_ref_never_reads_the_newer_generation(self, store: FeatureStore, reader: FeatureStore) -> None:
        stale = put_one(store, "a", filled(64, 1), generation=1)
        store.abort([("a", 1)])
        fresh = put_one(store, "a", filled(64, 2), generation=2)
        with pytest.raises(FeatureNotFound, match="'a'"):
            reader.get([stale])
        with pytest.raises(FeatureNotFound):
            reader.get([make_ref("a", 1, StoredFeatures(fresh.store, fresh.key, fresh.num_bytes, fresh.features))])
        with pytest.raises(FeatureNotFound):
            reader.get([make_ref("b", 2, StoredFeatures(fresh.store, fresh.key, fresh.num_bytes, fresh.features))])
        [(tensors, handle)] = reader.get([fresh])
        assert_same_bits(tensors, filled(64, 2))
        reader.release([handle])

    def test_two_generations_of_a_sample_are_freed_apart(self, store: FeatureStore, reader: FeatureStore) -> None:
        put_one(store, "a", filled(64, 1), generation=1)
        second = put_one(store, "a", filled(64, 2), generation=2)
        reader.abort([("a", 1)])
        [(tensors, handle)] = reader.get([second])
        assert_same_bits(tensors, filled(64, 2))
        reader.release([handle])

    def test_abort_before_put_makes_the_put_unreadable(self, store: FeatureStore, reader: FeatureStore) -> None:
        store.abort([("a", 1)])
        ref = put_one(store, "a", filled(64, 1))
        with pytest.raises(FeatureNotFound):
            reader.get([ref])
        assert store.health() == StoreHealth(store.health().capacity_bytes, 0, 0, 0)
        [(_, handle)] = reader.get([put_one(store, "a", filled(64, 1), generation=2)])
        reader.release([handle])

    def test_abort_of_the_reader_is_final_for_everybody(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", filled(64, 1))
        reader.abort([("a", 1), ("never put", 7)])
        for side in (reader, store):
            with pytest.raises(FeatureNotFound):
                side.get([ref])
        assert store.health().live_bytes == 0
        reader.abort([("a", 1)])

    def test_abort_under_a_handle_frees_the_bytes_with_the_release(
        self, store: FeatureStore, reader: FeatureStore
    ) -> None:
        ref = put_one(store, "a", filled(LARGEST, 7))
        [(tensors, handle)] = reader.get([ref])
        store.abort([("a", 1)])
        with pytest.raises(FeatureNotFound):
            reader.get([ref])
        assert store.health().num_samples == 0
        assert store.health().live_bytes == self.held(LARGEST)
        refs = _fill_up(store)
        assert len(refs) < 64 or not self.handles_hold_bytes
        assert_same_bits(tensors, filled(LARGEST, 7))
        reader.release([handle])
        assert store.health().live_bytes == LARGEST * len(refs)
        if not self.handles_hold_bytes:
            store.abort([("fill0", 1)])
        put_one(store, "next", filled(LARGEST, 8))

    def test_new_generation_is_untouched_by_a_pending_free(self, store: FeatureStore, reader: FeatureStore) -> None:
        [(old, old_handle)] = reader.get([put_one(store, "a", filled(640, 1), generation=1)])
        reader.abort([("a", 1)])
        fresh = put_one(store, "a", filled(640, 2), generation=2)
        reader.release([old_handle])
        del old
        put_one(store, "b", filled(640, 3))
        [(tensors, handle)] = reader.get([fresh])
        assert_same_bits(tensors, filled(640, 2))
        reader.release([handle])

    def test_bytes_of_a_new_generation_outlive_every_late_free_of_the_old_one(
        self, store: FeatureStore, reader: FeatureStore, second_reader: FeatureStore
    ) -> None:
        old = put_one(store, "a", filled(640, 1), generation=1)
        lent = [(side, *side.get([old])[0]) for side in (reader, second_reader)]
        store.abort([("a", 1)])
        fresh = put_one(store, "a", filled(640, 2), generation=2)
        for index, (side, tensors, handle) in enumerate(lent):
            assert_same_bits(tensors, filled(640, 1))
            side.release([handle])
            side.abort([("a", 1)])
            store.gc()
            put_one(store, f"other{index}", filled(640, 3 + index))
            [(got, fresh_handle)] = reader.get([fresh])
            assert_same_bits(got, filled(640, 2))
            reader.release([fresh_handle])

    def test_reader_that_read_a_sample_before_sees_the_abort_of_another(
        self, store: FeatureStore, reader: FeatureStore, second_reader: FeatureStore
    ) -> None:
        refs = [put_one(store, name, filled(640, 1)) for name in "ab"]
        reader.release([handle for _, handle in reader.get(refs)])
        second_reader.abort([("a", 1)])
        for side in (reader, second_reader, store):
            assert side.live(refs) == [False, True]
            with pytest.raises(FeatureNotFound, match="'a'"):
                side.get(refs)
        assert self.num_handles(store, reader, second_reader) == 0

    def test_sample_is_consumed_once_and_a_reader_that_has_it_keeps_its_bytes(
        self, store: FeatureStore, reader: FeatureStore, second_reader: FeatureStore
    ) -> None:
        ref = put_one(store, "a", filled(LARGEST, 9))
        [(kept, kept_handle)] = second_reader.get([ref])
        [(tensors, handle)] = reader.get([ref])
        assert_same_bits(tensors, filled(LARGEST, 9))
        reader.release([handle])
        reader.abort([("a", 1)])
        for side in (reader, second_reader, store):
            with pytest.raises(FeatureNotFound, match="'a'"):
                side.get([ref])
        _fill_up(store)
        assert_same_bits(kept, filled(LARGEST, 9))
        second_reader.release([kept_handle])
        assert self.num_handles(store, reader, second_reader) == 0

    def test_second_handle_keeps_the_bytes(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", filled(640, 1))
        [(_, first)], [(tensors, second)] = reader.get([ref]), reader.get([ref])
        reader.abort([("a", 1)])
        reader.release([first])
        reader.release([first])
        assert self.num_handles(store, reader) == 1
        assert store.health().live_bytes == self.held(640)
        assert_same_bits(tensors, filled(640, 1))
        reader.release([second])
        assert store.health().live_bytes == 0

    def test_release_of_an_unknown_handle_does_nothing(self, store: FeatureStore, reader: FeatureStore) -> None:
        reader.release([FeatureHandle(store.name, "a", 1, 123_456)])
        assert self.num_handles(store, reader) == 0

    # What is there

    def test_live_says_what_a_get_would_find_and_keeps_no_handle(
        self, store: FeatureStore, reader: FeatureStore
    ) -> None:
        refs = [put_one(store, name, filled(64, 1)) for name in "abc"]
        held = reader.get(refs[2:])
        store.abort([("a", 1)])
        reader.abort([("c", 1)])
        fresh = put_one(store, "a", filled(64, 2), generation=2)
        for side in (reader, store):
            assert side.live([*refs, fresh]) == [False, True, False, True]
            assert side.live([]) == []
        reader.release([handle for _, handle in held])
        assert self.num_handles(store, reader) == 0
        assert reader.live(refs) == [False, True, False]

    def test_ref_that_lies_is_not_live(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", {"x": torch.ones(16)})
        for lie in (
            make_ref("b", 1, StoredFeatures(ref.store, ref.key, ref.num_bytes, ref.features)),
            make_ref("a", 2, StoredFeatures(ref.store, ref.key, ref.num_bytes, ref.features)),
            make_ref("a", 1, StoredFeatures("elsewhere", ref.key, ref.num_bytes, ref.features)),
            make_ref("a", 1, StoredFeatures(ref.store, ref.key, 2 * ref.num_bytes, ref.features)),
            altered(ref, (FeatureSpec("x", "float32", (17,), 0),)),
        ):
            assert reader.live([ref, lie]) == [True, False]
        assert self.num_handles(store, reader) == 0

    def test_stored_lists_what_is_readable_and_nothing_else(self, store: FeatureStore, reader: FeatureStore) -> None:
        assert reader.stored() == store.stored() == []
        names = ["a", "ü" * 100, "a sample/with.every:thing-%d", ""]
        refs = [put_one(store, name, filled(64, 1), generation=index) for index, name in enumerate(names)]
        put_one(store, "a", filled(64, 1), generation=7)
        pairs = [(name, index) for index, name in enumerate(names)] + [("a", 7)]
        assert sorted(reader.stored()) == sorted(store.stored()) == sorted(pairs)
        [(_, handle)] = reader.get(refs[:1])
        reader.abort(pairs[:2])
        store.abort(pairs[2:3])
        assert sorted(reader.stored()) == sorted(store.stored()) == sorted(pairs[3:])
        reader.release([handle])
        with pytest.raises(FeatureStoreError):
            put_one(store, "a", filled(64, 1), generation=7)
        assert sorted(reader.stored()) == sorted(pairs[3:])
        reader.abort(pairs[3:])
        assert reader.stored() == store.stored() == []

    def test_put_after_its_abort_is_not_stored(self, store: FeatureStore, reader: FeatureStore) -> None:
        store.abort([("a", 1)])
        ref = put_one(store, "a", filled(64, 1))
        assert reader.stored() == []
        assert reader.live([ref]) == [False]

    def test_gc_frees_nothing_that_is_readable_or_held(self, store: FeatureStore, reader: FeatureStore) -> None:
        first, second = (put_one(store, name, filled(LARGEST, 5)) for name in "ab")
        [(tensors, handle)] = reader.get([first])
        reader.abort([("a", 1)])
        store.gc()
        reader.gc()
        assert reader.stored() == [("b", 1)]
        assert store.health().live_bytes == LARGEST + self.held(LARGEST)
        assert_same_bits(tensors, filled(LARGEST, 5))
        reader.release([handle])
        [(tensors, handle)] = reader.get([second])
        assert_same_bits(tensors, filled(LARGEST, 5))
        reader.release([handle])

    # References that lie

    def test_failed_batch_get_keeps_no_handle(self, store: FeatureStore, reader: FeatureStore) -> None:
        good = put_one(store, "a", filled(64, 1))
        gone = put_one(store, "b", filled(64, 1))
        store.abort([("b", 1)])
        with pytest.raises(FeatureNotFound, match="'b'"):
            reader.get([good, gone])
        assert self.num_handles(store, reader) == 0

    def test_ref_of_another_shape_is_corrupt(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", {"x": torch.ones(16)})
        for spec in (
            FeatureSpec("x", "float32", (17,), 0),
            FeatureSpec("x", "float32", (16,), 64),
            FeatureSpec("x", "float32", (1,), -64),
        ):
            with pytest.raises(CorruptFeature, match="'a'"):
                reader.get([altered(ref, (spec,))])
        stored = StoredFeatures(ref.store, ref.key, 2 * ref.num_bytes, ref.features)
        with pytest.raises(CorruptFeature, match="'a'"):
            reader.get([make_ref("a", 1, stored)])
        assert self.num_handles(store, reader) == 0

    def test_bytes_that_are_short_are_an_error(self, store: FeatureStore, reader: FeatureStore) -> None:
        whole, torn = (put_one(store, name, {"x": torch.ones(300), "y": torch.ones(300)}) for name in ("whole", "torn"))
        reason = self.truncate(store, torn)
        if reason is not None:
            assert reason
            return
        with pytest.raises((CorruptFeature, FeatureNotFound), match="torn"):
            reader.get([whole, torn])
        assert reader.live([whole, torn]) == [True, False]
        assert self.num_handles(store, reader) == 0
        reader.abort([("torn", 1)])
        [(tensors, handle)] = reader.get([whole])
        assert_same_bits(tensors, {"x": torch.ones(300), "y": torch.ones(300)})
        reader.release([handle])

    def test_put_that_fails_half_way_leaves_nothing_readable(self, store: FeatureStore, reader: FeatureStore) -> None:
        # Two parts of different lengths: found out when the second sample of the batch is copied.
        broken = Columns((torch.ones(4, 2), torch.ones(3, 2)), "float32")
        with pytest.raises(RuntimeError):
            store.put([PutRequest("a", 1, filled(640, 1)), PutRequest("b", 1, {"x": torch.ones(3), "y": broken})])
        assert reader.stored() == store.stored() == []
        store.abort([("a", 1), ("b", 1)])
        assert store.health() == StoreHealth(store.health().capacity_bytes, 0, 0, 0)
        [(tensors, handle)] = reader.get([put_one(store, "b", filled(640, 2), generation=2)])
        assert_same_bits(tensors, filled(640, 2))
        reader.release([handle])

    def test_ref_of_another_store_is_not_found(self, store: FeatureStore, reader: FeatureStore) -> None:
        ref = put_one(store, "a", filled(64, 1))
        with pytest.raises(FeatureNotFound):
            reader.get([make_ref("a", 1, StoredFeatures("elsewhere", ref.key, ref.num_bytes, ref.features))])

    # Room

    def test_put_over_budget_shows_nothing_and_succeeds_after_a_free(
        self, store: FeatureStore, reader: FeatureStore
    ) -> None:
        refs = _fill_up(store)
        assert LARGEST * (len(refs) + 1) > 0.75 * CAPACITY
        before = store.health()
        with pytest.raises(FeatureStoreFull):
            store.put([PutRequest(f"more{index}", 1, filled(LARGEST, index)) for index in range(3)])
        assert store.health() == before
        reader.abort([(ref.sample_id, ref.generation) for ref in refs[:3]])
        store.put([PutRequest(f"more{index}", 1, filled(LARGEST, index)) for index in range(3)])

    def test_sample_that_can_never_fit_is_another_error(self, store: FeatureStore) -> None:
        with pytest.raises(FeatureTooLarge, match="'b'"):
            store.put([PutRequest("a", 1, filled(64, 1)), PutRequest("b", 1, filled(CAPACITY + 1, 1))])
        assert store.health().num_samples == 0

    def test_no_put_is_refused_while_at_most_three_quarters_are_live(
        self, store: FeatureStore, reader: FeatureStore
    ) -> None:
        draw = random.Random(5)  # noqa: S311 (a seed, not a secret)
        live: list[tuple[SampleRef, int]] = []
        for cycle in range(self.num_cycles):
            while live and sum(ref.num_bytes for ref, _ in live) > 0.75 * CAPACITY:
                ref, value = live.pop(draw.randrange(len(live)))
                [(tensors, handle)] = reader.get([ref])
                assert bool((tensors["x"] == value).all())
                reader.release([handle])
                reader.abort([(ref.sample_id, 1)])
            # Half the samples are close to the largest, the others go down to a few bytes.
            scale = draw.choice((1.0, 2.0 ** -draw.randrange(9)))
            size = max(1, int(LARGEST * scale * draw.uniform(0.5, 1.0)))
            ref = put_one(store, f"s{cycle}", filled(size, cycle))
            live.append((ref, cycle % 251))
        assert store.health().live_bytes == sum(ref.num_bytes for ref, _ in live)
        for ref, value in live:
            [(tensors, handle)] = reader.get([ref])
            assert bool((tensors["x"] == value).all())
            reader.release([handle])

    def test_health_returns_to_zero(self, store: FeatureStore, reader: FeatureStore) -> None:
        refs = [put_one(store, f"s{index}", filled(64 * (index + 1), index)) for index in range(10)]
        lent = reader.get(refs)
        health = store.health()
        assert (health.num_samples, self.num_handles(store, reader)) == (10, 10)
        assert health.live_bytes == sum(ref.num_bytes for ref in refs) <= health.capacity_bytes
        store.abort([(ref.sample_id, 1) for ref in refs[:5]])
        reader.abort([(ref.sample_id, 1) for ref in refs[5:]])
        reader.release([handle for _, handle in lent])
        assert store.gc() >= 0
        assert store.health() == StoreHealth(health.capacity_bytes, 0, 0, 0)

    # Several processes

    def test_readers_find_what_any_writer_put(
        self, store: FeatureStore, writer: FeatureStore, reader: FeatureStore
    ) -> None:
        refs = [
            put_one(side, f"s{index}", filled(100 + index, index))
            for index, side in enumerate((store, writer, store, writer))
        ]
        assert sorted(reader.stored()) == [(f"s{index}", 1) for index in range(4)]
        for index, (tensors, handle) in enumerate(reader.get(refs)):
            assert_same_bits(tensors, filled(100 + index, index))
            reader.release([handle])
        reader.abort([("s0", 1), ("s1", 1)])
        assert reader.live(refs) == [False, False, True, True]
        # A writer frees what another one put.
        store.abort([("s3", 1)])
        writer.abort([("s2", 1)])
        assert reader.live(refs) == [False] * 4
        assert store.health().num_samples == writer.health().num_samples == 0
        assert store.health().live_bytes == writer.health().live_bytes == 0

    def test_generations_of_two_writers_are_told_apart(
        self, store: FeatureStore, writer: FeatureStore, reader: FeatureStore
    ) -> None:
        first = put_one(store, "a", filled(64, 1), generation=1)
        second = put_one(writer, "a", filled(64, 2), generation=2)
        writer.abort([("a", 1)])
        assert reader.live([first, second]) == [False, True]
        [(tensors, handle)] = reader.get([second])
        assert_same_bits(tensors, filled(64, 2))
        reader.release([handle])

    # Life cycle

    def test_readers_and_a_writer_in_threads_see_whole_samples(self, store: FeatureStore, reader: FeatureStore) -> None:
        errors: list[BaseException] = []
        queue: list[SampleRef] = []
        arrived = threading.Condition()

        def read() -> None:
            try:
                for _ in range(100):
                    with arrived:
                        assert arrived.wait_for(lambda: queue, timeout=60)
                        ref = queue.pop(0)
                    [(tensors, handle)] = reader.get([ref])
                    assert bool((tensors["x"] == int(ref.sample_id) % 251).all())
                    reader.release([handle])
                    reader.abort([(ref.sample_id, 1)])
            except BaseException as error:  # noqa: BLE001 (the thread's boundary)
                errors.append(error)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        for index in range(200):
            ref = put_one(store, str(index), filled(1000 + index, index))
            with arrived:
                queue.append(ref)
                arrived.notify()
        for thread in threads:
            thread.join()
        assert errors == []
        assert store.health().live_bytes == 0

    def test_close_is_idempotent_and_ends_puts(self, store: FeatureStore) -> None:
        put_one(store, "a", filled(64, 1))
        store.close()
        store.close()
        with pytest.raises(FeatureStoreError):
            put_one(store, "b", filled(64, 1))


def _fill_up(store: FeatureStore) -> list[SampleRef]:
    """Put samples of the largest size until the store is full."""
    refs: list[SampleRef] = []
    for index in range(65):
        try:
            refs.append(put_one(store, f"fill{index}", filled(LARGEST, index)))
        except FeatureStoreFull:
            return refs
    raise AssertionError("the store took more than its capacity")
