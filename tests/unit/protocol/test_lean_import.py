"""A module that a library names and never uses is left out while the library is imported, and only then."""

import subprocess
import sys

import pytest


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_mqtt_link_brings_neither_http_nor_email() -> None:
    _run(
        "import sys, broker.protocol.mqtt_link\n"
        "assert 'paho.mqtt.client' in sys.modules\n"
        "assert not {'urllib.request', 'http.client', 'email'} & set(sys.modules)\n"
    )


def test_whoever_needs_the_module_later_gets_the_real_one() -> None:
    _run("import broker.protocol.mqtt_link, urllib.request\nassert urllib.request.getproxies() is not None\n")


@pytest.mark.parametrize("reason", ["import urllib.request", "sys.path.insert(0, FOLDER)"])
def test_it_is_there_if_it_is_loaded_already_or_the_package_that_needs_it_is_installed(
    reason: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("installed")
    (folder / "socks.py").write_text("def get_default_proxy(): return None\n")
    _run(
        f"import sys\nFOLDER = {str(folder)!r}\n{reason}\nimport broker.protocol.mqtt_link, paho.mqtt.client\n"
        "assert paho.mqtt.client.urllib.request.getproxies() is not None\n"
    )
