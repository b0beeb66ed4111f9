"""Imports a library without a module of the standard library that it names and we hardly ever make it use.

paho-mqtt imports `urllib.request` to ask which proxy the environment names, and asks only if PySocks is installed. That
brings the HTTP, e-mail and compression modules: 2 MB, a twentieth of what an agent has on a gateway. `dataclasses`
imports `inspect`, which brings the compiler's modules, to describe classes that have no docstring: 0.7 MB.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module until something is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def deferred(module: str) -> Iterator[None]:
    """Whoever imports `module` while this lasts gets it when they first use it; everybody else gets it as ever."""
    if module in sys.modules:
        yield
        return
    stand_in = _Deferred(module)
    sys.modules[module] = stand_in
    package, _, name = module.rpartition(".")
    if package:
        setattr(importlib.import_module(package), name, stand_in)
    try:
        yield
    finally:
        if sys.modules.get(module) is stand_in:
            del sys.modules[module]
