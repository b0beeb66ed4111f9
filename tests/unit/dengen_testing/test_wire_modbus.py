"""Wire-level Modbus: frames and register images beside hex that was written by hand from manuals and standards."""

import pytest
from dengen_testing.wire.faults import Fault
from dengen_testing.wire.modbus import Block, RegisterImage, RtuServer, TcpServer, crc16, with_crc
from dengen_testing.wire.registers import (
    REGISTER_IMAGES,
    MeterState,
    abb_b23,
    iem3000,
    sdm120,
    sdm630,
    sunspec_inverter,
)
from hypothesis import given
from hypothesis import strategies as st

IMAGE = RegisterImage((Block(4, 0x0000, bytes.fromhex("4366 3334 0000 0000")), Block(3, 0x0010, b"\x12\x34")))


def h(text: str) -> bytes:
    return bytes.fromhex(text)


def state(import_wh: int = 0, export_wh: int = 0, power_w: int = 0) -> MeterState:
    return MeterState(time_s=0, import_wh=import_wh, export_wh=export_wh, power_w=power_w, serial=0x00012345)


def test_crc_of_the_examples_in_the_standard_and_the_eastron_manual() -> None:
    # MODBUS over Serial Line V1.02, appendix B: 02 07 has the CRC 0x1241, sent as 41 12.
    assert crc16(h("02 07")) == 0x1241
    # Eastron SDM630 Modbus protocol: the request for the voltage of phase 1, and the answer 230.2 V.
    assert with_crc(h("01 04 00 00 00 02")) == h("01 04 00 00 00 02 71 CB")
    assert with_crc(h("01 04 04 43 66 33 34")) == h("01 04 04 43 66 33 34 1B 38")


def test_an_rtu_request_gets_the_answer_of_the_manual() -> None:
    assert RtuServer(1).receive(h("01 04 00 00 00 02 71 CB"), IMAGE) == h("01 04 04 43 66 33 34 1B 38")


def test_an_rtu_request_may_come_in_pieces_and_with_noise_before_it() -> None:
    server = RtuServer(1)
    assert server.receive(h("00 FF"), IMAGE) == b""
    assert server.waiting_for_more
    assert server.line_idle(IMAGE) == b""
    assert not server.waiting_for_more
    assert server.receive(h("01 04 00"), IMAGE) == b""
    assert server.receive(h("00 00 02 71 CB"), IMAGE) == h("01 04 04 43 66 33 34 1B 38")


def test_another_device_and_a_wrong_crc_are_met_with_silence() -> None:
    server = RtuServer(2)
    assert server.receive(h("01 04 00 00 00 02 71 CB"), IMAGE) == b""
    server = RtuServer(1)
    assert server.receive(h("01 04 00 00 00 02 71 CC"), IMAGE) == b""


@pytest.mark.parametrize(
    ("request_pdu", "answer"),
    [
        ("04 01 00 00 01", "84 02"),  # no such address
        ("04 00 03 00 02", "84 02"),  # reaches over the end of a block
        ("04 00 00 00 00", "84 03"),  # no registers asked for
        ("04 00 00 00 7E", "84 03"),  # 126 registers, one more than a frame holds
        ("06 00 00 00 01", "86 01"),  # writing
        ("03 00 10 00 01", "03 02 12 34"),
    ],
)
def test_what_cannot_be_read_is_an_exception(request_pdu: str, answer: str) -> None:
    # Writing has no request length that the server knows: there the silence on the line ends the frame.
    server = RtuServer(1)
    request = with_crc(b"\x01" + h(request_pdu))
    got = server.receive(request, IMAGE) or server.line_idle(IMAGE)
    assert got == with_crc(b"\x01" + h(answer))


def test_modbus_tcp_answers_with_the_transaction_of_the_request() -> None:
    server = TcpServer(1)
    assert server.receive(h("15 01 00 00 00 06 01 04 00 00 00 02"), IMAGE) == h(
        "15 01 00 00 00 07 01 04 04 43 66 33 34"
    )


def test_modbus_tcp_requests_may_come_in_pieces_or_together() -> None:
    one, two = h("00 01 00 00 00 06 01 03 00 10 00 01"), h("00 02 00 00 00 06 01 03 00 10 00 01")
    answers = h("00 01 00 00 00 05 01 03 02 12 34"), h("00 02 00 00 00 05 01 03 02 12 34")
    assert TcpServer(1).receive(one + two, IMAGE) == b"".join(answers)
    server = TcpServer(1)
    pieces = [server.receive(bytes((byte,)), IMAGE) for byte in one]
    assert pieces[-1] == answers[0]
    assert b"".join(pieces[:-1]) == b""


def test_modbus_tcp_to_another_unit_is_refused_as_by_a_gateway() -> None:
    assert TcpServer(1).receive(h("00 01 00 00 00 06 07 04 00 00 00 02"), IMAGE) == h("00 01 00 00 00 03 07 84 0B")


def test_what_is_no_modbus_tcp_ends_the_connection() -> None:
    with pytest.raises(ValueError, match="MBAP"):
        TcpServer(1).receive(b"GET / HTTP/1.1\r\n", IMAGE)


def test_faults_are_those_of_real_meters() -> None:
    request, good = h("01 04 00 00 00 02 71 CB"), h("01 04 04 43 66 33 34 1B 38")
    server = RtuServer(1)
    assert server.receive(request, IMAGE, Fault.SILENT) == b""
    garbage = server.receive(request, IMAGE, Fault.GARBAGE)
    assert garbage
    assert with_crc(garbage[:-2]) != garbage
    assert server.receive(request, IMAGE, Fault.WRONG_CHECKSUM) == good[:-1] + h("C7")
    # One register where two were asked for, under a CRC that fits.
    assert server.receive(request, IMAGE, Fault.SHORT) == with_crc(h("01 04 02 43 66"))
    # A late answer is taken for the answer to the next request.
    assert server.receive(request, IMAGE, Fault.LATE) == b""
    other = with_crc(h("01 03 00 10 00 01"))
    assert server.receive(other, IMAGE, Fault.LATE) == good
    assert server.receive(request, IMAGE) == with_crc(h("01 03 02 12 34")) + good


def test_modbus_tcp_faults() -> None:
    request, server = h("15 01 00 00 00 06 01 04 00 00 00 02"), TcpServer(1)
    assert server.receive(request, IMAGE, Fault.WRONG_CHECKSUM) == h("EA 01 00 00 00 07 01 04 04 43 66 33 34")
    assert server.receive(request, IMAGE, Fault.SHORT) == h("15 01 00 00 00 05 01 04 02 43 66")
    assert server.receive(request, IMAGE, Fault.SILENT) == b""
    assert server.receive(request, IMAGE, Fault.LATE) == b""
    assert server.receive(request, IMAGE, Fault.LATE) == h("15 01 00 00 00 07 01 04 04 43 66 33 34")


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_noise_on_the_line_never_breaks_the_server(noise: list[bytes]) -> None:
    server = RtuServer(1)
    for data in noise:
        server.receive(data, IMAGE)
    server.line_idle(IMAGE)
    assert server.receive(h("01 04 00 00 00 02 71 CB"), IMAGE) == h("01 04 04 43 66 33 34 1B 38")


def test_iem3000_registers() -> None:
    image = iem3000(state(import_wh=5_000_196, export_wh=255, power_w=392))
    assert image.read(3, 0x0C83, 8) == h("00 00 00 00 00 4C 4C 04  00 00 00 00 00 00 00 FF")
    assert image.read(3, 0x0BF3, 2) == h("3E C8 B4 39")  # 0.392 kW
    assert image.read(3, 0x0081, 2) == h("00 01 23 45")
    assert image.read(4, 0x0C83, 4) == 0x01


def test_sdm630_and_sdm120_registers() -> None:
    counted = state(import_wh=1_234_567, export_wh=1_000, power_w=1_500)
    image = sdm630(counted)
    # Import 1234.567 kWh and export 1 kWh.
    assert image.read(4, 0x0048, 4) == h("44 9A 52 25  3F 80 00 00")
    assert image.read(4, 0x0034, 2) == h("44 BB 80 00")
    assert image.read(4, 0x0046, 2) == h("42 48 00 00")
    assert image.read(4, 0x000C, 2) == h("00 00 00 00")
    assert image.read(3, 0xFC00, 2) == h("00 01 23 45")
    assert image.read(4, 0x0000, 61) == 0x03
    assert sdm120(counted).read(4, 0x000C, 2) == h("44 BB 80 00")
    assert sdm120(counted).read(4, 0x0048, 4) == h("44 9A 52 25  3F 80 00 00")


def test_abb_b23_registers() -> None:
    image = abb_b23(state(import_wh=1_234_569, export_wh=99, power_w=-1_500))
    # 1234.56 kWh, 0.09 kWh, 1234.47 kWh, -1500.00 W
    assert image.read(3, 0x5000, 12) == h("00000000 0001E240  00000000 00000009  00000000 0001E237")
    assert image.read(3, 0x5B14, 2) == h("FF FD B6 10")
    assert image.read(3, 0x8900, 2) == h("00 01 23 45")


def test_sunspec_inverter_registers() -> None:
    image = sunspec_inverter(state(export_wh=0x01020304, power_w=-1_500))
    assert image.read(3, 40_000, 4) == h("53 75 6E 53  00 01  00 42")
    assert image.read(3, 40_070, 2) == h("00 67 00 32")
    assert image.read(3, 40_070 + 14, 4) == h("05 DC  00 00  13 88  FF FE")
    assert image.read(3, 40_070 + 24, 3) == h("01 02 03 04  00 00")
    # The end of the chain stands right behind the 50 registers of model 103.
    assert image.read(3, 40_070 + 52, 2) == h("FF FF 00 00")


def test_the_scale_factor_of_a_sunspec_inverter_changes_with_the_power() -> None:
    image = sunspec_inverter(state(power_w=-50_000))
    assert image.read(3, 40_084, 1) == h("13 88")
    assert image.read(3, 40_085, 1) == h("00 01")


@pytest.mark.parametrize("kind", sorted(REGISTER_IMAGES))
@given(
    import_wh=st.integers(0, 10**10),
    export_wh=st.integers(0, 10**10),
    power_w=st.integers(-1_000_000, 1_000_000),
)
def test_every_state_has_an_image(kind: str, import_wh: int, export_wh: int, power_w: int) -> None:
    assert REGISTER_IMAGES[kind](state(import_wh, export_wh, power_w)).blocks
