"""Versioned JSON of the records in ``contracts``, and the guard that keeps tensors out of metadata.

A record travels as ``{"type": "SampleRef", "v": 1, ...fields}``. Unknown types, versions and fields are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from typing import Any, TypeVar

from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.features import FeatureHandle, FeatureSpec
from specforge.contracts.refs import SampleRef, Slot, SlotRef
from specforge.contracts.tasks import PromptTask
from specforge.errors import ContractError

CODEC_VERSION = 1

_RECORDS: dict[str, type[Any]] = {
    record.__name__: record
    for record in (CaptureSpec, FeatureHandle, FeatureSpec, PromptTask, SampleRef, Slot, SlotRef, TargetInfo)
}

RecordT = TypeVar("RecordT")


def to_json(record: Any) -> dict[str, Any]:
    """The JSON object of one record of ``contracts``."""
    assert_no_tensors(record)
    return {"type": type(record).__name__, "v": CODEC_VERSION, **_plain(record)}


def from_json(kind: type[RecordT], payload: Any) -> RecordT:
    """The record of type ``kind`` in ``payload``; anything else in there is a :class:`ContractError`."""
    if not isinstance(payload, dict):
        raise ContractError(f"expected a JSON object of type {kind.__name__}, got {type(payload).__name__}")
    fields = dict(payload)
    name, version = fields.pop("type", None), fields.pop("v", None)
    if name != kind.__name__ or name not in _RECORDS:
        raise ContractError(f"expected a record of type {kind.__name__}, got {name!r}")
    if version != CODEC_VERSION:
        raise ContractError(f"{name}: this build reads version {CODEC_VERSION} of the record, got {version!r}")
    return typing.cast("RecordT", _build(kind, fields))


def dumps(record: Any) -> str:
    return json.dumps(to_json(record), separators=(",", ":"), allow_nan=False)


def loads(kind: type[RecordT], text: str | bytes) -> RecordT:
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise ContractError(f"{kind.__name__}: not valid JSON: {error}") from None
    return from_json(kind, payload)


def assert_no_tensors(value: Any, path: str = "record") -> None:
    """Raise :class:`ContractError` unless ``value`` is made of plain data all the way down."""
    if value is None or isinstance(value, str | int | float | bool):
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


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _build(kind: type[Any], fields: dict[str, Any]) -> Any:
    hints = _hints(kind.__name__)
    unknown = set(fields) - set(hints)
    if unknown:
        raise ContractError(f"{kind.__name__}: unknown field {min(unknown)!r}")
    missing = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    } - set(fields)
    if missing:
        raise ContractError(f"{kind.__name__}: field {min(missing)!r} is missing")
    return kind(**{name: _typed(hints[name], value, f"{kind.__name__}.{name}") for name, value in fields.items()})


@functools.cache
def _hints(name: str) -> dict[str, Any]:
    return typing.get_type_hints(_RECORDS[name])


def _typed(hint: Any, value: Any, path: str) -> Any:
    """``value`` as ``hint`` says, lists turned into tuples."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType or origin is typing.Union:
        return _one_of(typing.get_args(hint), value, path)
    if origin is tuple:
        return _tuple(typing.get_args(hint), value, path)
    if origin is dict or dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(path, "an object", value)
        if origin is dict:
            of_key, of_item = typing.get_args(hint)
            return {_typed(of_key, key, path): _typed(of_item, item, path) for key, item in value.items()}
        return _build(typing.cast("type[Any]", hint), value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _wrong(path, getattr(hint, "__name__", hint), value)
    return value


def _one_of(options: tuple[Any, ...], value: Any, path: str) -> Any:
    for option in options:
        try:
            return _typed(option, value, path)
        except ContractError:
            continue
    raise _wrong(path, " or ".join(getattr(option, "__name__", str(option)) for option in options), value)


def _tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(path, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_typed(arguments[0], item, path) for item in value)
    if len(arguments) != len(value):
        raise _wrong(path, f"a list of {len(arguments)}", value)
    return tuple(_typed(kind, item, path) for kind, item in zip(arguments, value, strict=True))


def _wrong(path: str, expected: object, value: Any) -> ContractError:
    return ContractError(f"{path}: expected {expected}, got {value!r:.80}")
