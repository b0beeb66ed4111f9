"""The fourteen things that go wrong with meters in the field, and the test that reproduces each on a wire.

| hazard | what happens | what must come out |
|---|---|---|
| 1 | a reply comes late and is taken for the next register's | withheld; the line is left alone, then opened again |
| 2 | a reply is short, its checksum right | withheld |
| 3 | not-a-number, sentinel or failed read stored as 0 | withheld |
| 4 | a counter drops to 0, comes back, or is another's | glitch, reset, swap, rollover told apart; no lifetime sent |
| 5 | a counter rolls over where its maker says, or its sign | counted over; without a word of the maker withheld |
| 6 | all energy of an outage lands in one interval | spread, and marked estimated |
| 7 | word order, byte order, scale factors that change | read from the profile, and from the same reply |
| 8 | the register counts in coarse steps | remainders are carried; the sum is the register's |
| 9 | no clock at boot, clocks that step, daylight saving | the agent's own time in UTC, once it is right |
| 10 | an SD card wears out | one transaction an interval and meter, a bounded log |
| 11 | an adapter has another number after it was unplugged | found again by its name; bytes come in batches |
| 12 | a meter wants pauses | the profile's pauses are kept |
| 13 | a queue in memory is gone after a restart | the journal is the queue |
| 14 | garbage, silence, a cable that is pulled | never hangs, and comes back by itself |

`SHOWN_BY` says where. What is not shown elsewhere is shown below, by a meter on a pseudo-terminal whose register,
serial number and silence a test sets, read by the real reader, and judged by the code that makes intervals.
"""

import fcntl
import re
import struct
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from dengen_testing.waiting import wait_until
from simulation_agent.year import QUIET, T0, Year
from support.wire_peers import SerialPeer, meter

from meter_agent.config import P1Config
from meter_agent.framing.p1 import crc16 as p1_crc16
from meter_agent.intervals import Fault, MeterRules, MeterState, advance
from meter_agent.profiles import MeterProfile, Pauses, Register, SerialDefaults, SerialNumber, load_profile
from meter_agent.readers import create_reader
from meter_agent.readers.modbus import ModbusLine, ModbusReader, SerialTarget
from meter_agent.readings import ReadFailure

pytestmark = pytest.mark.integration

TESTS = Path(__file__).parents[1]
HERE = "integration/test_hazards.py"
READERS = "integration/test_readers.py"
TELEGRAMS = "integration/test_telegram_readers.py"
INTERVALS = "unit/meter_agent/test_intervals.py"
AGENT = "integration/test_agent_mqtt.py"

SHOWN_BY = {
    1: [
        (READERS, "test_a_late_reply_is_never_taken_for_the_next_one"),
        (READERS, "test_a_late_reply_of_another_register_of_the_same_length_is_never_taken"),
        (TELEGRAMS, "test_a_late_answer_is_never_taken_for_the_next_one"),
        ("integration/test_readers_mbus.py", "test_a_late_answer_is_never_taken_for_the_next_one"),
    ],
    2: [
        (READERS, "test_a_bad_reply_is_a_failure_and_the_next_read_is_right"),
        (READERS, "test_a_bad_reply_over_tcp_is_a_failure_and_the_next_read_is_right"),
    ],
    3: [
        (READERS, "test_a_bad_reply_is_a_failure_and_the_next_read_is_right"),
        ("unit/meter_agent/test_modbus_reader.py", "test_a_value_that_is_not_available_is_a_failure_and_not_zero"),
        ("unit/meter_agent/test_profiles.py", "test_what_a_meter_calls_not_available_is_never_a_number"),
    ],
    4: [
        (HERE, "test_a_glitch_leaves_no_trace"),
        (HERE, "test_an_inverter_that_shows_zero_all_night_books_no_lifetime_in_the_morning"),
        (HERE, "test_a_reset_is_told_by_reads_that_agree_and_count"),
        (HERE, "test_a_swap_is_told_by_the_serial_number"),
        (HERE, "test_a_rollover_is_told_by_the_profile"),
    ],
    5: [
        (HERE, "test_a_rollover_is_told_by_the_profile"),
        (HERE, "test_a_counter_whose_sign_overflows_is_counted_on_if_the_profile_says_so"),
        (HERE, "test_a_counter_whose_sign_overflows_is_withheld_if_the_profile_says_nothing"),
    ],
    6: [
        (HERE, "test_an_outage_is_spread_and_marked"),
        (AGENT, "test_a_meter_that_cannot_be_read_is_reported_and_the_others_go_on"),
    ],
    7: [
        ("unit/meter_agent/test_decode.py", "test_every_order_of_words_and_bytes_gives_the_same_value"),
        ("unit/meter_agent/test_modbus_reader.py", "test_the_scale_factor_of_this_very_reply_is_used"),
        ("unit/meter_agent/test_profiles.py", "test_a_register_image_made_by_hand_is_read_right"),
    ],
    8: [(HERE, "test_coarse_steps_lose_nothing_in_sum")],
    9: [
        (HERE, "test_the_hour_that_daylight_saving_has_twice_is_two_hours"),
        (HERE, "test_a_meters_own_clock_does_not_matter"),
        (AGENT, "test_nothing_is_sealed_before_the_clock_is_synchronised_and_then_nothing_is_lost"),
        (INTERVALS, "test_a_clock_set_back_seals_no_interval_twice_and_the_next_one_says_since_when_it_counts"),
        ("simulation_agent/test_year.py", "test_clocks_that_are_set_by_hours_cost_no_wh_either"),
    ],
    10: [
        (HERE, "test_an_interval_is_one_transaction"),
        ("unit/meter_agent/test_journal.py", "test_events_are_bounded"),
    ],
    11: [
        (READERS, "test_an_unplugged_adapter_is_a_failure_and_comes_back_by_itself"),
        (TELEGRAMS, "test_an_unplugged_head_is_a_failure_and_comes_back_by_itself_under_another_number"),
        (HERE, "test_a_reply_that_comes_in_batches_is_read"),
    ],
    12: [(HERE, "test_the_pauses_of_the_profile_are_kept")],
    13: [
        (AGENT, "test_a_restarted_agent_sends_the_stored_bytes_and_goes_on_without_a_gap"),
        (AGENT, "test_a_long_backlog_goes_through_a_short_memory"),
        ("integration/test_agent_killed.py", "test_agents_killed_at_random_moments_lose_and_invent_nothing"),
    ],
    14: [
        (READERS, "test_a_line_that_never_falls_silent_does_not_hold_the_reader"),
        (TELEGRAMS, "test_noise_without_end_does_not_hold_the_asking_reader"),
        (READERS, "test_a_server_that_is_down_is_a_failure_and_is_found_when_it_is_back"),
        (
            "integration/test_readers_dlms.py",
            "test_an_unplugged_adapter_is_a_failure_and_comes_back_under_another_number",
        ),
    ],
}


@pytest.mark.parametrize("hazard", range(1, 15))
def test_every_hazard_is_shown_by_tests_that_exist(hazard):
    for file, name in SHOWN_BY[hazard]:
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), f"{file} has no {name}"


TIMEOUT_S = 0.15
COUNTER, SERIAL_NUMBER = 0x1000, 0x2000
RULES = MeterRules(interval_s=1800, register="import", capacity_w=10_000, resolution_mwh=100_000, stuck_after_wh=1_000)


def modbus_crc(data):
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc.to_bytes(2, "little")


def profile(**register):
    """A meter with one counter of two registers in Wh and a serial number."""
    return MeterProfile(
        name="hazard",
        maker="nobody",
        models=("one",),
        function_code=3,
        references=load_profile("abb-b23").references,
        serial_line=None,
        serial_number=SerialNumber(address=SERIAL_NUMBER, type="number", count=2, function_code=3),
        identity=None,
        registers={"import": Register(**{"address": COUNTER, "type": "u32", "unit": "Wh", **register})},
        sunspec=None,
    )


class SetClock:
    """The agent's clock, set by the test."""

    def __init__(self):
        self.now_s = float(T0)

    def monotonic_s(self):
        return self.now_s - T0

    def time_s(self):
        return self.now_s


class ModbusMeter(SerialPeer):
    """A meter on a pseudo-terminal that shows what the test says: the counter's raw 32 bits, and a serial number."""

    def __init__(self):
        super().__init__(lambda request, _peer: self.answer(request))
        self.shown = 0
        self.serial_number = 17
        self.silent = False

    def answer(self, request):
        if self.silent:
            return
        address = int.from_bytes(request[2:4], "big")
        value = self.shown if address == COUNTER else self.serial_number
        body = request[:2] + b"\x04" + value.to_bytes(4, "big")
        self.send(body + modbus_crc(body))


class House:
    """A meter, its reader, and what is made of its samples. Times are seconds after T0."""

    def __init__(self, peers, closing, meter_profile, rules=RULES, waits=None):
        self.meter = peers(ModbusMeter())
        self.clock = SetClock()
        line = ModbusLine(
            SerialTarget(self.meter.port, SerialDefaults(9600, "N")),
            wait_s=(lambda duration_s: None) if waits is None else waits.append,
            **({} if waits is None else {"monotonic_s": lambda: 0.0}),
        )
        self.reader = closing(ModbusReader("house-1", meter_profile, "import", line, 1, TIMEOUT_S, self.clock))
        self.rules = rules
        self.state = MeterState()
        self.intervals = []
        self.events = []
        self.failures = 0

    def read(self, after_s, shown=None):
        """Read the meter, which shows this from now on."""
        self.clock.now_s = T0 + after_s
        if shown is not None:
            self.meter.shown = shown
        try:
            sample = self.reader.sample()
        except ReadFailure:
            self.failures += 1
            return
        step = advance(self.state, sample, self.rules)
        self.state = step.state
        self.intervals += [(s.start_s - T0, s.energy_wh, s.quality.name) for s in step.sealed]
        self.events += [event.kind.value for event in step.events]


@pytest.fixture
def house(peers, closing):
    """Makes a House with a profile."""
    return lambda meter_profile=None, **more: House(peers, closing, meter_profile or profile(), **more)


def test_a_glitch_leaves_no_trace(house):
    """Hazard 4, and home-assistant/core #138077: 9113 kWh too much, once; and once nothing."""
    run = house()
    for after_s, shown in (
        (0, 5_000),
        (600, 5_100),
        (610, 9_118_000),
        (620, 5_101),
        (630, 0),
        (640, 5_102),
        (1800, 5_300),
    ):
        run.read(after_s, shown)
    assert run.intervals == [(0, 300, "MEASURED")]
    assert run.events == ["fault", "recovered"] * 2


def test_an_inverter_that_shows_zero_all_night_books_no_lifetime_in_the_morning(house):
    """Hazard 4, and evcc #30267."""
    run = house()
    run.read(0, 8_000_000)
    run.read(1500, 8_000_100)
    for after_s in range(1800, 12 * 3600, 900):
        run.read(after_s, 0)
    run.read(12 * 3600, 8_000_124)
    run.read(12 * 3600 + 1800, 8_000_200)
    assert sum(energy_wh for _, energy_wh, _ in run.intervals) == 200
    assert run.intervals[-1] == (12 * 3600, 76, "MEASURED")
    assert {quality for _, _, quality in run.intervals[:-1]} == {"ESTIMATED"}
    assert run.events == ["fault", "recovered"]


def test_a_reset_is_told_by_reads_that_agree_and_count(house):
    """Hazard 4: the same serial number, from 0."""
    run = house()
    for after_s, shown in ((0, 5_000), (900, 5_200), (910, 0), (980, 10), (1800, 100), (3600, 500)):
        run.read(after_s, shown)
    assert run.intervals == [(0, 300, "ESTIMATED"), (1800, 400, "MEASURED")]
    assert run.events == ["fault", "counter-reset"]


def test_a_swap_is_told_by_the_serial_number(house):
    """Hazard 4: the new meter's count would even fit."""
    run = house()
    run.read(0, 5_000)
    run.read(600, 5_100)
    run.meter.silent = True
    run.read(900)
    assert run.failures == 1
    run.meter.silent = False
    run.meter.serial_number = 18
    run.read(1200, 5_150)
    assert run.state.fault is Fault.SERIAL_CHANGED
    for after_s, shown in ((1270, 5_160), (1800, 5_250), (3600, 5_300)):
        run.read(after_s, shown)
    assert run.intervals == [(0, 200, "ESTIMATED"), (1800, 50, "MEASURED")]
    assert run.events == ["fault", "meter-swapped"]


def test_a_rollover_is_told_by_the_profile(house):
    """Hazards 4 and 5: a counter of 23 bits in tenths of a Wh, which starts again after 838 860.7 Wh."""
    run = house(profile(divide=10, rollover=2**23))
    for after_s, tenths in ((0, 2**23 - 3_000), (1800, 2**23 - 1), (3600, 999), (5400, 1_999)):
        run.read(after_s, tenths)
    assert run.intervals == [(0, 300, "MEASURED"), (1800, 100, "MEASURED"), (3600, 100, "MEASURED")]
    assert run.events == ["rolled-over"]


def test_a_counter_whose_sign_overflows_is_counted_on_if_the_profile_says_so(house):
    """Hazard 5."""
    for first, then in ((2**31 - 100, 2**31 + 100), (2**32 - 100, 100)):
        run = house(profile(type="s32", rollover=2**32))
        run.read(0, first)
        run.read(1800, then)
        assert run.intervals == [(0, 200, "MEASURED")]


def test_a_counter_whose_sign_overflows_is_withheld_if_the_profile_says_nothing(house):
    """Hazard 5."""
    run = house(profile(type="s32"))
    run.read(0, 2**31 - 100)
    for after_s in range(600, 7200, 600):
        run.read(after_s, 2**31 + after_s)
    assert (run.intervals, run.failures) == ([], 11)


def test_an_outage_is_spread_and_marked(house):
    """Hazard 6, and evcc #32117: nothing of three hours in one interval."""
    run = house()
    run.read(0, 1_000)
    run.read(1800, 1_200)
    run.meter.silent = True
    run.read(3600)
    run.meter.silent = False
    run.read(4 * 1800, 1_801)
    run.read(5 * 1800, 1_900)
    spread = [(1800 * i, 200 + (i == 3), "ESTIMATED") for i in (1, 2, 3)]
    assert run.intervals == [(0, 200, "MEASURED"), *spread, (7200, 99, "MEASURED")]


@pytest.mark.parametrize(
    ("register", "image", "step_wh"),
    [
        ({"type": "f32", "unit": "kWh"}, lambda wh: int.from_bytes(struct.pack(">f", wh / 1_000), "big"), 16),
        ({"unit": "kWh", "divide": 10}, lambda wh: wh // 100, 100),
    ],
    ids=["f32 kWh at 131 MWh: 15.6 Wh", "tenths of a kWh: 100 Wh"],
)
def test_coarse_steps_lose_nothing_in_sum(house, register, image, step_wh):
    """Hazard 8: 7 Wh a minute, seen through a register that moves in larger steps."""
    run = house(profile(**register), rules=replace(RULES, capacity_w=1_000))
    first_wh = 131_500_000
    for after_s in range(0, 6 * 3_600 + 1, 60):
        run.read(after_s, image(first_wh + after_s * 7 // 60))
    energies = [energy_wh for _, energy_wh, _ in run.intervals]
    assert abs(sum(energies) - 6 * 420) <= step_wh
    assert all(abs(energy_wh - 210) <= step_wh for energy_wh in energies)
    assert run.state.boundary.total_wh == run.state.anchor.total_mwh // 1_000
    assert run.events == []


def telegram(kwh, timestamp):
    body = f"/ISk5\\2MT382-1000\r\n\r\n1-3:0.2.8(50)\r\n0-0:1.0.0({timestamp})\r\n1-0:1.8.1({kwh:010.3f}*kWh)\r\n!"
    return body.encode() + b"%04X\r\n" % p1_crc16(body.encode())


@pytest.fixture
def p1(peers, closing):
    """A P1 port, its reader, and the clock of the agent."""
    peer = peers(SerialPeer())
    clock = SetClock()
    reader = closing(create_reader(meter(P1Config("p1", peer.port, timeout_s=TIMEOUT_S)), clock))
    with pytest.raises(ReadFailure):
        reader.sample()

    def read(time_s, kwh, timestamp):
        clock.now_s = float(time_s)
        peer.send(telegram(kwh, timestamp))
        return reader.sample()

    return read


def test_the_hour_that_daylight_saving_has_twice_is_two_hours(p1):
    """Hazard 9, and dsmr-reader #541: 02:30 in summer time and 02:30 in winter time, an hour later."""
    first_s = 1_792_888_200  # 2026-10-25 00:30 UTC
    state, starts = MeterState(), []
    for number, timestamp in enumerate(("261025023000S", "261025020000W", "261025023000W", "261025030000W")):
        step = advance(state, p1(first_s + 1800 * number, 1.0 + number, timestamp), RULES)
        state = step.state
        starts += [(interval.start_s, interval.energy_wh) for interval in step.sealed]
    assert starts == [(first_s + 1800 * number, 1_000) for number in range(3)]


@pytest.mark.parametrize("timestamp", ["010101000000W", "991231235959W", "261025023000X"])
def test_a_meters_own_clock_does_not_matter(p1, timestamp):
    """Hazard 9, and vzlogger #488."""
    assert p1(T0 + 7, 12.5, timestamp).time_s == T0 + 7


def test_an_interval_is_one_transaction(tmp_path, monkeypatch):
    """Hazard 10, with receipts, deliveries and everything else of two days."""
    year = Year(tmp_path, replace(QUIET, period_s=10), 1)
    commits = []
    start = year._start

    def counted():
        start()
        year._agent._journal._db.set_trace_callback(
            lambda statement: commits.append(statement) if statement == "COMMIT" else None
        )

    year._start = counted
    year.run(monkeypatch)
    # The first boundary seals nothing and is kept as well.
    assert len(commits) <= len(year.broker.demands) + 1
    assert len(year.broker.demands) > 2 * 48
    year.close()


def test_a_reply_that_comes_in_batches_is_read(house):
    """Hazard 11: an FTDI adapter hands over what came every 16 ms, so a reply arrives in pieces."""
    run = house()
    slave, send = run.meter._slave, run.meter.send

    def in_pieces(raw):
        for i in range(0, len(raw), 4):
            send(raw[i : i + 4])
            wait_until(lambda: _unread_bytes(slave) == 0, "the reader to take the piece")

    run.meter.send = in_pieces
    run.read(0, 1_000)
    run.read(1800, 1_500)
    assert run.intervals == [(0, 500, "MEASURED")]


def _unread_bytes(descriptor):
    return struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))[0]


def test_the_pauses_of_the_profile_are_kept(house):
    """Hazard 12: half a second after connecting, 250 ms between requests."""
    waits = []
    run = house(replace(profile(), pauses=Pauses(after_connect_ms=500, between_requests_ms=250)), waits=waits)
    run.read(0, 1_000)
    run.read(10, 1_001)
    # The serial number and the counter, then the counter alone; time stands still, so every pause is waited in full.
    assert waits == [0.5, 0.25, 0.25]
    assert len(run.meter.requests) == 3
