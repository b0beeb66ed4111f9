"""What other people's meters have sent, as their owners published it, is read byte for byte: P1 and IEC 62056-21.

The telegrams are in `captures/`, each with its origin and with the check sum that stands there. Captures of the other
protocols are in test_sml.py, test_dlms.py, test_mbus.py and test_echonet.py, and in test_p1_encrypted.py.
"""

import re
import tomllib
from pathlib import Path

import pytest

from meter_agent.framing import p1
from meter_agent.framing.iec62056_21 import Iec62056Framer, parse_telegram

CAPTURES = Path(__file__).parent / "captures"
VALUES = ("import_mwh", "export_mwh", "power_w", "serial_number")
NO_CHECK = "no check character"


def captures(protocol):
    found = tomllib.loads((CAPTURES / f"{protocol}.toml").read_text(encoding="utf-8"))["captures"]
    return [pytest.param(capture, id=capture["dialect"].split(" (")[0]) for capture in found]


def on_the_wire(text):
    """CR LF at the ends of lines, and the characters that have no picture."""
    raw = text.replace("\n", "\r\n").replace("<STX>", "\x02").replace("<ETX>", "\x03").encode("ascii")
    return re.sub(rb"<([0-9A-F]{2})>", lambda found: bytes.fromhex(found[1].decode()), raw)


def values_of(reading):
    return {name: getattr(reading, name) for name in VALUES if getattr(reading, name) is not None}


@pytest.mark.parametrize("capture", captures("p1"))
def test_a_published_p1_telegram_is_read(capture):
    framer = p1.P1Framer()
    (telegram,) = framer.feed(on_the_wire(capture["text"]))
    assert telegram.checked == ("no CRC" not in capture["dialect"])
    assert values_of(p1.parse_telegram(telegram)) == capture["expected"]
    assert (framer.refused, framer.held_bytes) == (0, 0)


@pytest.mark.parametrize("capture", captures("iec62056_21"))
def test_a_published_iec_62056_21_telegram_is_read(capture):
    framer = Iec62056Framer("N")
    (telegram,) = framer.feed(on_the_wire(capture["text"]))
    assert telegram.checked == (NO_CHECK not in capture["dialect"])
    assert values_of(parse_telegram(telegram)) == capture["expected"]
    assert framer.refused == 0


def test_every_capture_says_where_it_was_published():
    for protocol in ("p1", "iec62056_21"):
        for parameter in captures(protocol):
            (capture,) = parameter.values
            assert re.match(r"https://github\.com/[^/]+/[^/]+/blob/[0-9a-f]{40}/", capture["origin"])
