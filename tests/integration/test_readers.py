"""Readers against peers that misbehave on a real pseudo-terminal or TCP socket, byte by byte.

Hazards 1 (late reply), 2 (short reply), 3 (no number) and 14 (garbage, unplugged) of meters in the field. Replies are
written by hand: device, function, byte count, registers, CRC.
"""

import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from support.wire_peers import Clock, Peer, SerialPeer, meter

from firmware_config.loader import WrongValue
from meter_agent.config import ModbusRtuConfig, ModbusTcpConfig
from meter_agent.profiles import SerialDefaults, load_profile
from meter_agent.readers import create_reader, create_readers
from meter_agent.readers.modbus import ModbusLine, ModbusReader, SerialTarget
from meter_agent.readings import ReadFailure

pytestmark = pytest.mark.integration

TIMEOUT_S = 0.15
"""Long against a reply on a pseudo-terminal, short for a test that waits for it to pass."""


def modbus_crc(data: bytes) -> bytes:
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc.to_bytes(2, "little")


def reply(image: str) -> bytes:
    body = bytes.fromhex(image)
    return body + modbus_crc(body)


def sdm630_reply(import_image: str) -> bytes:
    """Function 4, 24 registers from 0x34: power 0, import as given, export 0."""
    return reply("01 04 30" + "0000" * 20 + import_image + "0000 0000")


OLD, NEW = sdm630_reply("447A 0000"), sdm630_reply("447A 4000")
"""1000 kWh and 1001 kWh."""

NO_SERIAL_NUMBER = reply("01 83 02")


class TcpPeer(Peer):
    """A Modbus TCP server that serves one connection after the other; `behave` gets whole frames."""

    def __init__(self, behave, port=0):
        super().__init__(behave)
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.connection = None

    def send(self, data):
        with suppress(ConnectionError):  # the reader hangs up on what is no Modbus
            self.connection.sendall(data)

    def hang_up(self):
        self.connection.close()
        self.connection = None

    def stop(self):
        super().stop()
        self._listener.close()
        if self.connection is not None:
            self.connection.close()

    def _run(self):
        while True:
            sources = [self._listener, self._wake_reader] + ([self.connection] if self.connection else [])
            readable, _, _ = select.select(sources, [], [])
            if self._wake_reader in readable:
                return
            if self._listener in readable:
                self.connection, _ = self._listener.accept()
                self.connections += 1
            elif self.connection in readable:
                request = b""
                with suppress(ConnectionError):
                    request = self.connection.recv(4096)
                if request:
                    self.requests.append(request)
                    self.behave(request, self)
                else:
                    self.hang_up()


def rtu(port, profile="eastron-sdm630", **more):
    return ModbusRtuConfig("modbus_rtu", profile, port, timeout_s=TIMEOUT_S, **more)


def serial_reader(port, wait_s, profile="eastron-sdm630", device_id=1):
    """A reader whose line waits by `wait_s`, so that a test can say what happens in between."""
    line = ModbusLine(SerialTarget(port, SerialDefaults(9600, "N")), wait_s=wait_s)
    return ModbusReader("house-1", load_profile(profile), "import", line, device_id, TIMEOUT_S, Clock())


def is_serial_number(request):
    return request[1] == 3


def test_a_meter_on_a_serial_line_is_read_in_milliseconds(peers, closing):
    peer = peers(SerialPeer(lambda request, peer: peer.send(NO_SERIAL_NUMBER if is_serial_number(request) else OLD)))
    reader = closing(create_reader(meter(rtu(peer.port)), Clock()))
    sample = reader.sample()
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (1_000_000_000, 0, 0)
    assert peer.requests[-1] == bytes.fromhex("01 04 00 34 00 18") + modbus_crc(bytes.fromhex("01 04 00 34 00 18"))
    started = time.monotonic()
    for _ in range(20):
        reader.sample()
    assert (time.monotonic() - started) / 20 < 0.02
    assert len(peer.requests) == 22


def test_a_late_reply_is_never_taken_for_the_next_one(peers, closing):
    """Hazard 1. The meter answers the first request only after its time limit; its counter has moved on since."""
    late = []

    def behave(request, peer):
        if is_serial_number(request):
            peer.send(NO_SERIAL_NUMBER)
        elif not late:
            late.append(OLD)
        else:
            # Without the silence in between, the held reply is what comes first.
            peer.send(late[0] or NEW)
            late[0] = b""

    peer = peers(SerialPeer(behave))
    waits = []

    def wait_s(duration_s):
        waits.append(duration_s)
        if late and duration_s > 0.3:
            peer.send(late[0])
            late[0] = b""

    reader = closing(serial_reader(peer.port, wait_s))
    with pytest.raises(ReadFailure, match="no usable reply from device 1"):
        reader.sample()
    assert reader.sample().import_mwh == 1_001_000_000
    assert max(waits) > 0.3


def test_a_late_reply_of_another_register_of_the_same_length_is_never_taken(peers, closing):
    """Hazard 1 as reproduced with pymodbus' own retries: the data of 0x48 came back for 0x4A, and stayed shifted."""
    answers = {0x5000: "03E8", 0x5B14: "0000"}
    held = []

    def behave(request, peer):
        address, count = int.from_bytes(request[2:4], "big"), int.from_bytes(request[4:6], "big")
        if address == 0x8900:
            peer.send(NO_SERIAL_NUMBER)
            return
        image = reply(f"01 03 {2 * count:02x}" + "0000" * (count - 1) + answers[address])
        if address == 0x5B14 and not held:
            held.append(image)
        else:
            peer.send(b"".join(held[:1]) if held and held[0] else image)
            if held:
                held[0] = b""

    peer = peers(SerialPeer(behave))

    def wait_s(duration_s):
        if held and held[0] and duration_s > 0.3:
            peer.send(held[0])
            held[0] = b""

    reader = closing(serial_reader(peer.port, wait_s, profile="abb-b23"))
    with pytest.raises(ReadFailure):
        reader.sample()
    for _ in range(3):
        assert reader.sample().export_mwh == 10_000_000
        answers[0x5000] = "03E8"


BAD_REPLIES = {
    "short, with a good CRC": reply("01 04 02 447A"),
    "long, with a good CRC": reply("01 04 32" + "0000" * 25),
    "of another function": reply("01 03 30" + "0000" * 24),
    "of another device": reply("02 04 30" + "0000" * 24),
    "with a wrong CRC": OLD[:-1] + bytes([OLD[-1] ^ 1]),
    "cut": OLD[:20],
    "empty": b"",
    "garbage": bytes(range(256)),
    "an exception": reply("01 84 04"),
    "not a number": sdm630_reply("7FC0 0000"),
    "the echo of the request": bytes.fromhex("01 04 00 34 00 18") + modbus_crc(bytes.fromhex("01 04 00 34 00 18")),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_a_failure_and_the_next_read_is_right(peers, closing, name):
    """Hazards 1, 2, 3 and 14."""
    bad = [BAD_REPLIES[name]]

    def behave(request, peer):
        peer.send(NO_SERIAL_NUMBER if is_serial_number(request) else bad.pop() if bad else NEW)

    peer = peers(SerialPeer(behave))
    reader = closing(serial_reader(peer.port, lambda duration_s: None))
    with pytest.raises(ReadFailure, match="house-1"):
        reader.sample()
    assert reader.sample().import_mwh == 1_001_000_000


def test_a_line_that_never_falls_silent_does_not_hold_the_reader(peers, closing):
    """Hazard 14."""
    stop = threading.Event()

    def babble(request, peer):
        while not stop.is_set():
            _, writable, _ = select.select([], [peer.master], [], 0.01)
            if writable:
                peer.send(b"\x55" * 64)

    peer = peers(SerialPeer(babble))
    reader = closing(serial_reader(peer.port, lambda duration_s: None))
    started = time.monotonic()
    with pytest.raises(ReadFailure):
        reader.sample()
    assert time.monotonic() - started < 10 * TIMEOUT_S
    stop.set()


def test_an_unplugged_adapter_is_a_failure_and_comes_back_by_itself(peers, closing, tmp_path):
    """Hazards 11 and 14: the port has another number afterwards, /dev/serial/by-id points to it."""
    by_id = tmp_path / "usb-adapter"

    def behave(request, peer):
        peer.send(NO_SERIAL_NUMBER if is_serial_number(request) else OLD)

    first = peers(SerialPeer(behave))
    by_id.symlink_to(first.port)
    reader = closing(serial_reader(by_id, lambda duration_s: None))
    assert reader.sample().import_mwh == 1_000_000_000
    second = peers(SerialPeer(behave))
    by_id.unlink()
    first.unplug()
    with pytest.raises(ReadFailure, match="is missing; is the adapter plugged in"):
        reader.sample()
    by_id.symlink_to(second.port)
    assert reader.sample().import_mwh == 1_000_000_000


def test_two_meters_share_a_serial_line(peers, closing):
    def behave(request, peer):
        if is_serial_number(request):
            peer.send(reply(f"{request[0]:02x} 83 02"))
        else:
            body = bytes([request[0]]) + (OLD if request[0] == 1 else NEW)[1:-2]
            peer.send(body + modbus_crc(body))

    peer = peers(SerialPeer(behave))
    meters = [meter(rtu(peer.port, device_id=i), name) for i, name in ((1, "house-1"), (2, "house-2"))]
    readers = {name: closing(reader) for name, reader in create_readers(meters, Clock()).items()}
    results = {name: [] for name in readers}

    def read(name):
        for _ in range(10):
            results[name].append(readers[name].sample().import_mwh)

    threads = [threading.Thread(target=read, args=(name,)) for name in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {"house-1": [1_000_000_000] * 10, "house-2": [1_001_000_000] * 10}


def test_meters_that_set_one_line_differently_are_refused(tmp_path):
    meters = [meter(rtu(tmp_path / "tty"), "house-1"), meter(rtu(tmp_path / "tty", baud=19_200), "house-2")]
    with pytest.raises(WrongValue, match="same baud"):
        create_readers(meters, Clock())


def test_an_unknown_profile_is_named(tmp_path):
    with pytest.raises(WrongValue, match="eastron-sdm630") as error:
        create_reader(meter(rtu(tmp_path / "tty", profile="eastron-sdm360")), Clock())
    assert error.value.key == "meters.house-1.reader.profile"


def tcp_reply(request, image, unit=None):
    """MBAP header with the request's transaction number, then the PDU."""
    pdu = bytes.fromhex(image)
    unit = request[6] if unit is None else unit
    return request[:4] + (len(pdu) + 1).to_bytes(2, "big") + bytes([unit]) + pdu


INVERTER_IMAGE = (
    "5375 6E53"  # SunS
    "0001 0042" + "0000" * 48 + "5341 3132 3334" + "0000" * 13 + "0001 8000"  # model 1, serial number SA1234
    "0067 0032" + "FFFF" * 4 + "8000" + "FFFF" * 6 + "8000"  # model 103
    "0BCD 0000"
    + "8000" * 8
    + "0001 E240 0001"
    + "FFFF" * 25  # 3021 W, 123456 × 10 Wh
    + "FFFF 0000"
)


def inverter(request, peer):
    raw = bytes.fromhex(INVERTER_IMAGE)
    address, count = int.from_bytes(request[8:10], "big") - 40_000, int.from_bytes(request[10:12], "big")
    if address < 0 or 2 * (address + count) > len(raw):
        peer.send(tcp_reply(request, "83 02"))
    else:
        peer.send(tcp_reply(request, f"03 {2 * count:02x}" + raw[2 * address : 2 * (address + count)].hex()))


def tcp_reader(port):
    config = ModbusTcpConfig("modbus_tcp", "sunspec-inverter", "127.0.0.1", port, timeout_s=TIMEOUT_S)
    return create_reader(meter(config, direction="generation"), Clock())


def test_a_sunspec_inverter_is_read_over_tcp(peers, closing):
    peer = peers(TcpPeer(inverter))
    sample = closing(tcp_reader(peer.port)).sample()
    assert (sample.export_mwh, sample.power_w, sample.serial_number) == (1_234_560_000, -3021, "SA1234")


def test_a_server_that_drops_idle_clients_is_read_again_at_once(peers, closing):
    peer = peers(TcpPeer(inverter))
    reader = closing(tcp_reader(peer.port))
    reader.sample()
    peer.hang_up()
    assert reader.sample().export_mwh == 1_234_560_000
    assert peer.connections == 2


def test_a_server_that_is_down_is_a_failure_and_is_found_when_it_is_back(peers, closing):
    peer = peers(TcpPeer(inverter))
    reader = closing(tcp_reader(peer.port))
    reader.sample()
    peer.stop()
    for _ in range(2):
        with pytest.raises(ReadFailure, match="no Modbus TCP server answers"):
            reader.sample()
    peers(TcpPeer(inverter, port=peer.port))
    assert reader.sample().export_mwh == 1_234_560_000


@pytest.mark.parametrize(
    "bad",
    [
        lambda request: b"",
        lambda request: tcp_reply(request, "03 02 0000"),
        lambda request: tcp_reply(request, "04 36" + "0000" * 27),
        lambda request: tcp_reply(request, "03 36" + "0000" * 27, unit=9),
        lambda request: tcp_reply(bytes([request[0], request[1] ^ 7]) + request[2:], "03 36" + "0000" * 27),
        lambda request: b"HTTP/1.1 400 Bad Request\r\n\r\n",
        lambda request: b"\x55" * 60_000,
        lambda request: tcp_reply(request, "83 0B"),
    ],
    ids=["silent", "short", "other function", "other device", "other transaction", "http", "flood", "exception"],
)
def test_a_bad_reply_over_tcp_is_a_failure_and_the_next_read_is_right(peers, closing, bad):
    once = []

    def behave(request, peer):
        if request[11] == 27 and not once:
            once.append(request)
            peer.send(bad(request))
        else:
            inverter(request, peer)

    peer = peers(TcpPeer(behave))
    reader = closing(tcp_reader(peer.port))
    with pytest.raises(ReadFailure):
        reader.sample()
    assert reader.sample().export_mwh == 1_234_560_000


def test_an_agent_that_reads_p1_never_imports_a_modbus_library(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from meter_agent.config import *; from meter_agent.readers import create_reader\n"
        "config = MeterConfig('consumption', Path('k'), 1, P1Config('p1', Path('/nowhere')))\n"
        "create_reader(NamedMeter('house-1', config), None)\n"
        "assert 'serial' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('pymodbus')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
