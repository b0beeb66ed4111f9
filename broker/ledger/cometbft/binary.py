"""Finds the CometBFT program: the one that `make setup` built in a checkout, or the one on PATH."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from broker.protocol.files import reason_of

VERSION: Final = "0.38.25"
"""The version that this package was tested with; all 0.38 speak the same protocol."""

_RELEASE: Final = "0.38."
_CHECKOUT: Final = Path(__file__).resolve().parents[3]


class CometbftMissing(Exception):
    """There is no usable CometBFT on this machine. The text says how to get it."""


def find_cometbft(named: Path | None = None) -> Path:
    """The program `named`, that of this checkout, or that on PATH. Raises CometbftMissing."""
    found = named or _built() or _on_path()
    if found is None:
        raise CometbftMissing(
            f"no cometbft on this machine; run deploy/setup/cometbft in a checkout, or put version {VERSION} on PATH"
        )
    try:
        ended = subprocess.run([found, "version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CometbftMissing(
            f"{found} does not run ({reason_of(error)}); give the path of cometbft {VERSION}"
        ) from error
    said = ended.stdout.strip()
    if not said.removeprefix("v").startswith(_RELEASE):
        raise CometbftMissing(
            f"{found} is version {said or 'unknown'}; this ledger needs {_RELEASE}x, such as {VERSION}"
        )
    return found


def _built() -> Path | None:
    program = _CHECKOUT / ".tools" / "bin" / "cometbft"
    return program if program.is_file() else None


def _on_path() -> Path | None:
    found = shutil.which("cometbft")
    return None if found is None else Path(found)
