"""What the Modbus reader asks for and makes of the answers, over a line that is a table of registers."""

import pytest
from pymodbus.exceptions import ModbusException

from meter_agent.profiles import load_profile
from meter_agent.readers.modbus import (
    MAX_BUFFERED_BYTES,
    SERIAL_NUMBER_MAX_AGE_S,
    LineFailure,
    ModbusReader,
    _refuse_floods,
)
from meter_agent.readings import ReadFailure


class FakeClock:
    def __init__(self):
        self.now_s = 0.0

    def monotonic_s(self):
        return self.now_s

    def time_s(self):
        return 1_700_000_000 + self.now_s


class FakeLine:
    """Registers by (function code, address). What is missing is answered as exception 2."""

    def __init__(self, clock, **blocks):
        self.clock = clock
        self.registers = {}
        self.requests = []
        self.connections = 1
        self.failure = None

    def put(self, function_code, address, image):
        raw = bytes.fromhex(image)
        for i in range(0, len(raw), 2):
            self.registers[function_code, address + i // 2] = int.from_bytes(raw[i : i + 2], "big")

    def read(self, device_id, request, pauses, timeout_s):
        self.requests.append((request.function_code, request.address, request.count))
        self.clock.now_s += 0.25
        if self.failure is not None:
            raise self.failure
        wanted = [(request.function_code, address) for address in range(request.address, request.end)]
        if any(place not in self.registers for place in wanted):
            raise LineFailure("exception 2", refused=True)
        return tuple(self.registers[place] for place in wanted)

    def close(self):
        pass


def reader_of(profile, line, clock, billed=None):
    loaded = load_profile(profile)
    billed = billed or ("export" if loaded.sunspec else "import")
    return ModbusReader("house-1", loaded, billed, line, 1, 1.0, clock)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def abb(clock):
    line = FakeLine(clock)
    line.put(3, 0x5000, "0000 0000 0012 D687 0000 0000 0000 0064")
    line.put(3, 0x5B14, "0001 E240")
    line.put(3, 0x8900, "0135 2D5E")
    return line


def test_a_sample_has_all_registers_and_the_time_of_the_counters_reply(clock, abb):
    sample = reader_of("abb-b23", abb, clock).sample()
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (12_345_670_000, 1_000_000, 1235)
    assert sample.serial_number == "20262238"
    # Serial number, power, counters: the counters come last, and the sample is of that moment.
    assert abb.requests == [(3, 0x8900, 2), (3, 0x5B14, 2), (3, 0x5000, 8)]
    assert (sample.monotonic_s, sample.time_s) == (0.75, 1_700_000_000.75)


def test_the_serial_number_is_read_again_only_when_the_meter_may_be_another(clock, abb):
    reader = reader_of("abb-b23", abb, clock)

    def reads_of_the_serial_number():
        before = len(abb.requests)
        reader.sample()
        return abb.requests[before:].count((3, 0x8900, 2))

    assert reads_of_the_serial_number() == 1
    assert reads_of_the_serial_number() == 0
    clock.now_s += SERIAL_NUMBER_MAX_AGE_S + 1
    assert reads_of_the_serial_number() == 1
    abb.connections += 1
    assert reads_of_the_serial_number() == 1
    abb.put(3, 0x5000, "0000 0000 0000 0001")  # the counter dropped
    assert reads_of_the_serial_number() == 1
    abb.failure = LineFailure("no reply")
    with pytest.raises(ReadFailure):
        reader.sample()
    abb.failure = None
    assert reads_of_the_serial_number() == 1


def test_a_swapped_meter_shows_its_own_serial_number_with_its_first_counter(clock, abb):
    reader = reader_of("abb-b23", abb, clock)
    assert reader.sample().serial_number == "20262238"
    abb.put(3, 0x5000, "0000 0000 0000 0001")
    abb.put(3, 0x8900, "0135 2D5F")
    sample = reader.sample()
    assert (sample.import_mwh, sample.serial_number) == (10_000, "20262239")


def test_tariffs_are_read_in_one_request_and_added(clock):
    line = FakeLine(clock)
    line.put(3, 65, "C496 8000")  # -1204 W
    line.put(3, 801, "4132 D687 2B02 0C4A 40F8 6A00 0000 0000 4059 0000 0000 0000 0000 0000 0000 0000")
    sample = reader_of("siemens-pac2200", line, clock).sample()
    # 1234567.168 Wh and 100000 Wh; 100 Wh and 0 Wh.
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (1_334_567_168, 100_000, -1204)
    assert (3, 801, 16) in line.requests
    line.put(3, 805, "7FF8 0000 0000 0000")
    with pytest.raises(ReadFailure, match="not a number"):
        reader_of("siemens-pac2200", line, clock).sample()


def test_a_meter_without_a_serial_number_is_read(clock):
    line = FakeLine(clock)
    line.put(4, 0x34, "0000 0000" + "0000" * 18 + "4640 E6B7 3F9D F3B6")
    sample = reader_of("eastron-sdm630", line, clock).sample()
    assert (sample.import_mwh, sample.serial_number) == (12_345_679_000, None)
    assert line.requests == [(3, 0xFC00, 2), (4, 0x34, 24)]


def test_a_value_that_is_not_available_is_a_failure_and_not_zero(clock, abb):
    abb.put(3, 0x5004, "FFFF FFFF FFFF FFFF")
    with pytest.raises(ReadFailure, match=r"house-1: no sure value: .*not available"):
        reader_of("abb-b23", abb, clock, billed="export").sample()


def test_a_variant_without_export_is_read_and_says_so(clock, abb):
    abb.put(3, 0x5004, "FFFF FFFF FFFF FFFF")
    abb.put(3, 0x5B14, "7FFF FFFF")
    sample = reader_of("abb-b23", abb, clock).sample()
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (12_345_670_000, None, None)


def test_registers_that_the_meter_refuses_are_left_out_from_then_on(clock):
    """evcc #31143: some variants answer exception 2 to the export counter."""
    line = FakeLine(clock)
    line.put(3, 0x5000, "0000 0000 0012 D687")
    line.put(3, 0x5B14, "0001 E240")
    reader = reader_of("abb-b23", line, clock)
    for _ in range(2):
        line.requests.clear()
        sample = reader.sample()
        assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (12_345_670_000, None, 1235)
    assert line.requests == [(3, 0x5B14, 2), (3, 0x5000, 4)]


def test_a_missing_billed_register_is_a_failure(clock):
    line = FakeLine(clock)
    line.put(3, 0x5B14, "0000 0000")
    with pytest.raises(ReadFailure, match="exception 2"):
        reader_of("abb-b23", line, clock).sample()


def test_a_counter_that_the_profile_lacks_is_a_failure(clock):
    with pytest.raises(ReadFailure, match="has no import counter"):
        reader_of("sunspec-inverter", sunspec_line(clock), clock, billed="import").sample()


COMMON = "0001 0042" + "0000" * 48 + "5341 3132 3334" + "0000" * 13 + "0001 8000"
"""Model 1 with 66 registers and the serial number SA1234."""

INVERTER = (
    "0067 0032" + "FFFF" * 4 + "8000" + "FFFF" * 6 + "8000"  # model 103, 50 registers; A, V
    "0BCD 0000 1388 FFFE 8000 8000 8000 8000 8000 8000"  # W = 3021, W_SF = 0, Hz, VA, VAr, PF
    "0001 E240 0001" + "FFFF" * 25  # WH = 123456, WH_SF = 1, the rest
)


def sunspec_line(clock, base=40_000, between=""):
    line = FakeLine(clock)
    line.put(3, base, "5375 6E53" + COMMON + between + INVERTER + "FFFF 0000")
    return line


@pytest.mark.parametrize("base", [40_000, 0, 50_000])
def test_a_sunspec_inverter_is_found_at_each_base(clock, base):
    line = sunspec_line(clock, base)
    sample = reader_of("sunspec-inverter", line, clock).sample()
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (None, 1_234_560_000, -3021)
    assert sample.serial_number == "SA1234"
    assert sample.export_rollover_mwh == 2**32 * 10_000


def test_models_before_the_inverter_s_are_walked_over_and_the_place_is_remembered(clock):
    line = sunspec_line(clock, between="0003 0002 0000 0000000C 0003 0000 0000 0000")
    reader = reader_of("sunspec-inverter", line, clock)
    reader.sample()
    line.requests.clear()
    assert reader.sample().export_mwh == 1_234_560_000
    assert line.requests == [(3, 40_000 + 2 + 68 + 4 + 5, 27)]


METER_COMMON = COMMON.replace("5341 3132 3334", "4D45 3938 3736")
"""The same of another device, ME9876."""

METER_POWER = "FFA1 0000 0000 0000 0000"
METER_ENERGY = "0001 E240" + "0000" * 6 + "0003 0D40" + "0000" * 6 + "0000"
METER = "00CB 0069" + "0000" * 16 + METER_POWER + "0000" * 15 + METER_ENERGY + "0000" * 52
"""Model 203 with 105 registers: -95 W; 123456 Wh exported and 200000 Wh imported; their scale factors are 0."""


def test_a_meter_behind_an_inverter_has_its_own_serial_number_and_the_inverter_keeps_its(clock):
    """SolarEdge's chain: the inverter's common model and 103, then the meter's common model and 203."""
    line = FakeLine(clock)
    line.put(3, 40_000, "5375 6E53" + COMMON + INVERTER + METER_COMMON + METER + "FFFF 0000")
    sample = reader_of("sunspec-meter", line, clock, billed="import").sample()
    assert (sample.import_mwh, sample.export_mwh) == (200_000_000, 123_456_000)
    assert (sample.power_w, sample.serial_number) == (-95, "ME9876")
    assert reader_of("sunspec-inverter", line, clock).sample().serial_number == "SA1234"


def test_the_scale_factor_of_this_very_reply_is_used(clock):
    """Hazard 7: it changes at run time."""
    line = sunspec_line(clock)
    reader = reader_of("sunspec-inverter", line, clock)
    assert reader.sample().export_mwh == 1_234_560_000
    line.put(3, 40_070 + 24, "0012 D688 0000")
    assert reader.sample().export_mwh == 1_234_568_000


def test_models_that_moved_are_looked_up_again_and_nothing_wrong_is_read(clock):
    line = sunspec_line(clock)
    reader = reader_of("sunspec-inverter", line, clock)
    reader.sample()
    line.put(3, 40_000, "5375 6E53" + COMMON + "0003 0002 0000 0000" + INVERTER + "FFFF 0000")
    with pytest.raises(ReadFailure, match="moved"):
        reader.sample()
    assert reader.sample().export_mwh == 1_234_560_000


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("5375 6E53" + COMMON + "FFFF 0000", "none of the SunSpec models"),
        ("5375 6E53" + "0002 0000" * 80, "none of the SunSpec models"),
        ("5375 6E53" + COMMON + "0067 0010" + "0000" * 16, "only 16 registers long"),
        ("5375 6E54" + COMMON, "no SunSpec mark"),
    ],
)
def test_a_device_without_the_models_is_explained(clock, image, reason):
    line = FakeLine(clock)
    line.put(3, 40_000, image)
    with pytest.raises(ReadFailure, match=reason):
        reader_of("sunspec-inverter", line, clock).sample()


def test_a_peer_that_sends_without_end_is_cut_off():
    """Bounded memory: pymodbus would keep everything until the time limit."""
    assert _refuse_floods(False, bytes(MAX_BUFFERED_BYTES)) == bytes(MAX_BUFFERED_BYTES)
    with pytest.raises(ModbusException):
        _refuse_floods(False, bytes(MAX_BUFFERED_BYTES + 1))


def test_a_silent_device_is_not_asked_at_every_base(clock):
    line = FakeLine(clock)
    line.failure = LineFailure("no usable reply")
    with pytest.raises(ReadFailure, match="no usable reply"):
        reader_of("sunspec-inverter", line, clock).sample()
    assert len(line.requests) == 1
