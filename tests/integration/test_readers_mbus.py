"""Meters on an M-Bus at a pseudo-terminal that is late, short, garbled, doubled, silent and unplugged.

Without parity, which pseudo-terminals do not have: glibc reports EINVAL when it is set a second time.

The frame is that of a real Finder 7E.23 (https://github.com/rscada/libmbus test/test-frames/).
"""

import logging
import os
import pty
import select
import subprocess
import sys
import threading
import time
import tty
from pathlib import Path

import pytest

from firmware_config.loader import WrongValue
from meter_agent.config import MBusConfig, MeterConfig, NamedMeter
from meter_agent.readers import create_reader, create_readers
from meter_agent.readings import ReadFailure

pytestmark = pytest.mark.integration

pytest.importorskip("meterbus")

ACK = b"\xe5"


def frame(payload, address=1):
    """A meter's answer with those records."""
    body = bytes([0x08, address, 0x72]) + bytes.fromhex("07620023 2E19 23 02 92 00 0000") + bytes.fromhex(payload)
    return bytes([0x68, len(body), len(body), 0x68]) + body + bytes([sum(body) & 0xFF, 0x16])


ENERGY = "04 03 E8030000 04 2B 7B000000"
"""1000 Wh, 123 W."""
NEXT = "04 03 E9030000"


class Clock:
    def monotonic_s(self):
        return time.monotonic()

    def time_s(self):
        return 1_700_000_000.0


class Bus:
    """A level converter and the meters behind it: `answer(request)` gives what they send."""

    def __init__(self, answer, echo=False):
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self.path = Path(os.ttyname(self._slave))
        self.answer, self.echo, self.requests = answer, echo, []
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self):
        os.write(self._wake_writer, b"x")
        self._thread.join(5)

    def unplug(self):
        self.stop()
        os.close(self._slave)
        os.close(self.master)

    def _run(self):
        received = b""
        while True:
            readable, _, _ = select.select([self.master, self._wake_reader], [], [])
            if self._wake_reader in readable:
                return
            received += os.read(self.master, 4096)
            while len(received) >= 5:
                request, received = received[:5], received[5:]
                self.requests.append(request)
                os.write(self.master, (request if self.echo else b"") + self.answer(request))


def is_reset(request):
    return request[1] == 0x40


@pytest.fixture
def made():
    """Makes buses and readers, and ends them."""
    things = []

    class Make:
        def bus(self, answer, **more):
            things.append(Bus(answer, **more))
            return things[-1]

        def reader(self, path, **more):
            config = MBusConfig("mbus", path, **({"timeout_s": 0.15, "parity": "N"} | more))
            meter = NamedMeter("house-1", MeterConfig("consumption", "key", 10_000, config))
            things.append(create_reader(meter, Clock()))
            return things[-1]

    yield Make()
    for thing in reversed(things):
        thing.stop() if isinstance(thing, Bus) else thing.close()


@pytest.mark.parametrize("echo", [False, True])
def test_a_meter_is_reset_asked_and_read(made, echo):
    bus = made.bus(lambda request: ACK if is_reset(request) else frame(ENERGY), echo=echo)
    sample = made.reader(bus.path).sample()
    assert (sample.import_mwh, sample.power_w, sample.serial_number) == (1_000_000, 123, "FIN-23006207")
    assert bus.requests == [bytes.fromhex("1040014116"), bytes.fromhex("107B017C16")]


def test_an_answer_in_several_frames_is_read_to_its_end(made):
    def answer(request):
        return {0x40: ACK, 0x7B: frame("04 13 01000000 1F"), 0x5B: frame("84 10 03 01000000 84 20 03 02000000")}[
            request[1]
        ]

    assert made.reader(made.bus(answer).path).sample().import_mwh == 3_000


def test_an_answer_without_end_is_given_up(made):
    bus = made.bus(lambda request: ACK if is_reset(request) else frame("1F"))
    with pytest.raises(ReadFailure, match="does not end after 8 frames"):
        made.reader(bus.path).sample()


BAD_ANSWERS = {
    "silent": b"",
    "cut": frame(ENERGY)[:20],
    "garbled": frame(ENERGY)[:12] + b"\x00" + frame(ENERGY)[13:],
    "noise": bytes(range(256)),
    "noise that starts as a frame": b"\x68\xff\xff\x68" + bytes(300),
    "of another meter": frame(ENERGY, address=2),
    "an acknowledgement": ACK,
    "without counters": frame("04 13 01000000"),
    "negative": frame("04 03 FFFFFFFF"),
    "cut inside its records": frame("04 03 E803"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_is_a_failure_and_the_next_read_is_right(made, name):
    bad = [BAD_ANSWERS[name]]
    bus = made.bus(lambda request: ACK if is_reset(request) else bad.pop() if bad else frame(NEXT))
    reader = made.reader(bus.path)
    with pytest.raises(ReadFailure, match="house-1"):
        reader.sample()
    assert reader.sample().import_mwh == 1_001_000


def test_a_late_answer_is_never_taken_for_the_next_one(made):
    """The first answer comes after its time limit, when the meter was already reset for the next read."""
    late = [frame(ENERGY)]

    def answer(request):
        if is_reset(request):
            return ACK + late.pop() if len(bus.requests) == 3 and late else ACK
        return b"" if len(bus.requests) == 2 else frame(NEXT)

    bus = made.bus(answer)
    reader = made.reader(bus.path)
    with pytest.raises(ReadFailure, match="no answer at all"):
        reader.sample()
    results = []
    for _ in range(2):
        try:
            results.append(reader.sample().import_mwh)
        except ReadFailure:
            results.append(None)
    assert set(results) <= {None, 1_001_000}
    assert results[-1] == 1_001_000


def test_a_doubled_answer_is_read_once(made):
    bus = made.bus(lambda request: ACK if is_reset(request) else frame(ENERGY) * 2)
    reader = made.reader(bus.path)
    assert [reader.sample().import_mwh for _ in range(3)] == [1_000_000] * 3


def test_an_unplugged_converter_is_a_failure_and_comes_back_by_itself(made, tmp_path):
    def answer(request):
        return ACK if is_reset(request) else frame(ENERGY)

    by_id = tmp_path / "usb-mbus"
    first = made.bus(answer)
    by_id.symlink_to(first.path)
    reader = made.reader(by_id)
    reader.sample()
    first.unplug()
    by_id.unlink()
    for reason in ("is gone", "is missing"):
        with pytest.raises(ReadFailure, match=reason):
            reader.sample()
    by_id.symlink_to(made.bus(answer).path)
    assert reader.sample().import_mwh == 1_000_000


def test_two_meters_share_a_bus(made):
    counts = {1: "04 03 E8030000", 2: "04 03 D0070000"}
    bus = made.bus(lambda request: ACK if is_reset(request) else frame(counts[request[2]], request[2]))
    configs = {f"house-{i}": MBusConfig("mbus", bus.path, address=i, parity="N", timeout_s=2.0) for i in (1, 2)}
    meters = [NamedMeter(name, MeterConfig("consumption", "key", 10_000, config)) for name, config in configs.items()]
    readers = create_readers(meters, Clock())
    results = {name: set() for name in readers}

    def read(name):
        results[name].update(readers[name].sample().import_mwh for _ in range(10))

    threads = [threading.Thread(target=read, args=(name,)) for name in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    readers["house-1"].close()
    assert results == {"house-1": {1_000_000}, "house-2": {2_000_000}}


def test_meters_that_set_one_bus_differently_and_a_missing_library_are_mistakes_of_the_config(tmp_path, monkeypatch):
    configs = [MBusConfig("mbus", tmp_path / "tty", baud=baud) for baud in (2_400, 9_600)]
    meters = [NamedMeter(f"m{i}", MeterConfig("consumption", "key", 1, config)) for i, config in enumerate(configs)]
    with pytest.raises(WrongValue, match="same baud"):
        create_readers(meters, Clock())
    monkeypatch.setitem(sys.modules, "meterbus", None)
    with pytest.raises(WrongValue, match=r"pip install 'dengen\[mbus\]'"):
        create_readers(meters[:1], Clock())


def test_the_library_does_not_set_up_our_logging():
    code = (
        "import logging; from pathlib import Path\n"
        "from meter_agent.config import *; from meter_agent.readers import create_reader\n"
        "config = MeterConfig('consumption', Path('k'), 1, MBusConfig('mbus', Path('/nowhere')))\n"
        "create_reader(NamedMeter('house-1', config), None)\n"
        f"assert (logging.getLogger().handlers, logging.getLogger().level) == ([], {logging.WARNING})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
