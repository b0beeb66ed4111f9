"""Libraries that only some readers need, and that are installed only where the operator asks for them."""

import importlib
from types import ModuleType

from firmware_config.loader import WrongValue


def import_extra(meter: str, module: str, extra: str) -> ModuleType:
    """The library, imported. Raises WrongValue with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise WrongValue(
            f"meters.{meter}.reader.protocol",
            f"a protocol whose library is installed; this one needs `pip install 'dengen[{extra}]'`",
        ) from error
