"""How often a feature's bytes are written on their way: once by the put, never by the get, once into the batch.

Every operation of PyTorch is seen, with the bytes that it writes and those that it allocates. What an operation would
allocate inside itself is seen by the profiler.
"""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.data_plane.base import PutRequest
from specforge.data_plane.encoding import encoded
from specforge.data_plane.loader import FeatureDataLoader, LoaderSettings, step_bytes
from specforge.data_plane.local import LocalFeatureStore
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore

NUM_TOKENS, WIDTH, NUM_LAYERS = 24, 64, 3
IDS_BYTES = 4 * NUM_TOKENS
VALUES = NUM_TOKENS * WIDTH * (NUM_LAYERS + 1)
CAST = {"bfloat16": 2, "float32": 4}


class Traffic(TorchDispatchMode):
    """Bytes written and allocated by each operation inside the block; views do neither."""

    def __init__(self):
        super().__init__()
        self.written = Counter()
        self.allocated = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        storages = {value.untyped_storage().data_ptr() for value in inputs}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                if value.untyped_storage().data_ptr() not in storages:
                    self.allocated[name] += value.nbytes
                elif func._schema.is_mutable:
                    self.written[name] += value.nbytes
        return result


def inner_allocations(action):
    """Bytes of host memory that operations of ``action`` take for themselves."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    return sum(max(0, event.self_cpu_memory_usage) for event in seen.events())


def layers_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(NUM_TOKENS, WIDTH, generator=generator) for _ in range(NUM_LAYERS + 1)]


def sources_of(dtype, seed=0):
    """What an engine that computes in fp32 gives."""
    *aux, last = layers_of(seed)
    ids = torch.arange(NUM_TOKENS, dtype=torch.int32)
    return {"input_ids": ids, **encoded("aux", aux, dtype), **encoded("last", [last], dtype)}


def ref_of(stored, name="a"):
    place = stored.store, stored.key, stored.num_bytes, stored.features
    return SampleRef(name, 1, NUM_TOKENS, ((1, NUM_TOKENS),), *place, "target", "capture", "worker")


def put(store, sources, name="a"):
    [stored] = store.put([PutRequest(name, 1, sources)])
    return ref_of(stored, name)


@pytest.fixture
def arena():
    with tempfile.TemporaryDirectory(prefix="specforge-test-", dir=SHARED_MEMORY) as directory:
        store = SharedMemoryFeatureStore.create("copies", 1 << 24, 64, Path(directory))
        yield store
        store.close()


def test_what_counts_bytes_sees_joins_and_casts():
    layers = layers_of()
    joined = VALUES * 4
    with Traffic() as traffic:
        torch.cat(layers, dim=1).to(torch.bfloat16)
        layers[0][:, :4].copy_(layers[1][:, :4])
        layers[0].view(-1)[3:].view(torch.uint8)
    assert traffic.allocated == {"cat": joined, "_to_copy": joined // 2}
    assert traffic.written == {"copy_": NUM_TOKENS * 4 * 4}
    assert inner_allocations(lambda: torch.cat(layers, dim=1)) >= joined


@pytest.mark.parametrize("dtype", CAST)
def test_a_put_into_shared_memory_writes_every_byte_once_and_allocates_nothing(arena, dtype):
    """Layers joined and, for bfloat16, cast on the way."""
    sources = sources_of(dtype)
    with Traffic() as traffic:
        put(arena, sources)
    assert traffic.written == {"copy_": IDS_BYTES + VALUES * CAST[dtype]}
    assert not traffic.allocated
    assert inner_allocations(lambda: put(arena, sources, "b")) == 0


def test_a_put_of_float8_writes_every_byte_once_and_allocates_nothing(arena):
    sources = sources_of("float8_e4m3fn")
    with Traffic() as traffic:
        put(arena, sources)
    assert traffic.written == {"copy_": IDS_BYTES + VALUES + 4 * NUM_TOKENS * (NUM_LAYERS + 1)}
    assert not traffic.allocated


@pytest.mark.parametrize("dtype", [*CAST, "float8_e4m3fn"])
def test_a_get_from_shared_memory_writes_and_allocates_nothing(arena, dtype):
    ref = put(arena, sources_of(dtype))
    with Traffic() as traffic:
        [(tensors, handle)] = arena.get([ref])
    assert not traffic.written
    assert not traffic.allocated
    [region] = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(SHARED_MEMORY) in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
    for tensor in tensors.values():
        assert any(first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end for first, end in ranges)
    assert any(first <= region < end for first, end in ranges)
    del tensors, tensor
    arena.release([handle])


@pytest.mark.parametrize("dtype", CAST)
def test_a_local_store_joins_and_casts_once(dtype):
    store, sources = LocalFeatureStore(), sources_of(dtype)
    with Traffic() as traffic:
        ref = put(store, sources)
    joined = VALUES * CAST[dtype]
    if dtype == "float32":
        # ``last`` is one layer in fp32 already
        joined -= 4 * NUM_TOKENS * WIDTH
    assert traffic.written == {"copy_": joined}
    assert traffic.allocated == {"empty": joined}
    with Traffic() as traffic:
        store.get([ref])
    assert not traffic.written
    assert not traffic.allocated


def test_a_local_store_keeps_plain_tensors_by_reference():
    store = LocalFeatureStore()
    sources = {"input_ids": torch.arange(4, dtype=torch.int32), "aux": torch.ones(4, 8)}
    with Traffic() as traffic:
        [stored] = store.put([PutRequest("a", 1, sources)])
        [(tensors, _)] = store.get([ref_of(stored)])
    assert not traffic.written
    assert not traffic.allocated
    assert all(tensors[name].data_ptr() == sources[name].data_ptr() for name in sources)


@pytest.mark.parametrize("make_store", ["local", "arena"])
@pytest.mark.parametrize("dtype", CAST)
def test_packing_writes_every_byte_of_a_batch_once(request, make_store, dtype):
    store = LocalFeatureStore() if make_store == "local" else request.getfixturevalue("arena")
    refs = [put(store, sources_of(dtype, seed), f"s{seed}") for seed in range(3)]
    loader = load(store, refs)
    with Traffic() as traffic:
        step = next(loader)
    assert len(step.micro_batches) == 1
    features = 3 * VALUES * CAST[dtype]
    ids = 3 * NUM_TOKENS * 8
    assert traffic.allocated == {"empty": step_bytes(step)}
    assert traffic.written["copy_"] == features + ids
    assert step_bytes(step) == features + 3 * ids + 3 * NUM_TOKENS


def test_packing_float8_writes_every_value_of_the_batch_once(arena):
    refs = [put(arena, sources_of("float8_e4m3fn", seed), f"s{seed}") for seed in range(3)]
    loader = load(arena, refs)
    with Traffic() as traffic:
        step = next(loader)
    assert traffic.written["copy_"] == 3 * (2 * VALUES + 8 * NUM_TOKENS)
    assert traffic.allocated["empty"] == step_bytes(step)


def load(store, refs):
    class Listed:
        def __init__(self):
            self.items = [SlotRef(Slot(0, position), ref) for position, ref in enumerate(refs)]

        def get(self, max_slots):
            taken, self.items = self.items[:max_slots], self.items[max_slots:]
            return taken

    return FeatureDataLoader(Listed(), store, LoaderSettings(len(refs), 10**6, 100))
