"""`meter-agent scan` and wire-level meters: several on one line or behind one gateway, silent, broken, pushing ones."""

import json
import os
import signal
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.waiting import wait_until
from dengen_testing.wire.faults import Fault
from dengen_testing.wire.modbus import READ_HOLDING_REGISTERS, READ_INPUT_REGISTERS, Block, RegisterImage
from dengen_testing.wire.registers import MeterState, abb_b23, iem3000, sdm120, sdm630, sunspec_inverter
from support.modbus_bus import SerialBus, TcpBus
from support.telegrams import (
    EASYMETER,
    GOOD_SML,
    LANDIS_GYR_IDENTIFICATION,
    LANDIS_GYR_LINES,
    SMARTY_FRAME,
    block,
    even,
)
from support.wire_peers import SerialPeer

from firmware_config.loader import build
from meter_agent import cli
from meter_agent.config import MeterConfig

pytestmark = pytest.mark.integration

MODBUS_ONLY = ("--listen", 0, "--wi-sun", 0, "--sign-on", 0, "--mbus", 0)
NOBODY_ELSE = ("--listen", 0, "--sign-on", 0, "--ids", "1", "--baud", 2_400, "--parity", "N", "--timeout", 0.05)
"""Pseudo-terminals take parity E only sometimes."""

STATE = MeterState(time_s=0, import_wh=1_234_500, export_wh=567_500, power_w=1_500, serial=4_711)


@pytest.fixture
def start_bus() -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def start(kind: type, meters: dict[int, RegisterImage]) -> Any:
        started.append(kind(meters))
        return started[-1]

    yield start
    for bus in started:
        bus.close()


def scan(capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, what was found by JSON, and stderr."""
    code = cli.main(["scan", "--json", *map(str, options)])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def serial(value: int) -> MeterState:
    return MeterState(0, STATE.import_wh, STATE.export_wh, STATE.power_w, value)


def test_several_meters_on_one_line_are_told_apart(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = start_bus(
        SerialBus, {1: sdm630(serial(1)), 2: abb_b23(serial(2)), 5: sdm120(serial(5)), 9: iem3000(serial(9))}
    )
    options = (
        "--port",
        bus.port,
        "--ids",
        "1-3,5,9",
        "--baud",
        9600,
        "--parity",
        "N",
        "--timeout",
        0.1,
        *MODBUS_ONLY,
    )
    code, found, progress = scan(capsys, *options)
    assert code == 0
    # The first of those that fit equally well: more families than one may have the same registers.
    assert {meter["device_ids"][0]: meter["profiles"][0] for meter in found} == {
        1: "eastron-sdm630",
        2: "abb-b23",
        5: "eastron-sdm120",
        9: "schneider-iem3000",
    }
    for meter in found:
        assert meter["reading"]["serial_number"] == str(meter["device_ids"][0])
        assert meter["reading"]["power_w"] == 1_500
        assert meter["fit"] in ("likely", "certain")
    assert found[0]["reading"]["import_mwh"] == 1_234_500_000
    assert "asking device 3 (3 of 5)" in progress


def test_what_is_found_can_be_pasted_into_a_config(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bus = start_bus(TcpBus, {7: abb_b23(STATE)})
    code, found, _ = scan(capsys, "--host", "127.0.0.1", "--port", bus.port, "--ids", "7")
    assert code == 0
    data = {"direction": "consumption", "key_file": "k", "capacity_w": 1, "reader": found[0]["reader"]}
    reader = build(data, MeterConfig, tmp_path / "agent.toml").reader
    assert (reader.protocol, reader.profile, reader.device_id) == ("modbus_tcp", "abb-b23", 7)  # type: ignore[union-attr]
    assert cli.main(["scan", "--host", "127.0.0.1", "--port", str(bus.port), "--ids", "7"]) == 0
    table = capsys.readouterr().out
    assert "1234.500000 kWh" in table
    assert '[meters.meter-1.reader]\nprotocol = "modbus_tcp"' in table


def test_a_gateway_and_a_sunspec_inverter_behind_it(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = start_bus(TcpBus, {1: sunspec_inverter(MeterState(0, 0, 5_000_000, -3_000, 77)), 200: abb_b23(STATE)})
    code, found, _ = scan(capsys, "--host", "127.0.0.1", "--port", bus.port, "--ids", "1-4,200")
    assert code == 0
    assert (found[0]["device_ids"], found[0]["profiles"], found[0]["fit"]) == ([1], ["sunspec-inverter"], "certain")
    assert found[0]["reading"]["export_mwh"] == 5_000_000_000
    assert (found[1]["device_ids"], found[1]["profiles"]) == ([200], ["abb-b23"])


def test_a_meter_that_answers_to_every_id_is_found_once(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    image = abb_b23(STATE)
    bus = start_bus(TcpBus, dict.fromkeys(range(1, 31), image))
    code, found, _ = scan(capsys, "--host", "127.0.0.1", "--port", bus.port, "--ids", "1-30")
    assert code == 0
    assert [meter["device_ids"] for meter in found] == [list(range(1, 31))]


def test_silent_ids_cost_a_bounded_time_and_a_silent_meter_is_not_found(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = start_bus(SerialBus, {1: sdm630(STATE)})
    bus.faults[1] = Fault.SILENT
    begin_s = time.monotonic()
    options = (
        "--port",
        bus.port,
        "--ids",
        "1-5",
        "--baud",
        9600,
        "--parity",
        "N",
        "--timeout",
        0.1,
        *MODBUS_ONLY,
    )
    code, found, err = scan(capsys, *options)
    # Two requests each, and the pause after one that was not answered.
    assert time.monotonic() - begin_s < 5 * 2 * (0.1 + 0.1) + 1.5
    assert (code, found) == (1, [])
    assert "no meter found; check wiring" in err
    assert set(bus.asked) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("fault", [Fault.GARBAGE, Fault.WRONG_CHECKSUM])
def test_what_sends_no_frame_is_no_meter_and_does_not_spoil_the_next_one(
    fault: Fault, start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = start_bus(SerialBus, {1: sdm630(STATE), 2: sdm630(serial(2))})
    bus.faults[1] = fault
    options = (
        "--port",
        bus.port,
        "--ids",
        "1,2",
        "--baud",
        9600,
        "--parity",
        "N",
        "--timeout",
        0.1,
        *MODBUS_ONLY,
    )
    code, found, _ = scan(capsys, *options)
    assert code == 0
    assert [meter["device_ids"] for meter in found] == [[2]]


def test_a_meter_whose_replies_are_short_fits_no_profile_and_costs_a_bounded_time(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = start_bus(SerialBus, {1: sdm630(STATE), 2: sdm630(serial(2))})
    bus.faults[1] = Fault.SHORT
    begin_s = time.monotonic()
    options = (
        "--port",
        bus.port,
        "--ids",
        "1,2",
        "--baud",
        9600,
        "--parity",
        "N",
        "--timeout",
        0.1,
        *MODBUS_ONLY,
    )
    _, found, _ = scan(capsys, *options, "--device-time", 1)
    # One more profile may have been begun when the time was over.
    assert time.monotonic() - begin_s < 1 + 6
    assert (found[0]["device_ids"], found[0]["profiles"]) == ([1], [])
    assert "were not tried" in found[0]["note"]
    assert (found[1]["device_ids"], found[1]["profiles"]) == ([2], ["eastron-sdm630"])


def test_a_device_that_no_profile_fits_is_named_as_such(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bus = start_bus(TcpBus, {3: RegisterImage((Block(READ_HOLDING_REGISTERS, 0x9000, b"\0\1"),))})
    code, found, _ = scan(capsys, "--host", "127.0.0.1", "--port", bus.port, "--ids", "3")
    assert code == 0
    assert (found[0]["device_ids"], found[0]["profiles"], found[0]["reading"]) == ([3], [], None)
    assert "profile" not in found[0]["reader"]


def test_registers_that_are_all_zero_prove_nothing(
    start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    zeros = bytes(2 * 0x1_0000)
    blocks = (Block(READ_HOLDING_REGISTERS, 0, zeros), Block(READ_INPUT_REGISTERS, 0, zeros))
    bus = start_bus(TcpBus, {1: RegisterImage(blocks)})
    _, found, _ = scan(capsys, "--host", "127.0.0.1", "--port", bus.port, "--ids", "1")
    assert found[0]["fit"] == "possible"
    assert len(found[0]["profiles"]) > 1


def test_one_profile_only(start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    bus = start_bus(TcpBus, {1: sdm630(STATE)})
    options = ("--host", "127.0.0.1", "--port", bus.port, "--ids", "1", "--profile", "abb-b23")
    _, found, _ = scan(capsys, *options)
    assert found[0]["profiles"] == []


def test_a_p1_meter_on_the_port_is_heard_and_nobody_is_asked(
    start_street: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    meter = {"name": "flat", "wire": "p1", "kind": "dsmr", "start_import_wh": 1_234_500, "serial": 4_711}
    description = {"participant": "street", "interval_s": 1800, "origin_s": 0, "folder": "wire", "meters": [meter]}
    street = start_street(description)
    port = street.addresses()["flat"]["path"]
    code, found, progress = scan(capsys, "--port", port, "--listen", 5)
    assert code == 0
    (flat,) = found
    assert flat["reader"] == {"protocol": "p1", "port": port, "baud": 115_200}
    assert flat["reading"]["import_mwh"] == 1_234_500_000
    assert flat["reading"]["serial_number"] is not None
    assert "asking device" not in progress


@contextmanager
def pushing(telegram: bytes) -> Iterator[Path]:
    """A serial port into which a meter pushes this again and again, until nobody takes it any more."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    os.set_blocking(ours, False)
    stop = threading.Event()

    def push() -> None:
        while not stop.wait(0.05):
            with suppress(BlockingIOError):
                os.write(ours, telegram)

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield Path(os.ttyname(theirs))
    finally:
        stop.set()
        thread.join()
        os.close(ours)
        os.close(theirs)


DLMS = bytes.fromhex("7EA02A410883130413E6E7000F40000000000101020309060100010700FF060000095602020F00161BAFA17E")
"""2390 W, pushed by an Aidon meter: https://github.com/UtilitechAS/amsreader-firmware frames/Aidon-TN-3p.raw."""

PUSHED = {
    "SML": (GOOD_SML, {"protocol": "sml", "baud": 9_600}, 12_345_600, -30),
    "IEC 62056-21": (
        *(even(EASYMETER.encode()), {"protocol": "iec62056_21", "mode": "D", "baud": 9_600}, 26_107_703_423, 336),
    ),
    "DLMS": (DLMS, {"protocol": "dlms", "baud": 2_400, "parity": "N"}, None, 2_390),
}


@pytest.mark.parametrize("kind", PUSHED)
def test_other_meters_that_push_are_heard_too(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    telegram, reader, import_mwh, power_w = PUSHED[kind]
    with pushing(telegram) as port:
        code, found, _ = scan(capsys, "--port", port, "--listen", 0.5)
    assert code == 0
    (meter,) = found
    # A pseudo-terminal takes parity E only sometimes, and has the same bytes at every baud rate.
    assert meter["reader"] | {"parity": "N"} == reader | {"port": str(port), "parity": "N"}
    assert (meter["reading"]["import_mwh"], meter["reading"]["power_w"]) == (import_mwh, power_w)
    data = {"direction": "consumption", "key_file": "k", "capacity_w": 1, "reader": meter["reader"]}
    assert build(data, MeterConfig, tmp_path / "agent.toml").reader.protocol == reader["protocol"]


def test_a_meter_that_must_be_asked_signs_on(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: bytes, peer: Any) -> None:
        identification = even(LANDIS_GYR_IDENTIFICATION.encode())
        peer.send(identification if b"?" in request else even(block(LANDIS_GYR_LINES)))

    peer = SerialPeer(answer, lambda received: received.find(b"\n") + 1)
    peer.start()
    code, found, progress = scan(capsys, "--port", peer.port, "--listen", 0, "--sign-on", 10)
    peer.unplug()
    assert code == 0
    assert found[0]["reader"] == {"protocol": "iec62056_21", "mode": "C", "port": str(peer.port)}
    assert found[0]["reading"]["import_mwh"] == 1_234_120_000
    assert "asking device" not in progress


def test_a_port_that_is_not_there_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found, err = scan(capsys, "--port", tmp_path / "ttyUSB9")
    assert (code, found) == (1, [])
    assert "is missing; is the adapter plugged in?" in err
    code, found, err = scan(capsys, "--host", "127.0.0.1", "--port", 1, "--ids", "1")
    assert (code, found) == (1, [])
    assert "no Modbus TCP server answers" in err


def test_ctrl_c_shows_what_was_found_so_far(start_bus: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    bus = start_bus(TcpBus, {1: sdm630(STATE)})
    bus.faults[2] = Fault.SILENT
    bus.meters[2] = sdm630(STATE)
    # As in a terminal: whoever runs the tests in the background has the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        wait_until(lambda: 2 in bus.asked, "device 2 to be asked", limit_s=20)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt, daemon=True)
    interrupting.start()
    options = ("--host", "127.0.0.1", "--port", bus.port, "--ids", "1,2", "--timeout", 30)
    code, found, err = scan(capsys, *options)
    interrupting.join()
    assert code == 0
    assert [meter["device_ids"] for meter in found] == [[1]]
    assert "stopped; this was found so far" in err


def test_an_encrypted_p1_port_is_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with pushing(SMARTY_FRAME) as port:
        code, found, _ = scan(capsys, "--port", port, "--listen", 2)
    assert code == 0
    assert (found[0]["reader"]["protocol"], found[0]["reader"]["encryption_key_file"]) == ("p1", "")
    assert (found[0]["reading"]["import_mwh"], "encrypted telegrams" in found[0]["note"]) == (None, True)


def mbus_frame(address: int, medium: int = 2) -> bytes:
    """1000 Wh and 123 W, in the frame of a Finder meter."""
    body = bytes([0x08, address, 0x72]) + bytes.fromhex("07620023 2E19 23") + bytes([medium])
    body += bytes.fromhex("92 00 0000 04 03 E8030000 04 2B 7B000000")
    return bytes([0x68, len(body), len(body), 0x68]) + body + bytes([sum(body) & 0xFF, 0x16])


@contextmanager
def mbus(meters: dict[int, bytes], anybody: bytes = b"\xe5") -> Iterator[SerialPeer]:
    """Meters by address; `anybody` comes back where all of them are asked at once."""

    def answer(request: bytes, peer: Any) -> None:
        if request[0] != 0x10:
            return
        control, address = request[1:3]
        if address == 254:
            peer.send(anybody)
        elif address in meters:
            peer.send(b"\xe5" if control == 0x40 else meters[address])

    peer = SerialPeer(answer, lambda received: min(5 if received[:1] == b"\x10" else 8, len(received)))
    peer.start()
    try:
        yield peer
    finally:
        peer.unplug()


@pytest.mark.parametrize("anybody", [b"\xe5", b"\xe4\x00"], ids=["one answer", "answers that collide"])
def test_meters_on_an_m_bus_are_told_apart(anybody: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("meterbus")
    with mbus({1: mbus_frame(1), 3: mbus_frame(3, medium=4)}, anybody) as bus:
        options = ("--listen", 0, "--wi-sun", 0, "--sign-on", 0, "--mbus", 0.1)
        code, found, progress = scan(
            capsys, "--port", bus.port, *options, "--ids", "1-3", "--baud", 2_400, "--parity", "N"
        )
    assert code == 0
    assert [meter["device_ids"] for meter in found] == [[1], [3]]
    assert (found[0]["reading"]["import_mwh"], found[0]["reading"]["power_w"]) == (1_000_000, 123)
    assert found[0]["reading"]["serial_number"] == "FIN-23006207"
    assert (found[1]["reading"], "not for electricity" in found[1]["note"]) == (None, True)
    assert {request[2] for request in bus.requests} == {254, 0, 1, 2, 3}
    assert "asking device" not in progress
    data = {"direction": "consumption", "key_file": "k", "capacity_w": 1, "reader": found[0]["reader"]}
    reader = build(data, MeterConfig, tmp_path / "agent.toml").reader
    assert (reader.protocol, reader.address) == ("mbus", 1)  # type: ignore[union-attr]


def test_where_nobody_speaks_m_bus_one_request_is_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("meterbus")
    with mbus({}, b"") as bus:
        code, found, _ = scan(capsys, "--port", bus.port, *NOBODY_ELSE, "--wi-sun", 0, "--mbus", 0.1)
    assert (code, found) == (1, [])
    assert [request for request in bus.requests if request[0] == 0x10] == [bytes.fromhex("1040FE3E16")]


def test_noise_is_no_meter_on_an_m_bus(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("meterbus")
    with pushing(b"\x42\x00\x17") as port:
        code, found, progress = scan(capsys, "--port", port, *NOBODY_ELSE, "--wi-sun", 0, "--mbus", 0.1)
    assert (code, found) == (1, [])
    assert "asking M-Bus address 1 (2 of 2)" in progress


def test_without_its_library_m_bus_is_left_out_and_said_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "meterbus", None)
    with mbus({}) as bus:
        _, _, progress = scan(capsys, "--port", bus.port, *NOBODY_ELSE, "--wi-sun", 0)
    assert "M-Bus is not asked for; that needs `pip install 'dengen[mbus]'`" in progress
    assert not any(request[0] == 0x10 for request in bus.requests)


@pytest.mark.parametrize("answer", [b"SKVER\r\nEVER 1.2.10\r\nOK\r\n", b"\x00\xff\r\nEVER 1.2.10\r\nOK\r\n"])
def test_a_wi_sun_adapter_is_named_with_what_is_still_needed(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    peer = SerialPeer(lambda request, peer: peer.send(answer), lambda received: received.find(b"\n") + 1)
    peer.start()
    code, found, _ = scan(capsys, "--port", peer.port, "--listen", 0, "--wi-sun", 2)
    peer.unplug()
    assert code == 0
    assert peer.requests == [b"SKVER\r\n"]
    assert found[0]["reader"] == {"protocol": "broute", "port": str(peer.port), "route_b_id": "", "password_file": ""}
    assert "a Wi-SUN adapter (EVER 1.2.10); fill in route B's id" in found[0]["note"]


def test_what_chatters_is_no_wi_sun_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    with pushing(b"EVERY day EVER x\r\n" * 100) as port:
        begin_s = time.monotonic()
        code, found, _ = scan(capsys, "--port", port, *NOBODY_ELSE, "--wi-sun", 0.3, "--mbus", 0)
    assert (code, found) == (1, [])
    assert time.monotonic() - begin_s < 10
