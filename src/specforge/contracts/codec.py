"""Versioned JSON of the records in ``contracts``, and the guard that keeps tensors out of metadata.

A record travels as ``{"type": "SampleRef", "v": 1, ...fields}``. Unknown types, versions and fields are refused, and so
is every value of another type than the field's: no ``true`` or ``1.0`` for an integer, no NaN.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Generic, TypeVar

import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.features import FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.contracts.tasks import PromptTask
from specforge.errors import ContractError

CODEC_VERSION = 1

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

RecordT = TypeVar("RecordT")


def to_json(record: Any) -> dict[str, Any]:
    """The JSON object of one record of ``contracts``."""
    return typing.cast("dict[str, Any]", json.loads(dumps(record)))


def from_json(kind: type[RecordT], payload: Any) -> RecordT:
    """The record of type ``kind`` in ``payload``; anything else in there is a :class:`ContractError`."""
    if not isinstance(payload, dict):
        raise ContractError(f"expected a JSON object of type {kind.__name__}, got {type(payload).__name__}")
    fields = dict(payload)
    name, version = fields.pop("type", None), fields.pop("v", None)
    form = _FORMS.get(kind)
    if name != kind.__name__ or form is None:
        raise ContractError(f"expected a record of type {kind.__name__}, got {name!r}")
    if version != CODEC_VERSION:
        raise ContractError(f"{name}: this build reads version {CODEC_VERSION} of the record, got {version!r}")
    try:
        text = json.dumps(fields, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"{name}: not made of what JSON can carry: {error}") from None
    return typing.cast("RecordT", form.read(text))


def dumps(record: Any) -> str:
    """The JSON text of one record, which ``loads`` accepts; a record it would not accept is a ``ContractError``."""
    form = _FORMS.get(type(record))
    if form is None:
        raise ContractError(f"expected a record of contracts, got a {type(record).__name__}")
    return _tag(form.name) + form.write(record).decode()[1:]


def loads(kind: type[RecordT], text: str | bytes) -> RecordT:
    """The record of type ``kind`` in ``text``; anything else in there is a :class:`ContractError`."""
    form = _FORMS.get(kind)
    if form is not None:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        tag = _tag(form.name)
        # As ``dumps`` writes it, the tag comes first: what follows is read in one go.
        if text.startswith(tag):
            return typing.cast("RecordT", form.read("{" + text[len(tag) :]))
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise ContractError(f"{kind.__name__}: not valid JSON: {error}") from None
    return from_json(kind, payload)


def _tag(name: str) -> str:
    return f'{{"type":"{name}","v":{CODEC_VERSION},'


def assert_no_tensors(value: Any, path: str = "record") -> None:
    """Raise :class:`ContractError` unless ``value`` is made of plain data all the way down."""
    if value is None or isinstance(value, str | int | float | bool):
        return
    form = _FORMS.get(type(value))
    if form is not None and form.is_exact(value):
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            assert_no_tensors(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        for key, item in value.items():
            assert_no_tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            assert_no_tensors(item, f"{path}[{position}]")
    else:
        raise ContractError(f"{path} holds a {type(value).__name__}: metadata carries references, never tensors")


class Form(Generic[RecordT]):
    """The JSON text of one type, a dataclass or any other that pydantic knows, read and written strictly.

    It travels as the only item of a tuple, because the records themselves carry no configuration.
    """

    def __init__(self, kind: type[RecordT], name: str = "") -> None:
        # Instances are looked through: a serializer alone takes a tensor of one element for the integer that it holds.
        config = ConfigDict(**_STRICT, revalidate_instances="always")
        self.adapter: TypeAdapter[Any] = TypeAdapter(tuple[kind], config=config)  # type: ignore[valid-type]
        self.name = name or kind.__name__
        self._check = self.adapter.validator.validate_python
        self._write = self.adapter.serializer.to_json
        self._read = self.adapter.validator.validate_json

    def is_exact(self, value: object) -> bool:
        """Every value inside is of its declared type, and a number that JSON can carry."""
        try:
            self._check((value,))
        except ValidationError:
            return False
        return True

    def write(self, value: RecordT) -> bytes:
        """The JSON text. Where types inside differ from the declared ones: if they read as those."""
        try:
            if self.is_exact(value):
                return self._write((value,))[1:-1]
            assert_no_tensors(value)
            data = pydantic_core.to_json((value,), inf_nan_mode="constants")
        except pydantic_core.PydanticSerializationError as error:
            raise ContractError(f"{self.name}: cannot be written as JSON: {error}") from None
        return self.write(self._read_list(data))

    def read(self, text: str | bytes) -> RecordT:
        """What ``text`` says; a :class:`ContractError` names the place of the first fault."""
        return self._read_list("[" + text + "]" if isinstance(text, str) else b"[" + text + b"]")

    def _read_list(self, data: str | bytes) -> RecordT:
        try:
            return typing.cast("RecordT", self._read(data)[0])
        except ValidationError as error:
            raise _explain(error, self.name) from None


def _explain(error: ValidationError, name: str) -> ContractError:
    """The first complaint, with its place below ``name``."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return ContractError(f"{name}: not valid JSON: {first['msg']}")
    steps = first["loc"][1:]
    named = bool(steps) and isinstance(steps[-1], str)
    if named and first["type"] in {"missing", "unexpected_keyword_argument"}:
        what = "field {!r} is missing" if first["type"] == "missing" else "unknown field {!r}"
        return ContractError(f"{name}{_place(steps[:-1])}: {what.format(steps[-1])}")
    expected = first["msg"].replace("Input should be", "expected")
    return ContractError(f"{name}{_place(steps)}: {expected}, got {first['input']!r:.80}")


def _place(steps: tuple[int | str, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


_FORMS: dict[type[Any], Form[Any]] = {
    kind: Form(kind)
    for kind in (CaptureSpec, FeatureHandle, FeatureSpec, PromptTask, SampleRef, Slot, SlotRef, TargetInfo)
}
