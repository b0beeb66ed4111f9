"""Imports a library without a module of the standard library that it names and that we never make it use.

paho-mqtt imports `urllib.request` to ask which proxy the environment names, and asks only if PySocks is installed. That
brings the HTTP, e-mail and compression modules: 2 MB, a twentieth of what an agent has on a gateway.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def left_out(module: str, unless_installed: str) -> Iterator[None]:
    """While this lasts, importing `module` gives an empty one; afterwards, and to everybody else, the real one.

    Does nothing if `module` is loaded already, or if the package `unless_installed`, for which it is there, is found.
    """
    if module in sys.modules or importlib.util.find_spec(unless_installed) is not None:
        yield
        return
    sys.modules[module] = ModuleType(module)
    try:
        yield
    finally:
        del sys.modules[module]
