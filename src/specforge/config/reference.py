"""``docs/reference/run-config.md``, written from the models: ``python -m specforge.config.reference FILE``."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from specforge.config.keys import Key, all_keys, sections, tag_values
from specforge.config.run import RunConfig

_INTRODUCTION = """# Run configuration

<!-- Written by `python -m specforge.config.reference docs/reference/run-config.md`. -->

Every key that a run file (`specforge train -c run.yaml`) may have. A key can be given on the command line too, dotted:
`specforge train -c run.yaml training.lr=3e-4 data_plane.store.kind=shared_memory`. Relative paths are taken from the
folder of the run file. Required are `run_dir`, `target.path`, and
one of `data.path` and `data.features`.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    parts = [_INTRODUCTION]
    top = [key for key in all_keys(RunConfig) if "." not in key.path]
    parts.append(_table("Top level", "", top))
    for name, field in RunConfig.model_fields.items():
        models = sections(field)
        for model in models:
            # a section that is a choice has a table a variant
            choice = f" with `{field.discriminator}: {_choice(model, field)}`" if len(models) > 1 else ""
            parts.append(_table(f"`{name}`{choice}", field.description or "", list(all_keys(model, f"{name}."))))
    return "\n".join(parts)


def _choice(model: type[BaseModel], field: FieldInfo) -> str:
    return tag_values(model, str(field.discriminator))[0]


def _table(title: str, description: str, keys: list[Key]) -> str:
    lines = [f"## {title}", ""]
    lines += [description, ""] if description else []
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    variants: dict[tuple[str, str], list[str]] = {}
    for key in _merged(keys):
        row = f"| `{key.path}` | {_cell(_type(key.field))} | {_cell(_default(key.field))} "
        meaning = _cell(key.field.description or "")
        variants.setdefault((row, meaning), []).extend([key.variant] if key.variant and not _is_tag(key) else [])
    for (row, meaning), found in variants.items():
        only = f" Only with {' or '.join(f'`{variant}`' for variant in found)}." if found else ""
        lines.append(f"{row}| {meaning}{only} |")
    return "\n".join(lines) + "\n"


def _merged(keys: list[Key]) -> list[Key]:
    """One row for a tag that several variants share, with the choices in its type."""
    tags: dict[str, list[Key]] = {}
    for key in keys:
        if _is_tag(key):
            tags.setdefault(key.path, []).append(key)
    rows: list[Key] = []
    for key in keys:
        if key.path not in tags:
            rows.append(key)
        elif tags[key.path][0] is key:
            rows.append(_tag_row(tags[key.path]))
    return rows


def _tag_row(variants: list[Key]) -> Key:
    choices = [key.variant.partition(": ")[2] for key in variants]
    meaning = "; ".join(f"`{choice}`: {key.field.description}" for choice, key in zip(choices, variants, strict=True))
    field = FieldInfo.from_annotation(typing.Literal[tuple(choices)])  # type: ignore[arg-type]
    field.description = meaning.replace(".; ", "; ")
    if not variants[0].field.is_required():
        field.default = choices[0]
    return Key(variants[0].path, field, variants[0].variant)


def _is_tag(key: Key) -> bool:
    return key.variant.partition(": ")[0] == key.path.rpartition(".")[2]


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{choice}`" for choice in arguments)
    if origin in {typing.Union, types.UnionType}:
        return " or ".join(_type_name(option) for option in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    return {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel) or value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _cell(text: str) -> str:
    return text.replace("\n", " ")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
