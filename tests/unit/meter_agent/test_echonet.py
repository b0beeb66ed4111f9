"""ECHONET Lite route B: what the meter noted, with its own time; FFFFFFFE is never a number.

Property values of real meters, as published by their owners: a script on GitHub whose answers were "captured live from
my home smart meter" (D3, D7, 8D, E7, EA of 2026-05-20 14:00), the Qiita article on Wi-SUN with Elixir's Livebook that
follows https://www.ratoc-e2estore.com/blog/2023/06/wsuha-02 (EA and EB of 2023-12-19 00:30 in one notification).
They are decoded by momonga, as in the agent.
"""

from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meter_agent.framing.echonet import (
    JAPAN,
    NO_ENERGY,
    NO_POWER,
    ImplausibleProperty,
    Scale,
    energy_mwh,
    half_hour_s,
    power_w,
    scale,
)
from meter_agent.intervals import retimed
from meter_agent.readers.broute import BRouteReader, Errors
from meter_agent.readings import ReadFailure

momonga = pytest.importorskip("momonga")
momonga_data = pytest.importorskip("momonga.momonga_echonet_data")
momonga_device = pytest.importorskip("momonga.momonga_device")
Parser = momonga_data.EchonetDataParser

EA_2026 = bytes.fromhex("07EA05140E00000000FE68")
EA_2023, EB_2023 = bytes.fromhex("07E70C13001E000000458E"), bytes.fromhex("07E70C13001E0000000015")
HALF_HOUR_2026_S = int(datetime(2026, 5, 20, 5, 0, tzinfo=UTC).timestamp())
HALF_HOUR_2023_S = int(datetime(2023, 12, 18, 15, 30, tzinfo=UTC).timestamp())


def noted(edt):
    """As momonga gives it when its unit and coefficient are 1."""
    return Parser.parse_cumulative_energy_measured_at_fixed_time(edt, 1, 1)


def test_what_real_meters_noted_is_energy_at_a_half_hour_in_utc():
    tenths = scale(0.1, 1, 6)
    assert tenths == Scale(100_000, 100_000_000_000)
    value = noted(EA_2026)
    assert energy_mwh(value["cumulative energy"], tenths) == 6_512_800_000
    assert half_hour_s(value["timestamp"], HALF_HOUR_2026_S + 60.0) == HALF_HOUR_2026_S
    assert energy_mwh(noted(EA_2023)["cumulative energy"], tenths) == 1_780_600_000
    assert energy_mwh(noted(EB_2023)["cumulative energy"], tenths) == 2_100_000
    assert half_hour_s(noted(EB_2023)["timestamp"], HALF_HOUR_2023_S) == HALF_HOUR_2023_S


ERXUDP = (
    "ERXUDP FE80:0000:0000:0000:021C:6400:6014:21A3 FE80:0000:0000:0000:021D:1290:0005:747B 0E1A 0E1A 001C6400601421A3 "
    "1 0019 1081000102880105FF017201EA0B07EA05140E00000000FE68"
)
"""What a BP35A1 said when its owner's meter answered: the whole line, from the script named above."""


def test_the_whole_line_of_an_adapter_is_read_as_its_owner_captured_it():
    received = momonga_device.parse_sk_line(ERXUDP, momonga_device.BP35A1Strategy())
    asked = [momonga_data.EchonetProperty(0xEA)]
    (answer,) = momonga.Momonga._extract_response_payload(received.data, 1, asked)
    assert energy_mwh(noted(answer.edt)["cumulative energy"], scale(0.1, 1, 6)) == 6_512_800_000


@pytest.mark.parametrize("count", [None, NO_ENERGY])
def test_no_value_is_never_a_number(count):
    """momonga 0.7.0 gives None; versions before gave the code itself, multiplied."""
    assert energy_mwh(count, Scale(100_000, None)) is None
    assert power_w(NO_POWER) is None
    assert power_w(-250) == -250


def test_a_count_beyond_the_digits_is_no_reading():
    assert energy_mwh(999_999, scale(0.1, 1, 6)) == 99_999_900_000
    with pytest.raises(ImplausibleProperty, match="reads 1000000, more than the meter has digits for"):
        energy_mwh(1_000_000, scale(0.1, 1, 6))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((0.5, 1, 6), "units of 0.5 kWh"), ((1, 0, 6), "coefficient"), ((1, 4_294_967_294, 6), "D3"), ((1, 1, 9), "D7")],
)
def test_a_scale_that_cannot_be_is_refused(arguments, reason):
    with pytest.raises(ImplausibleProperty, match=reason):
        scale(*arguments)


@given(st.sampled_from([1, 0.1, 0.01, 0.001, 0.0001, 10, 100, 1000, 10000]), st.integers(0, 99_999_999))
def test_every_unit_of_the_standard_is_exact(unit_kwh, count):
    exact = Fraction(str(unit_kwh)) * 3 * count * 1_000_000
    assert energy_mwh(count, scale(unit_kwh, 3, 8)) == exact


@pytest.mark.parametrize(
    ("timestamp", "now_s", "reason"),
    [
        (datetime(2026, 5, 20, 14, 10), HALF_HOUR_2026_S, "no half hour"),  # noqa: DTZ001 (as momonga gives it)
        (datetime(2026, 5, 20, 14, 0), HALF_HOUR_2026_S - 61, "check this gateway's clock"),  # noqa: DTZ001
        (datetime(2026, 5, 20, 14, 0), HALF_HOUR_2026_S + 2_401, "check this gateway's clock"),  # noqa: DTZ001
        (datetime(2019, 5, 20, 14, 0), HALF_HOUR_2026_S, "2019-05-20 14:00"),  # noqa: DTZ001
    ],
)
def test_a_meter_whose_clock_is_wrong_is_not_believed(timestamp, now_s, reason):
    with pytest.raises(ImplausibleProperty, match=reason):
        half_hour_s(timestamp, now_s)


class LibraryError(Exception):
    pass


class Unreadable(LibraryError):
    pass


class Clock:
    def __init__(self, time_s):
        self.time = time_s
        self.monotonic = 1_000.0

    def monotonic_s(self):
        return self.monotonic

    def time_s(self):
        return self.time

    def advance(self, seconds):
        self.time += seconds
        self.monotonic += seconds


class Meter:
    """A session and the meter behind it. Counts are raw; momonga's unit and coefficient are applied as it does."""

    def __init__(self, clock, properties=(0x8D, 0xD7, 0xE0, 0xE3, 0xE7, 0xEA, 0xEB)):
        self.clock, self.properties = clock, properties
        self.energy_unit, self.energy_coefficient = 1, 1
        self.imports, self.exports, self.power, self.lag_s = 65_128, 22, 632, 0
        self.asked, self.opened, self.closed, self.failure = [], 0, 0, None

    def open(self):
        self.opened += 1
        self.fail()
        self.energy_unit, self.energy_coefficient = 0.1, 1

    def fail(self):
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def close(self):
        self.closed += 1
        self.fail()

    def get_properties_to_get_values(self):
        return set(self.properties)

    def request_to_get(self, properties):
        assert properties <= set(self.properties)
        self.fail()
        self.asked.append(sorted(properties))
        half_hour = (self.clock.time - self.lag_s) // 1_800 * 1_800
        stamp = datetime.fromtimestamp(half_hour, JAPAN).replace(tzinfo=None)

        def energy(count):
            return None if count is None else count * self.energy_unit * self.energy_coefficient

        values = {
            0x8D: "F24G3660SP\0\0",
            0xD7: 6,
            0xE0: energy(self.imports),
            0xE3: energy(self.exports),
            0xE7: self.power,
            0xEA: {"timestamp": stamp, "cumulative energy": energy(self.imports)},
            0xEB: {"timestamp": stamp, "cumulative energy": energy(self.exports)},
        }
        return {code: values[code] for code in properties}


def reader_of(meter, register="import", values="half_hour"):
    return BRouteReader("home", register, values, meter.clock, lambda: meter, Errors(LibraryError, (Unreadable,)))


def test_a_sample_is_what_the_meter_noted_at_the_half_hour():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100))
    sample = reader_of(meter).sample()
    assert (sample.time_s, sample.monotonic_s, sample.own_time) == (HALF_HOUR_2026_S, 900.0, True)
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (6_512_800_000, 2_200_000, 632)
    assert (sample.serial_number, sample.import_rollover_mwh) == ("F24G3660SP", 100_000_000_000)
    assert retimed(sample, 5_000.0, 99.0) == sample


def test_between_half_hours_only_the_power_is_asked_for():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100))
    reader = reader_of(meter)
    first = reader.sample()
    meter.imports, meter.power = 65_130, 700
    meter.clock.advance(1_700)
    again = reader.sample()
    assert (again.time_s, again.import_mwh, again.power_w) == (first.time_s, first.import_mwh, 700)
    assert meter.asked[-1] == [0xE7]
    meter.clock.advance(60)
    later = reader.sample()
    assert (later.time_s, later.import_mwh) == (HALF_HOUR_2026_S + 1_800, 6_513_000_000)
    assert later.monotonic_s - first.monotonic_s == 1_800


def test_a_step_of_our_clock_does_not_move_what_the_meter_noted():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100))
    reader = reader_of(meter)
    first = reader.sample()
    meter.clock.time += 45  # NTP sets the clock; the meter's own goes on
    meter.lag_s = 45
    meter.clock.advance(1_800)
    later = reader.sample()
    assert (later.time_s - first.time_s, later.monotonic_s - first.monotonic_s) == (1_800, 1_800)


def test_no_value_for_the_billed_register_is_a_failure_and_for_the_other_only_left_out():
    for missing in (None, NO_ENERGY):
        meter = Meter(Clock(HALF_HOUR_2026_S + 100))
        meter.exports = missing
        assert reader_of(meter).sample().export_mwh is None
        with pytest.raises(ReadFailure, match="no value for export at present"):
            reader_of(meter, "export").sample()
        with pytest.raises(ReadFailure, match="no value for export at present"):
            reader_of(meter, "export", "present").sample()


def test_present_values_are_taken_at_our_time():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100))
    sample = reader_of(meter, values="present").sample()
    assert (sample.time_s, sample.own_time, sample.import_mwh) == (HALF_HOUR_2026_S + 100, False, 6_512_800_000)
    assert sample.export_mwh == 2_200_000


def test_a_lost_session_is_opened_anew_and_an_unreadable_answer_is_not():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100))
    reader = reader_of(meter)
    reader.sample()
    meter.failure = Unreadable("EPC EA")
    with pytest.raises(ReadFailure, match="the meter's answer cannot be used: EPC EA"):
        reader.sample()
    assert (meter.opened, meter.closed) == (1, 0)
    for failure in (LibraryError("session expired"), OSError("adapter unplugged")):
        meter.failure = failure
        with pytest.raises(ReadFailure, match=r"no session with the meter .*check route B id"):
            reader.sample()
        assert reader.sample().import_mwh == 6_512_800_000
    assert (meter.opened, meter.closed) == (3, 2)


def test_a_session_that_does_not_open_is_closed_again():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100))
    meter.failure = LibraryError("no PAN")
    with pytest.raises(ReadFailure, match="no PAN"):
        reader_of(meter).sample()
    assert meter.closed == 1


def test_a_meter_without_the_billed_register_says_what_to_do():
    meter = Meter(Clock(HALF_HOUR_2026_S + 100), properties=(0xE0, 0xE7, 0xEA))
    assert reader_of(meter).sample().export_mwh is None
    with pytest.raises(ReadFailure, match="use register import"):
        reader_of(meter, "export").sample()
    meter = Meter(Clock(HALF_HOUR_2026_S + 100), properties=(0xE0, 0xE7))
    with pytest.raises(ReadFailure, match='set values = "present"'):
        reader_of(meter).sample()
