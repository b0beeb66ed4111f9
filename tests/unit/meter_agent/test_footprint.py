"""What an agent loads: nothing that it does not use. `make bench` measures what that costs."""

import subprocess
import sys

import pytest

_AGENT = "import sys, meter_agent.cli, meter_agent.service, meter_agent.journal, meter_agent.readers.p1\n"


@pytest.mark.parametrize(
    "module",
    [
        "asyncio",
        "cryptography.hazmat.primitives.serialization",
        "ctypes",
        "difflib",
        "email",
        "http.client",
        "importlib.metadata",
        "pymodbus",
        pytest.param(
            "inspect",
            marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="from 3.13 on dataclasses use it themselves"),
        ),
    ],
)
def test_an_agent_with_a_p1_meter_does_not_load(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"{_AGENT}assert {module!r} not in sys.modules"], check=True, timeout=60)
