"""Reads a run file and dotted overrides into a :class:`RunConfig`, and writes the resolved one.

Every problem is a :class:`ConfigError` of one sentence that names the dotted key. Relative paths, in the file and in
overrides alike, are taken from the folder of the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from specforge.config.keys import accepts, all_keys, item_field, nearest_key, sections, tag_values
from specforge.config.run import RunConfig
from specforge.config.strict_yaml import parse_yaml, read_mapping
from specforge.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)


def load_run_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that ``path`` describes, with ``overrides`` such as ``training.lr=3e-4`` applied to it."""
    file = Path(path)
    content = read_mapping(file)
    for override in overrides:
        _apply_override(content, override)
    try:
        return run_config_from(content, file.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def run_config_from(content: dict[str, Any], folder: Path) -> RunConfig:
    """The run that the nested keys in ``content`` describe; relative paths are taken from ``folder``."""
    return section_from(RunConfig, "", content, folder)


def section_from(model: type[ModelT], section: str, content: dict[str, Any], folder: Path) -> ModelT:
    """One section of a run by itself (``section`` is its dotted name, empty for the whole run)."""
    prepared = _prepared(model, content, f"{section}." if section else "", folder)
    try:
        return model.model_validate(prepared)
    except ValidationError as error:
        raise ConfigError(_sentence(error, model, section)) from None


def dump_run_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, readable by its owner only; complete or not there at all."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"the override {override!r} should look like training.lr=3e-4")
    value = parse_yaml(text, f"the override {override!r}")
    section = content
    for depth, part in enumerate(parts[:-1], start=1):
        below = section.setdefault(part, {})
        if below is None:
            below = section[part] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"the override {override!r} needs {'.'.join(parts[:depth])} to be a section of keys")
        section = below
    section[parts[-1]] = value


def _prepared(model: type[BaseModel], content: dict[Any, Any], prefix: str, folder: Path) -> dict[str, Any]:
    """``content`` with its keys checked, empty sections dropped and paths made absolute."""
    result: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        field = model.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            raise ConfigError(_unknown(model, path, prefix))
        item = item_field(field)
        if item is not None and isinstance(value, list):
            result[name] = [_section(item, entry, f"{path}[{place}]", folder) for place, entry in enumerate(value)]
        elif not sections(field):
            result[name] = _leaf(field, value, path, folder)
        elif value is not None:
            result[name] = _section(field, value, path, folder)
    return result


def _section(field: FieldInfo, value: Any, path: str, folder: Path) -> dict[str, Any]:
    """A section by itself, at ``path``, with the tag of its variant where it has several."""
    options = sections(field)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} should be a section of keys, got {_shown(value)}{_first_key(path, field)}")
    option = _chosen(field, options, value, path)
    prepared = _prepared(option, value, f"{path}.", folder)
    if len(options) > 1:
        prepared.setdefault(str(field.discriminator), tag_values(option, str(field.discriminator))[0])
    return prepared


def _leaf(field: FieldInfo, value: Any, path: str, folder: Path) -> Any:
    if isinstance(value, bool) and not accepts(field, bool):
        raise ConfigError(f"{path} cannot be {_shown(value)}; it is: {field.description}")
    if isinstance(value, list) and accepts(field, tuple[Path, ...]):
        return [_path(field, item, f"{path}[{place}]", folder) for place, item in enumerate(value)]
    if accepts(field, Path) or accepts(field, tuple[Path, ...]):
        return _path(field, value, path, folder)
    return value


def _path(field: FieldInfo, value: Any, path: str, folder: Path) -> Any:
    """A path made absolute; what is no text is left to the model."""
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ConfigError(f"{path} should be a path, got {_shown(value)}; it is: {field.description}")
        home = Path.home() / value[2:] if value.startswith("~/") else Path(value)
        return Path(os.path.normpath(folder / home))
    return value


def _chosen(field: FieldInfo, options: list[type[BaseModel]], value: dict[Any, Any], path: str) -> type[BaseModel]:
    """The variant of a section that ``value`` selects by its tag; the default's where it has no tag."""
    if len(options) == 1:
        return options[0]
    tag = str(field.discriminator)
    variants = {choice: option for option in options for choice in tag_values(option, tag)}
    choice = value.get(tag, getattr(field.default, tag, None))
    if not isinstance(choice, str) or choice not in variants:
        raise ConfigError(f"{path}.{tag} should be one of {', '.join(variants)}, got {_shown(choice)}")
    for key in value:
        owners = [name for name, option in variants.items() if key in option.model_fields]
        if owners and choice not in owners:
            raise ConfigError(
                f"{path}.{key} belongs to {path}.{tag}: {' or '.join(owners)}, but {tag} is {choice}; "
                f"set {tag}, or remove {key}"
            )
    return variants[choice]


def _unknown(model: type[BaseModel], path: str, prefix: str) -> str:
    nearest = nearest_key(RunConfig, path)
    if nearest is not None:
        return f"{path} is unknown; did you mean {nearest}?"
    return f"{path} is unknown; expected one of {', '.join(prefix + name for name in model.model_fields)}"


def _first_key(path: str, field: FieldInfo) -> str:
    key = str(field.discriminator) if len(sections(field)) > 1 else next(iter(sections(field)[0].model_fields))
    return f"; write for example {path}.{key}"


def _sentence(error: ValidationError, model: type[BaseModel], section: str) -> str:
    """The first problem of ``error`` as one sentence with the dotted key."""
    problem = error.errors(include_url=False)[0]
    path, description = _dotted(problem["loc"], model, section)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        needed = [key.path for key in all_keys(RunConfig) if key.field.is_required() and "[]" not in key.path]
        needed.append("data.path (or data.features)")
        return (
            f"{next((key for key in needed if key.startswith(path)), path)} is missing; a run needs {', '.join(needed)}"
        )
    if not problem["loc"]:
        return message
    got = f"got {_shown(problem['input'])}; it is: {description}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        return f"{path}: {message}"
    if problem["type"] == "value_error":
        return f"{path} should be {message}, {got}"
    _, should, rest = message.partition(", unable to parse")[0].partition(" should ")
    if not should or "match pattern" in rest:
        return f"{path} cannot be {_shown(problem['input'])}; it is: {description}"
    return f"{path} should {rest}, {got}"


def _dotted(location: tuple[int | str, ...], model: type[BaseModel], section: str) -> tuple[str, str]:
    """The dotted key of a pydantic location (which holds the tags of unions too), and the key's description."""
    models: list[type[BaseModel]] = [model]
    path, description = section, ""
    for part in location:
        field = next((m.model_fields[part] for m in models if isinstance(part, str) and part in m.model_fields), None)
        if field is not None:
            path = f"{path}.{part}" if path else str(part)
            description = field.description or ""
            models = sections(item_field(field) or field)
        elif isinstance(part, int):
            path = f"{path}[{part}]"
    return path, description


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return f"{value!r:.60}" if not isinstance(value, Path) else f"{str(value)!r}"
