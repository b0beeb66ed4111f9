"""A module that a library names and hardly ever uses is loaded when it is used, and whoever wants it has it."""

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


def test_the_library_gets_the_real_module_when_it_uses_it() -> None:
    _run(
        "import sys, broker.protocol.mqtt_link, paho.mqtt.client\n"
        "assert paho.mqtt.client.urllib.request.getproxies() is not None\n"
        "assert sys.modules['urllib.request'].__file__ and sys.modules['urllib'].request.__file__\n"
    )


@pytest.mark.parametrize(
    "order", ["import urllib.request, broker.protocol.mqtt_link", "import broker.protocol.mqtt_link"]
)
def test_everybody_else_gets_the_real_module(order: str) -> None:
    _run(
        f"{order}\nimport urllib.request\nassert urllib.request.__file__ and urllib.request.getproxies() is not None\n"
    )


def test_a_module_that_is_used_at_once_is_loaded_at_once() -> None:
    _run(
        "from broker.protocol.lean_import import deferred\n"
        "with deferred('colorsys'):\n    import colorsys\n    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)\n"
        "import sys\nassert sys.modules['colorsys'] is not colorsys\n"
    )


def test_what_the_module_does_not_have_is_an_attribute_error() -> None:
    _run(
        "from broker.protocol.lean_import import deferred\n"
        "with deferred('colorsys'):\n    import colorsys\n"
        "assert not hasattr(colorsys, 'nothing') and not hasattr(colorsys, '__path__')\n"
    )
