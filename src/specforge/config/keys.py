"""The keys that a run file may have, walked from the models themselves, and the nearest one to an unknown key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SIMILAR_ENOUGH = 0.5


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of the configuration. ``variant`` says for which choice it exists, e.g. ``kind: sqlite``."""

    path: str
    field: FieldInfo
    variant: str = ""


def sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The models that a field may hold: none for a leaf, one for a section, several for a tagged union."""
    return [kind for kind in _leaf_types(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def item_field(field: FieldInfo) -> FieldInfo | None:
    """What a list of sections may hold at each place; ``None`` for every other field."""
    if typing.get_origin(field.annotation) is not tuple:
        return None
    item = FieldInfo.from_annotation(typing.get_args(field.annotation)[0])
    return item if sections(item) else None


def accepts(field: FieldInfo, kind: Any) -> bool:
    """Whether ``kind`` is one of the types of a leaf."""
    return kind in _leaf_types(field.annotation)


def tag_values(model: type[BaseModel], tag: str) -> tuple[str, ...]:
    """The values of the literal field ``tag`` that select ``model`` in a tagged union."""
    return typing.get_args(model.model_fields[tag].annotation)


def all_keys(model: type[BaseModel], prefix: str = "", variant: str = "") -> Iterator[Key]:
    """Every leaf below ``model``, in the order of the file."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        item = item_field(field)
        path, held = (path, field) if item is None else (f"{path}[]", item)
        models = sections(held)
        if not models:
            yield Key(path, field, variant)
        for option in models:
            tag = str(held.discriminator) if len(models) > 1 else ""
            choice = f"{tag}: {tag_values(option, tag)[0]}" if tag else variant
            yield from all_keys(option, f"{path}.", choice)


def nearest_key(model: type[BaseModel], unknown: str) -> str | None:
    """The known dotted key that most resembles ``unknown``, or ``None`` if nothing does."""
    paths = list(dict.fromkeys([*_section_paths(model), *(key.path for key in all_keys(model))]))
    best = max(paths, key=lambda path: _similarity(unknown, path))
    return best if _similarity(unknown, best) >= _SIMILAR_ENOUGH else None


def _section_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        for option in sections(field):
            yield f"{prefix}{name}"
            yield from _section_paths(option, f"{prefix}{name}.")


def _similarity(unknown: str, known: str) -> float:
    """In [0, 1+]: likeness of the last segments, with a little more for the same section."""
    section, _, name = unknown.lower().replace("-", "_").rpartition(".")
    known_section, _, known_name = known.rpartition(".")
    initials = "".join(word[0] for word in name.split("_") if word)
    if known_name in {name, initials}:
        likeness = 1.0
    elif len(name) > 3 and (name in known_name or known_name in name.split("_")):
        likeness = 0.8
    else:
        likeness = difflib.SequenceMatcher(None, name, known_name).ratio()
    return likeness + 0.1 * difflib.SequenceMatcher(None, section, known_section).ratio()


def _leaf_types(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _leaf_types(typing.get_args(annotation)[0])
    if origin in {typing.Union, types.UnionType}:
        return [kind for option in typing.get_args(annotation) for kind in _leaf_types(option)]
    return [annotation]
