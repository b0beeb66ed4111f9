"""`meter-agent simulate`: every profile served and read back, over TCP and a pseudo-terminal, alone and on one wire."""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from dengen_testing.waiting import wait_until

from meter_agent.config import MeterConfig, ModbusRtuConfig, ModbusTcpConfig, NamedMeter
from meter_agent.installer.encode import CannotShow, MeterValues
from meter_agent.installer.simulator import CannotServe, SimulatedMeter, Simulator, Wires
from meter_agent.profiles import MeterProfile, Quantity, load_profile, profile_names
from meter_agent.readers import create_reader
from meter_agent.readings import ReadFailure, Sample

pytestmark = pytest.mark.integration

VALUES = MeterValues(1_234_000_000, 567_000_000, 2_000, "1001")


class Clock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def time_s(self) -> float:
        return 1_700_000_000.0


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_us = 0

    def __call__(self) -> int:
        return self.now_us


@contextmanager
def serving(meters: list[SimulatedMeter], wires: Wires, clock: Hand) -> Iterator[Simulator]:
    with Simulator(meters, wires, clock) as simulator:
        thread = threading.Thread(target=simulator.serve)
        thread.start()
        try:
            yield simulator
        finally:
            simulator.stop()
            thread.join(5)
            assert not thread.is_alive()


def read(reader: ModbusTcpConfig | ModbusRtuConfig, register: Quantity) -> Sample:
    assert register != "power"
    meter = MeterConfig("consumption", Path("key"), 10_000, reader, register)
    opened = create_reader(NamedMeter("house", meter), Clock())
    try:
        return opened.sample()
    finally:
        opened.close()


def quantities(profile: MeterProfile) -> set[Quantity]:
    if profile.registers is not None:
        return set(profile.registers)
    assert profile.sunspec is not None
    return set(profile.sunspec.models[0].registers)


def shown(profile: MeterProfile) -> MeterValues:
    """What the meter shows; an inverter only knows power that it makes."""
    power_w = VALUES.power_w if "import" in quantities(profile) else -VALUES.power_w
    return MeterValues(VALUES.import_mwh, VALUES.export_mwh, power_w, VALUES.serial_number)


def check(profile: MeterProfile, sample: Sample) -> None:
    """All that the profile has reads as it was set."""
    has = quantities(profile)
    # Zero padding belongs to serial numbers in hex.
    serial_number = sample.serial_number.lstrip("0") if sample.serial_number is not None else None
    assert serial_number == (VALUES.serial_number if profile.serial_number is not None else None)
    assert sample.import_mwh == (VALUES.import_mwh if "import" in has else None)
    assert sample.export_mwh == (VALUES.export_mwh if "export" in has else None)
    assert sample.power_w == (shown(profile).power_w if "power" in has else None)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_read_back_over_tcp_and_serial(name: str, tmp_path: Path) -> None:
    profile, clock, line = load_profile(name), Hand(), tmp_path / "line"
    meter = SimulatedMeter(profile, 3, shown(profile), 0)
    billed: Quantity = "import" if "import" in quantities(profile) else "export"
    with serving([meter], Wires(("127.0.0.1", 0), line), clock) as simulator:
        assert simulator.tcp is not None
        check(profile, read(ModbusTcpConfig("modbus_tcp", name, *simulator.tcp, device_id=3), billed))
        # Parity cannot be set on a pseudo-terminal.
        check(profile, read(ModbusRtuConfig("modbus_rtu", name, line, 3, baud=9_600, parity="N"), billed))
    assert not line.is_symlink()


def test_several_meters_share_a_wire_and_nobody_answers_for_the_others(tmp_path: Path) -> None:
    names = ("eastron-sdm630", "abb-b23", "schneider-iem3000")
    meters = [
        SimulatedMeter(load_profile(name), device_id, MeterValues(device_id * 10**9, 10**6, 0, str(device_id)), 0)
        for device_id, name in enumerate(names, start=1)
    ]
    line = tmp_path / "line"
    with serving(meters, Wires(("127.0.0.1", 0), line), Hand()) as simulator:
        assert simulator.tcp is not None
        for device_id, name in enumerate(names, start=1):
            on_tcp = ModbusTcpConfig("modbus_tcp", name, *simulator.tcp, device_id=device_id)
            on_line = ModbusRtuConfig("modbus_rtu", name, line, device_id, baud=9_600, parity="N")
            for reader in (on_tcp, on_line):
                assert read(reader, "import").import_mwh == device_id * 10**9
        with pytest.raises(ReadFailure, match="exception 11"):
            read(ModbusTcpConfig("modbus_tcp", names[0], *simulator.tcp, device_id=4), "import")
        silent = ModbusRtuConfig("modbus_rtu", names[0], line, 4, baud=9_600, parity="N", timeout_s=0.1)
        with pytest.raises(ReadFailure, match="no usable reply"):
            read(silent, "import")


def test_it_counts_on_by_its_power_and_takes_typed_values() -> None:
    clock = Hand()
    meter = SimulatedMeter(load_profile("abb-b23"), 1, MeterValues(10**9, 2 * 10**9, 3_600, "1"), clock())
    other = SimulatedMeter(load_profile("abb-b23"), 2, MeterValues(10**9, 2 * 10**9, 0, "2"), clock())
    with Simulator([meter, other], Wires(("127.0.0.1", 0), None), clock) as simulator:
        clock.now_us = 10_000_001
        # 3600 W for 10 s and a microsecond are 10 Wh, in mWh rounded down.
        assert meter.values(clock()).import_mwh == 10**9 + 10_000
        simulator.command("1 power -7200")
        clock.now_us += 10_000_000
        assert meter.values(clock()).import_mwh == 10**9 + 10_000
        assert meter.values(clock()).export_mwh == 2 * 10**9 + 20_000
        assert other.values(clock()).export_mwh == 2 * 10**9
        simulator.command("import 5000")
        simulator.command("serial 77")
        assert [each.values(clock()).import_mwh for each in (meter, other)] == [5_000_000, 5_000_000]
        assert other.values(clock()).serial_number == "77"
        for wrong in ("import -1", "import x", "dance 1", "3 power 1", "power", "power 99999999999"):
            with pytest.raises((ValueError, CannotShow)):
                simulator.command(wrong)
        assert meter.values(clock()).import_mwh == 5_000_000


def test_a_path_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "line"
    taken.write_text("mine")
    meter = SimulatedMeter(load_profile("abb-b23"), 1, VALUES, 0)
    with pytest.raises(CannotServe, match="remove it or choose another path"):
        Simulator([meter], Wires(None, taken), Hand())
    assert taken.read_text() == "mine"
    with pytest.raises(CannotServe, match="cannot listen"):
        Simulator([meter], Wires(("192.0.2.1", 1), None), Hand())


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    assert select.select([stream], [], [], 20)[0]
    return stream.readline()


def test_the_command_serves_takes_typed_lines_and_cleans_up(tmp_path: Path) -> None:
    line = tmp_path / "bus"
    words = ["simulate", "eastron-sdm630:1", "abb-b23", "--tcp", "0", "--pty", str(line), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "meter_agent.cli", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        place = json.loads(_line(process.stdout))
        assert [meter["device_id"] for meter in place["meters"]] == [1, 2]
        reader = ModbusTcpConfig("modbus_tcp", "abb-b23", place["tcp"]["host"], place["tcp"]["port"], 2)
        assert read(reader, "import").import_mwh == 1_234_000_000
        assert process.stdin is not None
        process.stdin.write("nonsense\n2 import 42000\n")
        process.stdin.flush()
        assert "expected [DEVICE]" in _line(process.stderr)
        wait_until(lambda: read(reader, "import").import_mwh == 42_000_000, "the typed value")
        os.kill(process.pid, 15)
        process.communicate(timeout=10)
    assert process.returncode == 0
    assert not line.is_symlink()
