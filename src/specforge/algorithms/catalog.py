"""The algorithms that ship: one line each."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from specforge.algorithms.base import Algorithm
from specforge.algorithms.eagle3.algorithm import Eagle3
from specforge.errors import ConfigError

ALGORITHMS: dict[str, Callable[[Any], Algorithm]] = {
    "eagle3": Eagle3,
}


def get_algorithm(options: Any) -> Algorithm:
    """The algorithm that ``options`` (an algorithm's options record, with its ``name``) configures."""
    return algorithm_class(options.name)(options)


def algorithm_class(name: str) -> Callable[[Any], Algorithm]:
    """What builds the algorithm called ``name`` from its options. An unknown name is a :class:`ConfigError`."""
    if name not in ALGORITHMS:
        nearest = difflib.get_close_matches(name, ALGORITHMS, n=1, cutoff=0.0)
        raise ConfigError(
            f"there is no algorithm {name!r}; expected one of {', '.join(ALGORITHMS)}; did you mean {nearest[0]!r}?"
        )
    return ALGORITHMS[name]


def algorithm_names() -> tuple[str, ...]:
    return tuple(ALGORITHMS)
