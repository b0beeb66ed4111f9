"""A HAN port on a real pseudo-terminal that is slow, silent, garbled and unplugged; frames of real meters.

Aidon: https://github.com/UtilitechAS/amsreader-firmware frames/Aidon-TN-3p.raw.
"""

import os
import pty
import subprocess
import sys
import threading
import time
import tty
from pathlib import Path

import pytest
from dengen_testing.waiting import wait_until

from firmware_config.loader import WrongValue
from meter_agent.config import DlmsConfig, MeterConfig, NamedMeter
from meter_agent.framing.hdlc import crc16_x25
from meter_agent.readers import create_reader
from meter_agent.readings import ReadFailure

pytestmark = pytest.mark.integration

POWER = bytes.fromhex("7EA02A410883130413E6E7000F40000000000101020309060100010700FF060000095602020F00161BAFA17E")
"""2390 W and no counters: every 2.5 s."""


class Clock:
    def monotonic_s(self):
        return time.monotonic()

    def time_s(self):
        return 1_700_000_000.0


def frame(information, more=False):
    head = (0xA000 | (0x800 if more else 0) | len(information) + 10).to_bytes(2, "big") + bytes.fromhex("41088313")
    head += crc16_x25(head).to_bytes(2, "little")
    return b"\x7e" + head + information + crc16_x25(head + information).to_bytes(2, "little") + b"\x7e"


def energy_message(steps):
    body = f"0F40000000 00 0101 0203 09060100010800FF 06{steps:08x} 02020F01161E"
    return bytes.fromhex("E6E700" + body)


def energy(steps):
    return frame(energy_message(steps))


class Port:
    """A pseudo-terminal; the meter writes to `master`, `path` is the reader's side."""

    def __init__(self):
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self.path = Path(os.ttyname(self._slave))

    def send(self, data):
        os.write(self.master, data)

    def unplug(self):
        os.close(self._slave)
        os.close(self.master)


@pytest.fixture
def make():
    """Makes readers and closes them at the end."""
    readers = []

    def create(path, **more):
        config = DlmsConfig("dlms", path, **({"timeout_s": 5.0} | more))
        readers.append(create_reader(NamedMeter("house-1", MeterConfig("consumption", "key", 10_000, config)), Clock()))
        return readers[-1]

    yield create
    for reader in readers:
        reader.close()


def opened(reader, port):
    """Start reading in a thread; the result comes when a list with counters has."""
    results = []

    def read():
        try:
            results.append(reader.sample())
        except ReadFailure as failure:
            results.append(failure)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: reader._port is not None or results, "the port to be open")
    return thread, results


def test_the_hourly_list_is_waited_for_while_power_comes_every_few_seconds(make):
    port = Port()
    reader = make(port.path)
    thread, results = opened(reader, port)
    for _ in range(5):
        port.send(POWER)
    assert thread.is_alive()
    port.send(energy(100))
    thread.join(10)
    assert results[0].import_mwh == 1_000_000
    # What came meanwhile is the newest, and comes once.
    port.send(energy(101) + POWER + energy(102) + POWER)
    wait_until(lambda: reader._port._newest and reader._port._newest[0].import_mwh == 1_020_000, "the newest list")
    assert reader.sample().import_mwh == 1_020_000


def test_a_frame_byte_by_byte_in_segments_and_between_garbage(make):
    port = Port()
    thread, results = opened(make(port.path), port)
    message = energy_message(7)
    noise = bytes(range(256))
    for byte in noise + POWER[:20] + frame(message[:11], more=True) + frame(message[11:]):
        port.send(bytes([byte]))
    thread.join(10)
    assert results[0].import_mwh == 70_000


def test_a_silent_port_is_reported_long_before_the_hour_is_over(make):
    port = Port()
    with pytest.raises(ReadFailure, match=r"no telegram within 0.1 s; has the utility switched the HAN port on"):
        make(port.path, timeout_s=3_600.0, silence_s=0.1).sample()


def test_power_without_counters_for_too_long_is_a_failure(make):
    port = Port()
    reader = make(port.path, timeout_s=0.3, silence_s=60.0)
    thread, results = opened(reader, port)
    port.send(POWER)
    thread.join(10)
    assert "no telegram within 0.3 s" in results[0].reason


def test_damage_is_named(make):
    port = Port()
    thread, results = opened(make(port.path, timeout_s=0.5), port)
    damaged = bytearray(energy(1))
    damaged[-8] ^= 1
    port.send(bytes(damaged))
    thread.join(10)
    assert "refused: its frame check sequence is wrong" in results[0].reason


def kamstrup(steps):
    name = "0A084B616D7374727570"
    return frame(bytes.fromhex(f"E6E7000F00000000 00 0203 {name} 09060101010800FF 06{steps:08x}"))


@pytest.mark.parametrize(("first", "then"), [(2_306_000, 23_060_010), (23_060_000, 2_306_001)])
def test_a_meter_whose_step_was_changed_is_withheld_until_the_config_says_so(make, first, then):
    """https://github.com/turbokongen/hass-AMS/issues/108: 23 060 kWh became 230 600 kWh."""
    port = Port()
    reader = make(port.path, energy_step_wh=10, timeout_s=0.5)
    thread, results = opened(reader, port)
    port.send(kamstrup(first))
    thread.join(10)
    assert results[0].import_mwh == first * 10_000
    port.send(kamstrup(then))
    with pytest.raises(ReadFailure, match="the step of the meter has changed"):
        reader.sample()
    port.send(kamstrup(first + 1))
    wait_until(lambda: reader._port._newest, "the next list")
    assert reader.sample().import_mwh == (first + 1) * 10_000


def test_an_agent_imports_no_library_that_its_config_does_not_name():
    code = (
        "import sys; from pathlib import Path\n"
        "from meter_agent.config import *; from meter_agent.readers import create_reader\n"
        "config = MeterConfig('consumption', Path('k'), 1, DlmsConfig('dlms', Path('/nowhere')))\n"
        "create_reader(NamedMeter('house-1', config), None)\n"
        "assert not {'pymodbus', 'momonga', 'meterbus', 'gpiod'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unplugged_adapter_is_a_failure_and_comes_back_under_another_number(make, tmp_path):
    by_id = tmp_path / "usb-han"
    port = Port()
    by_id.symlink_to(port.path)
    reader = make(by_id)
    thread, results = opened(reader, port)
    port.unplug()
    thread.join(10)
    assert "is gone" in results[0].reason
    by_id.unlink()
    with pytest.raises(ReadFailure, match="is missing; is the cable plugged in"):
        reader.sample()
    again = Port()
    by_id.symlink_to(again.path)
    thread, results = opened(reader, again)
    again.send(energy(9))
    thread.join(10)
    assert results[0].import_mwh == 90_000


@pytest.mark.parametrize(
    ("contents", "expected"),
    [("00", "32 hex digits, .* has 2"), ("no key", "32 hex digits"), (None, "32 hex digits")],
)
def test_a_key_file_that_is_none_is_a_mistake_of_the_config(make, tmp_path, contents, expected):
    key_file = tmp_path / "han.key"
    if contents is not None:
        key_file.write_text(contents)
    with pytest.raises(WrongValue, match=expected) as error:
        make(tmp_path / "tty", encryption_key_file=key_file)
    assert error.value.key == "meters.house-1.reader.encryption_key_file"


def test_an_authentication_key_alone_is_a_mistake_of_the_config(make, tmp_path):
    with pytest.raises(WrongValue, match="authentication needs both"):
        make(tmp_path / "tty", authentication_key_file=tmp_path / "han.key")
