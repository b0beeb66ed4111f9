"""S0 pulses: every edge is counted once, nothing is invented over a restart, a crash or a kernel queue that ran over.

The chip is a fake behind the interface of gpiod's line requests: a pipe that is readable while edges wait.
"""

import os
import select
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from dengen_testing.waiting import wait_until
from hypothesis import given
from hypothesis import strategies as st

from firmware_config.loader import WrongValue
from meter_agent.config import MeterConfig, NamedMeter, S0Config
from meter_agent.framing.pulses import PulseCount, StoredCount, decode_state, encode_state, energy_mwh, resumed
from meter_agent.intervals import MeterRules, MeterState, advance
from meter_agent.readers import create_reader
from meter_agent.readers.s0 import S0Reader
from meter_agent.readings import ReadFailure


@dataclass
class Edge:
    line_seqno: int


class FakeLine:
    def __init__(self):
        self._reader, self._writer = os.pipe()
        self.edges, self.number, self.released, self.failure = [], 0, False, None
        self._lock = threading.Lock()

    def pulse(self, count=1, lost=0):
        with self._lock:
            self.number += lost
            for _ in range(count):
                self.number += 1
                self.edges.append(Edge(self.number))
            if count:
                os.write(self._writer, b"x")

    def fail(self):
        self.failure = OSError("gone")
        os.write(self._writer, b"x")

    def fileno(self):
        return self._reader

    def read_edge_events(self):
        with self._lock:
            while select.select([self._reader], [], [], 0)[0]:
                os.read(self._reader, 4096)
            if self.failure is not None:
                raise self.failure
            edges, self.edges = self.edges, []
            return edges

    def release(self):
        self.released = True


class Clock:
    def monotonic_s(self):
        return 5.0

    def time_s(self):
        return 1_700_000_000.0


class Machine:
    """A board with one line, its boot id and the time since boot."""

    def __init__(self, tmp_path):
        self.lines, self.boot, self.boot_time_s = [], "boot-1", 100.0
        self.config = S0Config("s0", 1_000, tmp_path / "house.s0", 17)
        self.readers = []

    def reader(self, register="import"):
        def request():
            self.lines.append(FakeLine())
            return self.lines[-1]

        self.readers.append(
            S0Reader(
                "house",
                register,
                self.config,
                Clock(),
                request,
                lambda: self.boot,
                boot_time_s=lambda: self.boot_time_s,
            )
        )
        return self.readers[-1]


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    for reader in made.readers:
        reader.close()


def test_every_edge_is_counted_once(machine):
    reader = machine.reader()
    assert reader.sample().import_mwh == 0
    for batch in (1, 2, 1_000):
        machine.lines[0].pulse(batch)
    sample = reader.sample()
    assert (sample.import_mwh, sample.export_mwh, sample.time_s) == (1_003_000, None, 1_700_000_000.0)
    assert reader.sample().import_mwh == 1_003_000


def test_edges_are_taken_from_the_kernel_without_being_asked(machine):
    reader = machine.reader()
    reader.sample()
    machine.lines[0].pulse(3)
    wait_until(lambda: reader._counter._count.pulses == 3, "the thread to count")


def test_a_generator_counts_into_export(machine):
    reader = machine.reader("export")
    reader.sample()
    machine.lines[0].pulse(2)
    sample = reader.sample()
    assert (sample.import_mwh, sample.export_mwh) == (None, 2_000)


def test_a_restart_of_the_agent_goes_on_counting(machine):
    reader = machine.reader()
    first = reader.sample()
    machine.lines[0].pulse(5)
    reader.close()
    assert machine.lines[0].released
    machine.boot_time_s += 10
    again = machine.reader()
    sample = again.sample()
    assert (sample.import_mwh, sample.serial_number) == (5_000, first.serial_number)
    assert not machine.config.state_file.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda machine: setattr(machine, "boot", "boot-2"),
        lambda machine: setattr(machine, "boot_time_s", machine.boot_time_s + 31),
        lambda machine: setattr(machine, "boot_time_s", machine.boot_time_s - 1),
        lambda machine: machine.config.state_file.write_bytes(b"{}"),
        lambda machine: machine.config.state_file.write_bytes(machine.config.state_file.read_bytes()[:40]),
        lambda machine: machine.config.state_file.unlink(),
        lambda machine: object.__setattr__(machine.config, "pulses_per_kwh", 800),
    ],
    ids=["rebooted", "too long", "time went back", "no state", "cut state", "no file", "another meter"],
)
def test_what_does_not_connect_starts_anew_under_another_name(machine, change):
    reader = machine.reader()
    first = reader.sample()
    machine.lines[0].pulse(5)
    reader.close()
    change(machine)
    sample = machine.reader().sample()
    assert sample.import_mwh == 0
    assert sample.serial_number != first.serial_number


def test_a_crash_never_brings_back_an_old_count(machine):
    reader = machine.reader()
    reader.sample()
    machine.lines[0].pulse(5)
    reader.close()
    second = machine.reader()
    known = second.sample()
    machine.lines[1].pulse(7)
    # Killed: nothing is put down, and what had been was used up.
    sample = machine.reader().sample()
    assert (sample.import_mwh, known.import_mwh) == (0, 5_000)
    assert sample.serial_number != known.serial_number


def test_a_kernel_queue_that_ran_over_starts_a_new_count(machine):
    reader = machine.reader()
    first = reader.sample()
    machine.lines[0].pulse(5)
    machine.lines[0].pulse(2, lost=3)
    sample = reader.sample()
    assert (sample.import_mwh, sample.serial_number != first.serial_number) == (2_000, True)


def test_the_interval_maker_books_nothing_where_a_count_does_not_connect(machine):
    """A new count that is already higher than the old one was looks like consumption, but for its name."""
    rules = MeterRules(
        interval_s=1_800, register="import", capacity_w=10_000, resolution_mwh=1_000, stuck_after_wh=1_000
    )
    reader = machine.reader()
    first = reader.sample()
    state = advance(MeterState(), first, rules).state
    machine.boot = "boot-2"
    second = machine.reader()
    second.sample()
    machine.lines[1].pulse(3)
    later = second.sample()
    step = advance(state, later, rules)
    assert step.sealed == ()
    assert step.state.anchor.raw_mwh == first.import_mwh


def test_a_line_that_fails_is_reported_and_requested_again(machine):
    reader = machine.reader()
    first = reader.sample()
    machine.lines[0].fail()
    with pytest.raises(ReadFailure, match="the GPIO line fails"):
        reader.sample()
    sample = reader.sample()
    assert (len(machine.lines), machine.lines[0].released) == (2, True)
    assert sample.serial_number != first.serial_number


def test_a_line_that_cannot_be_requested_says_what_to_check(machine):
    def busy():
        raise OSError(16, "Device or resource busy")

    reader = S0Reader("house", "import", machine.config, Clock(), busy, lambda: "boot")
    with pytest.raises(ReadFailure, match=r"GPIO line 17 of /dev/gpiochip0 cannot be used .*busy.* is it free"):
        reader.sample()


def test_a_state_file_that_cannot_be_removed_is_a_failure(machine):
    machine.config.state_file.mkdir()
    with pytest.raises(ReadFailure, match="cannot be read and removed"):
        machine.reader().sample()


@given(st.integers(0, 2**40), st.integers(1, 10_000_000))
def test_odd_pulse_rates_lose_no_remainder(pulses, pulses_per_kwh):
    exact = Fraction(pulses * 1_000_000, pulses_per_kwh)
    assert 0 <= exact - energy_mwh(pulses, pulses_per_kwh) < 1


STORED = StoredCount(PulseCount("s0-1", 12), "boot", 3.5, 1_000)


def test_a_state_is_read_back_as_it_was_written():
    assert decode_state(encode_state(STORED)) == STORED
    assert resumed(STORED, "boot", 33.5, 1_000) == STORED.count


@given(st.binary(max_size=600))
def test_no_state_file_raises(raw):
    assert decode_state(raw) is None
    assert decode_state(b"[" * 600) is None


def test_a_missing_library_is_a_mistake_of_the_config(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "gpiod", None)
    meter = NamedMeter("house", MeterConfig("consumption", Path("k"), 1, machine.config))
    with pytest.raises(WrongValue, match=r"pip install 'dengen\[gpio\]'"):
        create_reader(meter, Clock())


def test_the_line_is_requested_as_configured(machine):
    """Against the real gpiod, which refuses a chip that is not there only after it took the settings."""
    pytest.importorskip("gpiod")
    object.__setattr__(machine.config, "chip", Path("/dev/no-such-chip"))
    meter = NamedMeter("house", MeterConfig("consumption", Path("k"), 1, machine.config))
    with pytest.raises(ReadFailure, match=r"line 17 of /dev/no-such-chip cannot be used .*No such file"):
        create_reader(meter, Clock()).sample()
