"""The codec of every record, and the guard that keeps tensors out of metadata."""

import dataclasses
import json
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.codec import CODEC_VERSION, assert_no_tensors, dumps, from_json, loads, to_json
from specforge.contracts.features import ALIGNMENT, ITEM_BYTES, FeatureHandle, FeatureSpec, layout
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.contracts.tasks import PromptTask
from specforge.errors import ContractError

counts = st.integers(0, 2**53)
names = st.text(string.printable, max_size=12) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
numbers = st.floats(allow_nan=False, allow_infinity=False)
spans = st.lists(st.tuples(counts, counts), max_size=3).map(tuple)
features = st.builds(
    FeatureSpec, names, st.sampled_from(sorted(ITEM_BYTES)), st.lists(counts, max_size=3).map(tuple), counts
)
slots = st.builds(Slot, counts, counts)
refs = st.builds(
    SampleRef,
    sample_id=names,
    generation=counts,
    num_tokens=counts,
    loss_spans=spans,
    store=names,
    key=names,
    num_bytes=counts,
    features=st.lists(features, max_size=3).map(tuple),
    target_revision=names,
    capture_fingerprint=names,
    worker_id=names,
    draft_weight_version=counts,
)
targets = st.builds(
    TargetInfo,
    rope_scaling=st.none() | st.dictionaries(names, names | numbers, max_size=3),
    eos_token_ids=st.lists(counts, max_size=3).map(tuple),
    logit_softcap=st.none() | numbers,
    **dict.fromkeys(("path", "architecture", "model_type", "revision"), names),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "logit_scale"), numbers),
)
records = st.one_of(
    slots,
    features,
    refs,
    st.builds(SlotRef, slots, refs),
    st.builds(FeatureHandle, names, names, counts, counts),
    st.builds(PromptTask, names, counts, st.lists(counts).map(tuple), spans, st.dictionaries(names, names, max_size=3)),
    st.builds(CaptureSpec, st.lists(counts, max_size=4).map(tuple), st.booleans(), names),
    targets,
)

SLOT = {"type": "Slot", "v": CODEC_VERSION, "epoch": 1, "position": 2}


@given(records)
@settings(max_examples=300, deadline=None)
def test_every_record_survives_the_wire(record):
    text = dumps(record)
    again = loads(type(record), text)
    assert again == record
    assert dumps(again) == text
    assert from_json(type(record), json.loads(text)) == record


@given(records, st.data())
@settings(max_examples=150, deadline=None)
def test_missing_required_field_is_refused(record, data):
    payload = to_json(record)
    required = [
        field.name
        for field in dataclasses.fields(record)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    name = data.draw(st.sampled_from(required))
    del payload[name]
    with pytest.raises(ContractError, match=f"{name}' is missing"):
        from_json(type(record), payload)


@given(records)
@settings(max_examples=50, deadline=None)
def test_unknown_field_is_refused(record):
    with pytest.raises(ContractError, match="unknown field 'surprise'"):
        from_json(type(record), {**to_json(record), "surprise": 1})


@given(records, st.data())
@settings(max_examples=200, deadline=None)
def test_true_is_not_a_number_and_a_number_is_not_true(record, data):
    payload = to_json(record)
    fields = [name for name, value in payload.items() if type(value) in {int, bool, float} and name != "v"]
    if not fields:
        return
    name = data.draw(st.sampled_from(fields))
    with pytest.raises(ContractError, match=name):
        from_json(type(record), {**payload, name: 1 if isinstance(payload[name], bool) else True})


@pytest.mark.parametrize("version", [None, 0, CODEC_VERSION + 1, "1"])
def test_other_version_is_refused(version):
    with pytest.raises(ContractError, match="version"):
        from_json(Slot, {**SLOT, "v": version})


@pytest.mark.parametrize("kind", [None, "SlotRef", "Slots", 3])
def test_other_type_is_refused(kind):
    with pytest.raises(ContractError, match="expected a record of type Slot"):
        from_json(Slot, {**SLOT, "type": kind})


@pytest.mark.parametrize("payload", [None, [], "Slot", 3])
def test_payload_that_is_no_object_is_refused(payload):
    with pytest.raises(ContractError, match="expected a JSON object"):
        from_json(Slot, payload)


@pytest.mark.parametrize("text", ["", "{", b"\xff", "nul"])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(ContractError):
        loads(Slot, text)


@pytest.mark.parametrize("position", [1.0, "1", None, [1], {"a": 1}])
def test_field_of_another_type_is_refused(position):
    with pytest.raises(ContractError, match=r"Slot\.position: expected a valid integer, got"):
        from_json(Slot, {**SLOT, "position": position})


@pytest.mark.parametrize("wrong", [[[1]], [[1, 2, 3]], [1], [["a", 2]], [[1, True]], "ab", None])
def test_span_of_another_shape_is_refused(wrong):
    payload = to_json(PromptTask("a", 0, (1, 2), ((0, 1),)))
    with pytest.raises(ContractError, match="loss_spans"):
        from_json(PromptTask, {**payload, "loss_spans": wrong})


@pytest.mark.parametrize("tensor", [torch.zeros(2), np.zeros(2), b"bytes", {1, 2}, object()])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t], lambda t: {"a": (t,)}])
def test_tensor_anywhere_in_a_record_is_refused(tensor, wrap):
    with pytest.raises(ContractError, match="never tensors"):
        assert_no_tensors(wrap(tensor))


def test_tensor_inside_a_record_is_refused_with_its_place():
    task = PromptTask("a", 0, (1, torch.tensor(2)), ())
    with pytest.raises(ContractError, match=r"record\.input_ids\[1\] holds a Tensor"):
        to_json(task)


TARGET = TargetInfo(
    path="a",
    architecture="b",
    model_type="c",
    revision="d",
    num_layers=4,
    hidden_size=8,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=32,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    eos_token_ids=(1,),
)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_number_that_json_cannot_carry_is_refused_both_ways(number):
    with pytest.raises(ContractError, match=r"TargetInfo\.rope_theta: expected a finite number"):
        dumps(dataclasses.replace(TARGET, rope_theta=number))
    with pytest.raises(ContractError, match=r"TargetInfo\.rope_theta: expected a finite number"):
        loads(TargetInfo, dumps(TARGET).replace("10000.0", json.dumps(number)))
    named = dataclasses.replace(TARGET, path=json.dumps(number))
    assert loads(TargetInfo, dumps(named)) == named


def test_what_could_not_be_read_again_is_not_written():
    integer_for_float = dataclasses.replace(TARGET, rope_theta=10_000)
    assert loads(TargetInfo, dumps(integer_for_float)) == TARGET
    for wrong in ({"num_layers": 4.0}, {"num_layers": True}, {"path": 3}, {"path": "\ud800"}, {"eos_token_ids": 1}):
        with pytest.raises(ContractError, match="TargetInfo"):
            dumps(dataclasses.replace(TARGET, **wrong))
    with pytest.raises(ContractError, match="expected a record of contracts"):
        dumps(3)


def test_a_fault_deep_in_a_record_is_named_with_its_place():
    ref = SampleRef("a", 1, 2, (), "local", "k", 64, layout([("last", "float32", (2, 4))])[0], "r", "f", "w")
    text = dumps(SlotRef(Slot(0, 1), ref))
    for old, new, place in [
        ('"offset":0', '"offset":0.0', r"SlotRef\.ref\.features\[0\]\.offset: expected a valid integer"),
        ('"shape":[2,4]', '"shape":[2,"4"]', r"SlotRef\.ref\.features\[0\]\.shape\[1\]: expected a valid integer"),
        ('"offset":0', '"offset":0,"data":[0.5]', r"SlotRef\.ref\.features\[0\]: unknown field 'data'"),
        ('"epoch":0,', "", r"SlotRef\.slot: field 'epoch' is missing"),
    ]:
        assert old in text
        with pytest.raises(ContractError, match=place):
            loads(SlotRef, text.replace(old, new))


@pytest.mark.parametrize("write", [str, str.encode])
def test_text_laid_out_in_another_way_is_read_all_the_same(write):
    slot = Slot(1, 2)
    spaced = json.dumps(dict(reversed(to_json(slot).items())), indent=1)
    assert loads(Slot, write(spaced)) == loads(Slot, write(dumps(slot))) == slot
    for torn in (dumps(slot)[:-1], dumps(slot) + "}", dumps(slot) + "," + dumps(slot)):
        with pytest.raises(ContractError, match="Slot"):
            loads(Slot, write(torn))


@given(st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 50), max_size=3)), max_size=5))
@settings(deadline=None)
def test_layout_is_aligned_disjoint_and_within_the_buffer(tensors):
    specs, num_bytes = layout((f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors))
    end = 0
    for spec in specs:
        assert spec.offset % ALIGNMENT == 0
        assert spec.offset >= end
        end = spec.offset + spec.num_bytes
    assert num_bytes >= end
    assert num_bytes % ALIGNMENT == 0


def test_fingerprint_follows_the_content():
    spec = CaptureSpec((1, 3, 5), True)
    assert spec.fingerprint == CaptureSpec((1, 3, 5), True).fingerprint
    assert spec.fingerprint != CaptureSpec((1, 3, 6), True).fingerprint
    assert spec.fingerprint != CaptureSpec((1, 3, 5), True, "bfloat16").fingerprint
