"""Route B on a pseudo-terminal: momonga's own code against an adapter that speaks SKSTACK-IP as a BP35A1 does.

The adapter answers with payloads captured from a real meter (see tests/unit/meter_agent/test_echonet.py); its lines
follow the transcript in the Qiita article named there.
"""

import os
import pty
import select
import sys
import threading
import time
import tty
from pathlib import Path

import pytest

from firmware_config.loader import WrongValue
from meter_agent.config import BRouteConfig, MeterConfig, NamedMeter
from meter_agent.readers import create_reader
from meter_agent.readings import ReadFailure

pytestmark = pytest.mark.integration

momonga = pytest.importorskip("momonga")

ADDRESS = "FE80:0000:0000:0000:021C:6400:6014:21A3"
OURS = "FE80:0000:0000:0000:021D:1290:0005:747B"
HALF_HOUR_S = 1_779_253_200
"""2026-05-20 14:00 in Japan."""

CAPTURED = {
    0x8D: "463234473336363530350000",
    0x9F: "1941414160404000624300414040430202",
    0xD3: "00000001",
    0xD7: "06",
    0xE1: "01",
    0xE7: "00000278",
    0xEA: "07EA05140E00000000FE68",
    0xEB: "07EA05140E000000000016",
}
"""Properties of one meter, but E1 of another one and EB's date as EA's."""


class Clock:
    def monotonic_s(self):
        return time.monotonic()

    def time_s(self):
        return HALF_HOUR_S + 100.0


class Adapter:
    """The other end of the serial line. `misbehave` may change an answer to a property request."""

    def __init__(self):
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self.path = Path(os.ttyname(self._slave))
        self.properties = dict(CAPTURED)
        self.commands = []
        self.misbehave = lambda reply: reply
        self._wake_reader, self._wake_writer = os.pipe()
        self._received = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self):
        os.write(self._wake_writer, b"x")
        self._thread.join(5)

    def _run(self):
        while True:
            readable, _, _ = select.select([self.master, self._wake_reader], [], [])
            if self._wake_reader in readable:
                return
            self._received += os.read(self.master, 4096)
            while self._take():
                pass

    def _take(self):
        if self._received.startswith(b"SKSENDTO"):
            parts = self._received.split(b" ", 6)
            if len(parts) < 7 or len(parts[6]) < int(parts[5], 16):
                return False
            size = int(parts[5], 16)
            payload, self._received = parts[6][:size], parts[6][size:]
            self._answer(payload)
            return True
        if b"\r" not in self._received:
            return False
        line, self._received = self._received.split(b"\r", 1)
        self._received = self._received.removeprefix(b"\n")
        if line:
            self.commands.append(line.decode())
            self._command(line.decode())
        return True

    def _send(self, *lines):
        os.write(self.master, b"".join(line.encode() + b"\r\n" for line in lines))

    def _command(self, line):
        name = line.split()[0]
        if name == "ROPT":
            os.write(self.master, b"OK 01\r")
        elif name == "SKINFO":
            self._send(f"EINFO {OURS} 001D12900005747B 21 FFFF FFFE", "OK")
        elif name == "SKSCAN":
            description = ("Channel:21", "Channel Page:09", "Pan ID:B5FB", "Addr:001C6400601421A3", "LQI:E1")
            self._send(
                "OK", f"EVENT 20 {OURS}", "EPANDESC", *(f"  {item}" for item in description), "  PairID:01234567"
            )
            self._send(f"EVENT 22 {OURS}")
        elif name == "SKLL64":
            self._send(ADDRESS)
        elif name == "SKJOIN":
            self._send("OK", f"EVENT 21 {ADDRESS} 02", f"EVENT 02 {ADDRESS}", f"EVENT 21 {ADDRESS} 00")
            self._send(f"EVENT 25 {ADDRESS}")
        elif name == "SKTERM":
            self._send("OK", f"EVENT 27 {ADDRESS}")
        else:
            self._send("OK")

    def _answer(self, payload):
        self._send(f"EVENT 21 {ADDRESS} 00", "OK")
        codes = payload[12::2]
        supported = all(code in self.properties for code in codes)
        reply = payload[:4] + payload[7:10] + payload[4:7] + (b"\x72" if supported else b"\x52") + payload[11:12]
        for code in codes:
            edt = bytes.fromhex(self.properties.get(code, ""))
            reply += bytes([code, len(edt)]) + edt
        reply = self.misbehave(reply)
        head = f"ERXUDP {ADDRESS} {OURS} 0E1A 0E1A 001C6400601421A3 1"
        self._send(f"{head} {len(reply):04X} {reply.hex().upper()}")


@pytest.fixture
def adapter():
    made = Adapter()
    yield made
    made.stop()


@pytest.fixture
def reader(adapter, tmp_path):
    (tmp_path / "route-b").write_text("0123456789AB\n")
    config = BRouteConfig("broute", adapter.path, "0" * 32, tmp_path / "route-b")
    reader = create_reader(NamedMeter("home", MeterConfig("consumption", tmp_path / "k", 10_000, config)), Clock())
    make_session = reader._make_session

    def impatient():
        session = make_session()
        session.internal_xmit_interval = 0
        session.recv_timeout = 0.3
        session.xmit_retries = 1
        return session

    reader._make_session = impatient
    yield reader
    reader.close()


def test_a_meter_is_read_through_the_adapter(adapter, reader):
    sample = reader.sample()
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (6_512_800_000, 2_200_000, 632)
    assert (sample.time_s, sample.own_time, sample.serial_number) == (HALF_HOUR_S, True, "F24G366505")
    assert sample.import_rollover_mwh == 100_000_000_000
    assert "SKSETPWD C 0123456789AB" in adapter.commands
    reader.close()
    assert adapter.commands[-1] == "SKTERM"


def test_what_the_air_garbles_never_becomes_a_number(adapter, reader):
    reader.sample()
    reader._noted = None
    answers = {
        "cut": lambda reply: reply[:-3],
        "of another request": lambda reply: reply[:3] + bytes([reply[3] ^ 1]) + reply[4:],
        "without a value": lambda reply: reply.replace(bytes.fromhex("0000FE68"), bytes.fromhex("FFFFFFFE")),
        "of a wrong month": lambda reply: reply.replace(bytes.fromhex("07EA0514"), bytes.fromhex("07EA0D14")),
    }
    for name, misbehave in answers.items():
        adapter.misbehave = misbehave
        with pytest.raises(ReadFailure):
            reader.sample()
        adapter.misbehave = lambda reply: reply
        assert reader.sample().import_mwh == 6_512_800_000, name
        reader._noted = None


def test_an_adapter_that_is_not_there_is_named(reader):
    reader._make_session = lambda: momonga.Momonga("0" * 32, "x", "/dev/does-not-exist")
    with pytest.raises(ReadFailure, match=r"no session with the meter .*does-not-exist"):
        reader.sample()


def test_a_missing_password_file_or_library_is_a_mistake_of_the_config(tmp_path, monkeypatch):
    config = BRouteConfig("broute", tmp_path / "tty", "0" * 32, tmp_path / "missing")
    meter = NamedMeter("home", MeterConfig("consumption", tmp_path / "k", 10_000, config))
    with pytest.raises(WrongValue, match="a file with route B's password"):
        create_reader(meter, Clock())
    monkeypatch.setitem(sys.modules, "momonga", None)
    with pytest.raises(WrongValue, match=r"pip install 'dengen\[broute\]'"):
        create_reader(meter, Clock())
