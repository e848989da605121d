"""Lets SGLang start on a CPU from the package index, where the kernels that it asks for do not exist.

Put this directory on PYTHONPATH. Two gaps are filled: ``sgl_kernel`` (a name for every kernel, which raises when it is
called), and two operators of torchvision, whose build does not match the CPU's torch.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


class _Kernels(types.ModuleType):
    """A package with every name in it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        return _Missing(f"{self.__name__}.{name}")


class _Missing:
    """A kernel, or a constant of one: any attribute of it is there, a call raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "_Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._name}.{name}")

    def __call__(self, *args: object, **options: object) -> object:
        raise NotImplementedError(f"{self._name}: a kernel that a CPU does not have")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname.split(".")[0] == "sgl_kernel":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname == "torchvision":
            _define_operators()
        return None

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return _Kernels(spec.name)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        pass


_libraries: list[Any] = []


def _define_operators() -> None:
    """``torchvision::nms`` and ``qnms``, for which torchvision registers shapes as soon as it is imported."""
    import torch

    if not _libraries:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


sys.meta_path.insert(0, _Finder())
