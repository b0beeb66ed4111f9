"""Wire-level meters on real sockets and pseudo-terminals, read by libraries that have nothing to do with them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serial
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.plugin import StartConductor
from dengen_testing.processes import ManagedProcess, street_process
from dengen_testing.waiting import wait_until
from dengen_testing.wire.faults import Fault
from dengen_testing.wire.street import Street, read_ready_file
from pymodbus.client import ModbusSerialClient, ModbusTcpClient

from broker.protocol.keys import PrivateKey
from broker.protocol.messages import Tick

pytestmark = pytest.mark.integration

ORIGIN_S = 1_309_442_400
STREET: dict[str, Any] = {
    "participant": "street",
    "interval_s": 1_800,
    "origin_s": ORIGIN_S,
    "folder": "wire",
    "meters": [
        {
            "name": "house",
            "wire": "modbus_tcp",
            "kind": "iem3000",
            "device_id": 3,
            "start_import_wh": 5_000_000,
            "import_wh": [196, 289, 0],
        },
        {"name": "hydro", "wire": "modbus_rtu", "kind": "sdm630", "device_id": 7, "export_wh": [1_000, 500, 0]},
        {"name": "flat", "wire": "p1", "kind": "dsmr", "start_import_wh": 1_000, "import_wh": [10, 20, 0]},
    ],
}


@pytest.fixture
def street(start_street: Callable[[dict[str, Any]], Street]) -> Street:
    return start_street(STREET)


@pytest.fixture
def house(street: Street) -> Iterator[ModbusTcpClient]:
    client = ModbusTcpClient("127.0.0.1", port=int(street.addresses()["house"]["port"]), timeout=0.5, retries=0)
    assert client.connect()
    yield client
    client.close()


def serial_client(street: Street, name: str) -> ModbusSerialClient:
    port = str(street.addresses()[name]["path"])
    return ModbusSerialClient(port, baudrate=9_600, parity="N", timeout=0.3, retries=0)


def read_telegram(path: str, limit_s: float = 5.0) -> bytes:
    """One whole telegram from a serial port."""
    with serial.Serial(path, 115_200, timeout=limit_s) as port:
        port.read_until(b"/")
        return b"/" + port.read_until(b"!") + port.read_until(b"\r\n")


def test_pymodbus_reads_the_tcp_meter_at_the_addresses_of_the_manual(street: Street, house: ModbusTcpClient) -> None:
    assert house.read_holding_registers(0x0C83, count=4, device_id=3).registers == [0, 0, 0x4C, 0x4B40]
    street.move_to(ORIGIN_S + 1_800)
    assert house.read_holding_registers(0x0C83, count=4, device_id=3).registers == [0, 0, 0x4C, 0x4C04]
    assert house.read_holding_registers(0x0C82, count=1, device_id=3).exception_code == 2
    assert house.read_holding_registers(0x0C83, count=4, device_id=4).exception_code == 11


def test_pymodbus_reads_the_rtu_meter_on_its_pseudo_terminal(street: Street) -> None:
    street.move_to(ORIGIN_S + 3_600)
    client = serial_client(street, "hydro")
    assert client.connect()
    # 1.5 kWh exported is 3FC00000 as a float.
    assert client.read_input_registers(0x4A, count=2, device_id=7).registers == [0x3FC0, 0x0000]
    assert client.read_holding_registers(0x4A, count=2, device_id=7).exception_code == 2
    client.close()


def test_the_p1_meter_pushes_by_itself_and_at_once_when_it_counts(street: Street) -> None:
    path = str(street.addresses()["flat"]["path"])
    assert b"1-0:1.8.2(000000.667*kWh)" in read_telegram(path)
    street.move_to(ORIGIN_S + 1_800)
    wait_until(lambda: b"1-0:1.8.2(000000.674*kWh)" in read_telegram(path), "the new value")


def test_a_p1_port_that_nobody_reads_never_blocks_and_later_gives_fresh_telegrams(street: Street) -> None:
    for step in range(200):
        street.move_to(ORIGIN_S + step)
    street.move_to(ORIGIN_S + 3_600)
    path = str(street.addresses()["flat"]["path"])
    seen = [read_telegram(path)]
    wait_until(lambda: seen.append(read_telegram(path)) is None and b"000000.687" in seen[-1], "the last value")
    assert len(seen) < 8


def test_an_unplugged_meter_is_gone_and_comes_back_at_the_same_place(street: Street) -> None:
    port = int(street.addresses()["house"]["port"])
    path = str(street.addresses()["hydro"]["path"])
    open_line = serial_client(street, "hydro")
    assert open_line.connect()
    street.unplug("house")
    street.unplug("hydro")
    assert not os.path.lexists(path)
    assert not ModbusTcpClient("127.0.0.1", port=port, timeout=0.5, retries=0).connect()
    street.plug_in("house")
    street.plug_in("hydro")
    client = ModbusTcpClient("127.0.0.1", port=port, timeout=1, retries=0)
    assert client.connect()
    assert client.read_holding_registers(0x0C83, count=1, device_id=3).registers == [0]
    client.close()
    open_line.close()
    again = serial_client(street, "hydro")
    assert again.connect()
    assert again.read_input_registers(0x48, count=2, device_id=7).registers == [0, 0]
    again.close()


def test_a_meter_with_a_fault_answers_again_when_the_fault_is_gone(street: Street) -> None:
    device = street.device("hydro")
    with serial.Serial(str(street.addresses()["hydro"]["path"]), 9_600, timeout=0.2) as port:
        request = bytes.fromhex("07 04 00 48 00 02 F1 BB")
        device.fault = Fault.SILENT
        port.write(request)
        assert port.read(9) == b""
        device.fault = Fault.NONE
        port.write(request)
        assert port.read(9)[:3] == bytes.fromhex("07 04 04")


@pytest.mark.parametrize("fault", [Fault.GARBAGE, Fault.SHORT, Fault.WRONG_CHECKSUM])
def test_a_p1_fault_is_seen_on_the_line(street: Street, fault: Fault) -> None:
    street.device("flat").fault = fault
    street.move_to(ORIGIN_S + 1_800)
    with serial.Serial(str(street.addresses()["flat"]["path"]), 115_200, timeout=1) as port:
        port.reset_input_buffer()
        seen = b""

        def bad() -> bool:
            nonlocal seen
            seen += port.read(200)
            return {
                Fault.GARBAGE: b"!ZZZZ" in seen,
                Fault.SHORT: seen.count(b"/DGN5") >= 2 and b"!" not in seen,
                Fault.WRONG_CHECKSUM: b"!0000\r\n" in seen,
            }[fault]

        wait_until(bad, f"{fault} on the line")


def test_a_street_process_follows_the_conductor(
    tmp_path: Path,
    mosquitto: Mosquitto,
    conductor_key: PrivateKey,
    start_conductor: StartConductor,
    start_street_process: Callable[[Path], ManagedProcess],
) -> None:
    config = tmp_path / "street.json"
    config.write_text(
        json.dumps(
            {
                **STREET,
                "conductor": {
                    "ledger": "demo",
                    "name": "conductor",
                    "key": conductor_key.public.cose_key.hex(),
                },
                "mqtt": {"port": mosquitto.port},
            }
        )
    )
    process = start_street_process(config)
    addresses = read_ready_file(tmp_path / "wire")
    assert addresses is not None
    client = ModbusTcpClient("127.0.0.1", port=int(addresses["house"]["port"]), timeout=1, retries=0)
    assert client.connect()
    seen: list[tuple[int, int]] = []

    def look(tick: Tick) -> None:
        # At the tick of an interval's end the meter still shows the one before: it moves when it sees the tick.
        seen.append((tick.time_s - ORIGIN_S, client.read_holding_registers(0x0C86, count=1, device_id=3).registers[0]))

    conductor = start_conductor(mosquitto.mqtt_config(), "demo", conductor_key)
    conductor.run(ORIGIN_S, ORIGIN_S + 7_200, world=["street"], on_progress=look)
    assert [time_s for time_s, _ in seen] == [0, 1_800, 3_600, 5_400, 7_200]
    assert client.read_holding_registers(0x0C83, count=4, device_id=3).registers == [0, 0, 0x4C, 0x4B40 + 485]
    client.close()
    assert process.stop() == 0
    assert read_ready_file(tmp_path / "wire") is None


def test_a_street_ignores_ticks_that_the_conductor_did_not_sign(
    tmp_path: Path,
    mosquitto: Mosquitto,
    conductor_key: PrivateKey,
    start_street_process: Callable[[Path], ManagedProcess],
    start_listener: Any,
) -> None:
    config = tmp_path / "street.json"
    conductor = {"ledger": "demo", "name": "conductor", "key": conductor_key.public.cose_key.hex()}
    config.write_text(json.dumps({**STREET, "conductor": conductor, "mqtt": {"port": mosquitto.port}}))
    process = start_street_process(config)
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/v1/time/+"])
    listener.publish("dengen/v1/time", b"\xd2\x84no envelope", retain=True)
    wait_until(lambda: "ignored on dengen/v1/time" in process.log_tail(), "the street to say what it ignored")
    assert listener.messages == []


def test_a_mistake_in_a_street_file_ends_the_process_with_its_name(tmp_path: Path) -> None:
    config = tmp_path / "street.json"
    config.write_text(json.dumps({**STREET, "colour": "red"}))
    process = street_process(config).start()
    assert process.wait_ended(10) == 2
    assert "street.colour: expected" in process.log_tail()
