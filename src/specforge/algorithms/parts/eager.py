"""Functions that stay as they are where the layers around them are compiled.

The attentions of packed batches loop over groups whose number and sizes change from batch to batch, and have backwards
of their own: a compiler would make them again for every batch, and not faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Eager(Generic[P, R]):
    """Decorates a function. It is the function itself until :func:`exclude_from_compilation` is called.

    ``torch.compiler.disable`` would do at once, but it loads the compiler in every process that imports a draft.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self.__doc__ = function.__doc__
        self._function = self._call = function
        _all.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._call(*args, **kwargs)

    def exclude(self) -> None:
        self._call = torch.compiler.disable(self._function)


_all: list[Eager[Any, Any]] = []


def exclude_from_compilation() -> None:
    """Call before anything is compiled that calls an :class:`Eager` function."""
    for function in _all:
        function.exclude()
