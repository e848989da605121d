"""YAML without surprises: no aliases, duplicate keys or tags, and the scalars of YAML 1.2 (``1e-4`` is a number)."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from specforge.errors import ConfigError

MAX_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as the base class has it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed, write the value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, source: str) -> Any:
    """The value that ``text`` holds; anything odd is a :class:`ConfigError` that starts with ``source``."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        problem = str(error.problem)
        if r"\t" in problem:
            problem = "a tab is used for indentation, use spaces"
        raise ConfigError(f"{source}{line}: cannot be read as YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{source}: cannot be read as YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read as YAML: {str(error).splitlines()[0]}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values at the top of a YAML file."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path}: a run file of at most {MAX_BYTES} bytes was expected, this one has {size}")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such run file; give the path of a YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a YAML file was expected, this is a directory") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: UTF-8 text was expected, byte {error.start} is not") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the run file cannot be read: {error}") from None
    content = parse_yaml(text, str(path))
    if content is None:
        raise ConfigError(f"{path}: the run file is empty; it needs at least run_dir, target.path and data.path")
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a single value"
        raise ConfigError(f"{path}: keys and values were expected at the top of the run file, got {kind}")
    return content
