import dataclasses

import pytest
import torch

from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.data_plane.base import PutRequest
from specforge.data_plane.encoding import decode, encoded
from specforge.data_plane.loader import FeatureDataLoader, LoaderSettings, step_bytes
from specforge.data_plane.local import LocalFeatureStore
from specforge.errors import ContractError, FeatureNotFound

SETTINGS = LoaderSettings(
    global_batch_size=4, max_tokens=8, num_samples=100, capture_fingerprint="capture", target_revision="target"
)
ONES = torch.ones(3, 2)
LENGTHS = [3, 5, 4, 2, 6, 1, 8, 7, 2, 3, 3, 1, 8, 4, 5, 2, 2, 6, 1, 7, 3]


class ListedRefs:
    def __init__(self, refs):
        self.refs = list(refs)

    def get(self, max_slots):
        taken, self.refs = self.refs[:max_slots], self.refs[max_slots:]
        return taken


def tensors_of(index, num_tokens):
    generator = torch.Generator().manual_seed(index)
    return {
        "input_ids": torch.randint(1000, (num_tokens,), dtype=torch.int32, generator=generator),
        "aux": torch.randn(num_tokens, 6, generator=generator).to(torch.bfloat16),
        "last": torch.randn(num_tokens, 2, generator=generator),
    }


def layers_of(index, num_tokens):
    """Two captured layers [S, 6] in fp32."""
    generator = torch.Generator().manual_seed(index)
    return [100**layer * torch.randn(num_tokens, 6, generator=generator) for layer in range(2)]


def stored_as(dtype):
    """What an engine gives for a capture in ``dtype``."""

    def sources_of(index, num_tokens):
        layers = layers_of(index, num_tokens)
        ids = {"input_ids": torch.arange(num_tokens, dtype=torch.int32)}
        return ids | encoded("aux", layers, dtype) | encoded("last", layers[:1], dtype)

    return sources_of


def put_samples(store, lengths, sources_of=tensors_of):
    items = []
    for index, length in enumerate(lengths):
        [stored] = store.put([PutRequest(f"s{index}", 1, sources_of(index, length))])
        ref = SampleRef(
            f"s{index}",
            1,
            length,
            ((1, length),) if length > 1 else (),
            stored.store,
            stored.key,
            stored.num_bytes,
            stored.features,
            "target",
            "capture",
            "worker",
        )
        items.append(SlotRef(Slot(0, index), ref))
    return items


def load(items, store, **changes):
    return FeatureDataLoader(ListedRefs(items), store, dataclasses.replace(SETTINGS, **changes))


def test_batch_holds_each_sample_at_its_place():
    store = LocalFeatureStore()
    items = put_samples(store, [3, 5, 4, 2])
    [step] = list(load(items, store))
    assert step.slots == tuple(item.slot for item in items)
    assert [batch.sample_ids for batch in step.micro_batches] == [("s0", "s1"), ("s2", "s3")]
    for batch in step.micro_batches:
        start = 0
        for document, (name, length) in enumerate(zip(batch.sample_ids, batch.lengths, strict=True)):
            expected = tensors_of(int(name[1:]), length)
            rows = slice(start, start + length)
            assert torch.equal(batch.input_ids[rows], expected["input_ids"].long())
            assert torch.equal(batch.features["aux"][rows], expected["aux"])
            assert torch.equal(batch.features["last"][rows], expected["last"])
            assert batch.position_ids[rows].tolist() == list(range(length))
            assert batch.document_ids[rows].tolist() == [document] * length
            assert batch.loss_mask[rows].tolist() == [False] + [True] * (length - 1)
            start += length
        assert start == len(batch.input_ids) == len(batch.loss_mask)
        assert batch.loss_mask.dtype == torch.bool
        assert batch.slots == tuple(Slot(0, int(name[1:])) for name in batch.sample_ids)


def test_claims_end_with_the_packing_and_batches_own_their_bytes():
    store = LocalFeatureStore()
    [step] = list(load(put_samples(store, [3]), store))
    assert store.health().num_handles == 0
    [batch] = step.micro_batches
    copied = batch.features["aux"].clone()
    store.abort([("s0", 1)])
    assert torch.equal(batch.features["aux"], copied)


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("num_items", [21, 17])
def test_ranks_part_each_step_by_position_and_run_alike(world_size, num_items):
    # The last of the steps has 1 slot: fewer than there are ranks, but for one.
    store = LocalFeatureStore()
    items = put_samples(store, LENGTHS[:num_items])
    ranks = [list(load(items, store, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [len(step.slots) for step in ranks[0]] == [4] * (num_items // 4) + [1]
    for parts in zip(*ranks, strict=True):
        [slots], [num_slots] = {part.slots for part in parts}, {part.num_slots for part in parts}
        assert num_slots == slots[-1].position + 1
        [num_micro_batches] = {len(part.micro_batches) for part in parts}
        assert any(part.micro_batches[-1].slots for part in parts), "no rank needs the last micro-batch"
        for rank, part in enumerate(parts):
            mine = sorted(slot for batch in part.micro_batches for slot in batch.slots)
            assert tuple(mine) == slots[rank::world_size]
            assert len(part.micro_batches) == num_micro_batches >= 1
            for batch in part.micro_batches:
                assert len(batch.input_ids) == sum(batch.lengths) == batch.features["aux"].shape[0]


def trained_slots(items, store, settings, num_steps):
    """Slots that the ranks together train in up to ``num_steps`` steps, and the position after them."""
    world_size, position = settings["world_size"], settings["start_slot"]
    loaders = [load(items, store, rank=rank, **settings) for rank in range(world_size)]
    slots = []
    for _ in range(num_steps):
        parts = [next(loader, None) for loader in loaders]
        if parts[0] is None:
            break
        slots += sorted(slot for part in parts for batch in part.micro_batches for slot in batch.slots)
        [position] = {part.num_slots for part in parts}
    return slots, position


@pytest.mark.parametrize("after", range(1, 6))
@pytest.mark.parametrize("world_size", range(1, 6))
def test_stopping_after_any_step_and_resuming_at_another_world_size_skips_and_repeats_nothing(world_size, after):
    store = LocalFeatureStore()
    numbers = [number for number in range(30) if number % 7 != 3][: len(LENGTHS)]
    items = at_slots(put_samples(store, LENGTHS), numbers)
    common = {"num_samples": 10, "global_batch_size": 5}
    first, position = trained_slots(items, store, common | {"world_size": world_size, "start_slot": 0}, after)
    left = [item for item, number in zip(items, numbers, strict=True) if number >= position]
    for resumed_size in range(1, 6):
        settings = common | {"world_size": resumed_size, "start_slot": position}
        second, end = trained_slots(left, store, settings, len(items))
        assert first + second == [item.slot for item in items]
        assert end == numbers[-1] + 1


def test_empty_micro_batch_has_the_widths_of_the_window():
    store = LocalFeatureStore()
    [step] = list(load(put_samples(store, [8, 1, 8, 1]), store, rank=1, world_size=2))
    full, empty = step.micro_batches
    assert full.lengths == (1, 1)
    assert empty.lengths == empty.sample_ids == empty.slots == ()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.features.items()} == {
        "aux": ((0, 6), torch.bfloat16),
        "last": ((0, 2), torch.float32),
    }
    for name in ("input_ids", "loss_mask", "position_ids", "document_ids"):
        assert getattr(empty, name).shape == (0,)
        assert getattr(empty, name).dtype == getattr(full, name).dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batches_hold_the_captured_layers_joined_and_cast_to_the_stored_dtype(dtype):
    store = LocalFeatureStore()
    [step] = list(load(put_samples(store, [3, 5], stored_as(dtype)), store))
    [batch] = step.micro_batches
    joined = [torch.cat(layers_of(index, length), dim=1) for index, length in enumerate([3, 5])]
    assert torch.equal(batch.features["aux"], torch.cat(joined).to(getattr(torch, dtype)))
    assert torch.equal(batch.features["last"], batch.features["aux"][:, :6])


def test_float8_features_are_decoded_while_they_are_packed():
    store = LocalFeatureStore()
    items = put_samples(store, [3, 5, 4, 2], stored_as("float8_e4m3fn"))
    [step] = list(load(items, store))
    assert [batch.sample_ids for batch in step.micro_batches] == [("s0", "s1"), ("s2", "s3")]
    for batch in step.micro_batches:
        assert set(batch.features) == {"aux", "last"}
        start = 0
        for name, length in zip(batch.sample_ids, batch.lengths, strict=True):
            sources = stored_as("float8_e4m3fn")(int(name[1:]), length)
            for feature in ("aux", "last"):
                expected = torch.empty(length, 12 if feature == "aux" else 6, dtype=torch.bfloat16)
                decode(sources[feature], sources[f"{feature}_scale"], expected)
                assert torch.equal(batch.features[feature][start : start + length], expected)
            start += length


def test_float8_features_of_an_empty_micro_batch_are_bfloat16():
    store = LocalFeatureStore()
    items = put_samples(store, [8, 1, 8, 1], stored_as("float8_e4m3fn"))
    [step] = list(load(items, store, rank=1, world_size=2))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in step.micro_batches[1].features.items()} == {
        "aux": ((0, 12), torch.bfloat16),
        "last": ((0, 6), torch.bfloat16),
    }


@pytest.mark.parametrize("scales", [None, torch.ones(3, 5), torch.ones(3, 0), torch.ones(3, 2).bfloat16()])
def test_float8_features_without_their_scales_are_refused(scales):
    store = LocalFeatureStore()

    def sources_of(index, num_tokens):
        sources = stored_as("float8_e4m3fn")(index, num_tokens)
        del sources["aux_scale"]
        return sources if scales is None else sources | {"aux_scale": scales}

    with pytest.raises(ContractError, match=r"'s0'.*'aux' is float8_e4m3fn \[tokens, 12\] and needs .*'aux_scale'"):
        next(load(put_samples(store, [3], sources_of), store))


def test_a_feature_that_is_only_named_like_scales_is_an_ordinary_one():
    store = LocalFeatureStore()
    items = put_samples(store, [3], lambda *_: {"input_ids": torch.ones(3, dtype=torch.int32), "aux_scale": ONES})
    [step] = list(load(items, store))
    assert torch.equal(step.micro_batches[0].features["aux_scale"], ONES)


def test_bytes_of_a_step_are_those_of_its_tensors():
    store = LocalFeatureStore()
    [step] = list(load(put_samples(store, [3, 5, 4, 2]), store))
    assert step_bytes(step) == 14 * (3 * 8 + 1 + 6 * 2 + 2 * 4)


def test_seek_equals_reading_on_and_fetches_nothing():
    store = LocalFeatureStore()
    items = put_samples(store, [3, 5, 4, 2, 6, 1, 1])
    reference = load(items, store)
    next(reference)
    state = reference.state_dict()
    assert state == {"num_slots": 4}
    store.abort([(f"s{index}", 1) for index in range(4)])
    resumed = load(items, store)
    resumed.load_state_dict(state)
    [step], [other] = list(resumed), list(reference)
    assert step.slots == other.slots
    assert torch.equal(step.micro_batches[0].features["aux"], other.micro_batches[0].features["aux"])


def test_source_that_starts_at_the_checkpoint_loses_no_slot():
    store = LocalFeatureStore()
    items = put_samples(store, [3, 5, 4, 2, 6])
    resumed = load(items[4:], store, start_slot=4)
    resumed.load_state_dict({"num_slots": 4})
    assert [step.slots for step in resumed] == [(Slot(0, 4),)]


def at_slots(items, numbers, num_samples=10):
    return [SlotRef(Slot(*divmod(number, num_samples)), item.ref) for item, number in zip(items, numbers, strict=True)]


def test_position_of_a_step_covers_the_skipped_slots_of_all_epochs():
    store = LocalFeatureStore()
    items = at_slots(put_samples(store, [1] * 8), [0, 1, 3, 7, 9, 10, 14, 19])
    steps = list(load(items, store, global_batch_size=3, num_samples=10))
    assert [step.num_slots for step in steps] == [4, 11, 20]


def test_position_in_the_order_of_arrival_counts_slots():
    store = LocalFeatureStore()
    items = at_slots(put_samples(store, [1] * 7), [3, 1, 0, 9, 14, 2, 30])
    loader = load(items, store, global_batch_size=3, num_samples=10, in_order=False, start_slot=40)
    assert [step.num_slots for step in loader] == [43, 46, 47]


@pytest.mark.parametrize("numbers", [[0, 2, 1], [0, 1, 1], [4, 5, 6]])
def test_source_that_goes_back_or_repeats_is_refused_in_strict_order(numbers):
    store = LocalFeatureStore()
    loader = load(
        at_slots(put_samples(store, [1] * 3), numbers), store, num_samples=10, start_slot=5 * (numbers[0] == 4)
    )
    with pytest.raises(ContractError, match="strict order"):
        next(loader)


@pytest.mark.parametrize("num_slots", range(21))
def test_seek_over_skipped_slots_ends_exactly_there(num_slots):
    store = LocalFeatureStore()
    numbers = [0, 1, 3, 7, 9, 10, 14, 19, 20, 24]
    loader = load(at_slots(put_samples(store, [1] * 10), numbers), store, global_batch_size=3, num_samples=10)
    loader.seek(num_slots)
    assert loader.state_dict() == {"num_slots": num_slots}
    read = [10 * slot.epoch + slot.position for step in loader for slot in step.slots]
    assert read == [number for number in numbers if number >= num_slots]


def test_bad_state_is_refused():
    store = LocalFeatureStore()
    loader = load(put_samples(store, [3]), store)
    with pytest.raises(ContractError, match="num_slots"):
        loader.load_state_dict({"num_slots": 0, "epoch": 1})
    with pytest.raises(ContractError, match="ends at slot 1"):
        loader.seek(2)
    with pytest.raises(ContractError, match="cannot seek back"):
        loader.seek(0)


def test_features_that_are_gone_are_an_error_that_names_the_sample():
    store = LocalFeatureStore()
    items = put_samples(store, [3, 5])
    store.abort([("s1", 1)])
    with pytest.raises(FeatureNotFound, match=r"'s1'.*captured again"):
        next(load(items, store))
    assert store.health().num_handles == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capture_fingerprint": "other"}, "'s1'.*capture fingerprint 'capture'.*'other'"),
        ({"target_revision": "other"}, "'s1'.*target revision 'target'.*'other'"),
        ({"num_tokens": 4}, r"'s1'.*input_ids.*int32 \[4\]"),
        ({"loss_spans": ((2, 9),)}, "'s1'.*loss spans"),
        ({"loss_spans": ((2, 3), (1, 2))}, "'s1'.*loss spans"),
    ],
)
def test_sample_of_another_run_is_refused(changes, message):
    store = LocalFeatureStore()
    items = put_samples(store, [3, 5])
    items[1] = SlotRef(items[1].slot, dataclasses.replace(items[1].ref, **changes))
    with pytest.raises(ContractError, match=message):
        next(load(items, store))


@pytest.mark.parametrize(
    "tensors",
    [
        {"input_ids": torch.ones(3, dtype=torch.int32), "aux": torch.ones(3, 6)},
        {"input_ids": torch.ones(3, dtype=torch.int32), "aux": torch.ones(2, 6), "last": torch.ones(3, 2)},
        {"input_ids": torch.ones(3, dtype=torch.int64)},
        {"aux": torch.ones(3, 6)},
    ],
    ids=["dtype and names", "tokens", "id dtype", "no ids"],
)
def test_sample_with_other_features_is_refused(tensors):
    store = LocalFeatureStore()
    items = put_samples(store, [3])
    [stored] = store.put([PutRequest("odd", 1, tensors)])
    ref = dataclasses.replace(items[0].ref, sample_id="odd", features=stored.features, num_bytes=stored.num_bytes)
    with pytest.raises(ContractError, match="'odd'"):
        next(load([items[0], SlotRef(Slot(0, 1), ref)], store))
