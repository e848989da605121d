"""The algorithms that ship, one line each, and those that other packages add. Imports no tensor library.

A package adds one by an entry point of the group ``specforge.algorithms``: its name is the algorithm's, its value an
:class:`Entry` (``examples/plugin-algorithm``).
"""

from __future__ import annotations

import difflib
import functools
import logging
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import BaseModel

from specforge.errors import ConfigError

ENTRY_POINTS = "specforge.algorithms"

_LOG = logging.getLogger(__name__)


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
    """Every algorithm by name. Packages whose entry cannot be used are left out with a warning."""
    found = dict(ALGORITHMS)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            entry = point.load()
            if point.name in found or not isinstance(entry, Entry):
                raise ConfigError(  # noqa: TRY301 - reported like whatever else a package of somebody else does
                    f"it must give a specforge.algorithms.catalog.Entry under a name of its own; taken are "
                    f"{', '.join(found)}"
                )
            _load(entry.options)
        except Exception as error:  # noqa: BLE001 - one broken package must not take every command down
            _LOG.warning(
                "the algorithm %r of %s cannot be used: %s: %s; repair or uninstall that package",
                point.name, point.value, type(error).__name__, error,
            )  # fmt: skip
        else:
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
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(
            f"there is no algorithm {name!r}; expected one of {', '.join(known)}, "
            f"or install the package that adds it{hint}"
        )
    return known[name]


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
