"""The algorithms that ship, one line each, and those that other packages add. Imports no tensor library.

A package adds one by an entry point of the group ``specforge.algorithms``: its name is the algorithm's, its value an
:class:`Entry` (``examples/plugin-algorithm``).
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import BaseModel

from specforge.errors import ConfigError

ENTRY_POINTS = "specforge.algorithms"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an algorithm is, as ``module:attribute``.

    ``options``: its pydantic options with a literal ``name``, in a module without a tensor library. ``algorithm``: the
    :class:`~specforge.algorithms.base.Algorithm` that is built from them.
    """

    options: str
    algorithm: str


def _shipped(name: str, cls: str) -> Entry:
    package = f"specforge.algorithms.{name}"
    return Entry(f"{package}.config:{cls}Options", f"{package}.algorithm:{cls}")


ALGORITHMS: dict[str, Entry] = {
    "eagle3": _shipped("eagle3", "Eagle3"),
    "peagle": _shipped("peagle", "PEagle"),
    "medusa": _shipped("medusa", "Medusa"),
    "mtp": _shipped("mtp", "Mtp"),
    "dflash": _shipped("dflash", "DFlash"),
    "domino": _shipped("domino", "Domino"),
    "dspark": _shipped("dspark", "DSpark"),
}


@functools.cache
def entries() -> dict[str, Entry]:
    """Every algorithm by name. One of another package may not take a name that is taken."""
    found = dict(ALGORITHMS)
    for point in entry_points(group=ENTRY_POINTS):
        entry = point.load()
        if point.name in found or not isinstance(entry, Entry):
            raise ConfigError(
                f"the entry point {point.name!r} ({point.value}) must give a specforge.algorithms.catalog.Entry under "
                f"a name of its own; taken are {', '.join(found)}; uninstall or repair that package"
            )
        found[point.name] = entry
    return found


def options_types() -> dict[str, type[BaseModel]]:
    """The options of every algorithm by its name."""
    return {name: _load(entry.options) for name, entry in entries().items()}


def get_algorithm(options: Any) -> Any:
    """The :class:`Algorithm` that ``options`` (an algorithm's options record, with its ``name``) configures."""
    return algorithm_type(options.name)(options)


def algorithm_type(name: str) -> Any:
    """The subclass of :class:`Algorithm` called ``name``. An unknown name is a :class:`ConfigError`."""
    return _load(_entry(name).algorithm)


def options_of(values: dict[str, Any]) -> Any:
    """The options record in ``values``, plain data with the key ``name``."""
    return _load(_entry(values["name"]).options).model_validate(values)


def algorithm_names() -> tuple[str, ...]:
    return tuple(entries())


def _entry(name: str) -> Entry:
    known = entries()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise ConfigError(
            f"there is no algorithm {name!r}; expected one of {', '.join(known)}; did you mean {nearest[0]!r}?"
        )
    return known[name]


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
