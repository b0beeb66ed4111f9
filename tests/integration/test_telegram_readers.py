"""SML, IEC 62056-21 and encrypted P1 readers against meters that misbehave on a real pseudo-terminal.

Hazards 3 (no number), 11 (renumbered port) and 14 (garbage): late, short, garbled, doubled, silent, unplugged.
"""

import select
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
from dengen_testing.waiting import wait_until
from support.telegrams import (
    EASYMETER,
    EXPORT_7_8_WH,
    GOOD_SML,
    LANDIS_GYR_IDENTIFICATION,
    LANDIS_GYR_LINES,
    LUXEMBOURG_AUTHENTICATION_KEY,
    SMARTY_FRAME,
    SMARTY_KEY,
    block,
    entry,
    even,
    power,
    sml,
)
from support.wire_peers import Clock, SerialPeer, meter

from firmware_config.loader import ConfigError, load_config
from meter_agent.config import Iec62056Config, MeterConfig, P1Config, SmlConfig
from meter_agent.framing.p1 import crc16 as p1_crc16
from meter_agent.framing.telegram import ObisChoice
from meter_agent.readers import create_reader
from meter_agent.readers.iec62056_21 import SignOnReader
from meter_agent.readings import ReadFailure

pytestmark = pytest.mark.integration

TIMEOUT_S = 0.15
PATIENCE_S = 5.0


def sml_frame(tenths_of_wh: int) -> bytes:
    return sml(entry("0100010800FF", f"65 {tenths_of_wh:08X}"), EXPORT_7_8_WH, power("55 0000001E", "52 00"))


def pushed_lines(wh: int) -> bytes:
    return even(EASYMETER.replace("00026107.7034231", f"{wh // 1000:08d}.{wh % 1000:03d}0000").encode())


def p1_telegram(wh: int) -> bytes:
    counters = f"1-0:1.8.1({wh // 1000:06d}.{wh % 1000:03d}*kWh)\r\n1-0:1.8.2(000000.000*kWh)\r\n"
    body = f"/ISk5\\2MT382-1000\r\n\r\n1-3:0.2.8(50)\r\n{counters}1-0:2.8.1(000000.000*kWh)\r\n!".encode()
    return body + b"%04X\r\n" % p1_crc16(body)


def babble(peer: SerialPeer, stop: threading.Event, noise: bytes) -> None:
    """Fill the line with noise until told to stop."""
    while not stop.is_set():
        _, writable, _ = select.select([], [peer.master], [], 0.01)
        if writable:
            peer.send(noise)


PUSHED = {
    "sml": (lambda port, timeout_s: SmlConfig("sml", port, timeout_s=timeout_s), lambda wh: sml_frame(10 * wh)),
    "iec62056_21": (
        lambda port, timeout_s: Iec62056Config("iec62056_21", port, "D", timeout_s=timeout_s),
        pushed_lines,
    ),
    "p1": (lambda port, timeout_s: P1Config("p1", port, timeout_s=timeout_s), p1_telegram),
}


@pytest.fixture(params=PUSHED)
def pushed(request, peers, closing):
    """A meter that pushes, and a reader that has opened its port and read 1000 Wh."""
    make_config, telegram = PUSHED[request.param]
    peer = peers(SerialPeer())
    peer.send(telegram(999_999))  # before the reader is there: never to be read
    reader = closing(create_reader(meter(make_config(peer.port, PATIENCE_S)), Clock()))
    samples = []
    first = threading.Thread(target=lambda: samples.append(reader.sample()))
    first.start()
    wait_until(lambda: reader._port is not None, "the port to be open")
    peer.send(telegram(1_000))
    first.join(10)
    assert [sample.import_mwh for sample in samples] == [1_000_000]
    reader._timeout_s = TIMEOUT_S
    return peer, reader, telegram


def test_the_newest_of_all_telegrams_that_came_is_read(pushed):
    peer, reader, telegram = pushed
    for i in range(2, 6):
        peer.send(telegram(1_000 * i))
    peer.send(telegram(6_000)[:50])
    wait_until(
        lambda: (
            reader._port._newest and reader._port._newest[0].import_mwh == 5_000_000 and reader._port._framer.held_bytes
        ),
        "the unfinished telegram to arrive",
    )
    assert reader.sample().import_mwh == 5_000_000


def test_no_telegram_is_given_out_twice_and_silence_is_a_failure(pushed):
    peer, reader, telegram = pushed
    with pytest.raises(ReadFailure, match=r"no telegram within 0\.15 s; does the (optical head sit|meter.s P1 port)"):
        reader.sample()
    peer.send(telegram(2_000))
    reader._timeout_s = PATIENCE_S
    assert reader.sample().import_mwh == 2_000_000


def test_a_telegram_that_comes_late_and_in_pieces_is_read_when_it_is_whole(pushed):
    peer, reader, telegram = pushed
    whole = telegram(2_000)
    peer.send(whole[:100])
    with pytest.raises(ReadFailure):
        reader.sample()
    peer.send(whole[100:])
    reader._timeout_s = PATIENCE_S
    assert reader.sample().import_mwh == 2_000_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:60] + raw[63:],
        lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
        lambda raw: raw[:60] + raw[40:],
        lambda raw: raw[:60] + bytes(range(256)) + raw[60:],
    ],
    ids=["short", "garbled", "doubled", "noisy"],
)
def test_a_damaged_telegram_is_refused_and_named_and_the_next_is_read(pushed, damage):
    peer, reader, telegram = pushed
    peer.send(damage(telegram(2_000)))
    with pytest.raises(ReadFailure, match=r"no whole telegram within .* refused: "):
        reader.sample()
    peer.send(telegram(3_000))
    reader._timeout_s = PATIENCE_S
    assert reader.sample().import_mwh == 3_000_000


def test_more_than_the_kernel_holds_never_makes_a_telegram_stale(pushed):
    peer, reader, telegram = pushed
    for i in range(2, 60):
        peer.send(telegram(1_000 * i))
    wait_until(lambda: reader._port._newest and reader._port._newest[0].import_mwh == 59_000_000, "the last telegram")
    assert reader.sample().import_mwh == 59_000_000


def test_a_line_that_never_falls_silent_does_not_hold_the_reader(pushed):
    peer, reader, _ = pushed
    stop = threading.Event()
    babbler = threading.Thread(target=babble, args=(peer, stop, b"\x1b/\x55LGZ5" * 16))
    babbler.start()
    try:
        started = time.monotonic()
        with pytest.raises(ReadFailure):
            reader.sample()
        assert time.monotonic() - started < 10 * TIMEOUT_S
    finally:
        stop.set()
        babbler.join(10)


@pytest.mark.parametrize("protocol", PUSHED)
def test_an_unplugged_head_is_a_failure_and_comes_back_by_itself_under_another_number(
    peers, closing, tmp_path, protocol
):
    make_config, telegram = PUSHED[protocol]
    by_id = tmp_path / "usb-head"
    peer = peers(SerialPeer())
    by_id.symlink_to(peer.port)
    reader = closing(create_reader(meter(make_config(by_id, TIMEOUT_S)), Clock()))
    with pytest.raises(ReadFailure, match="no telegram"):
        reader.sample()
    by_id.unlink()
    peer.unplug()
    with pytest.raises(ReadFailure, match="is gone"):
        reader.sample()
    with pytest.raises(ReadFailure, match="is missing; is the cable plugged in"):
        reader.sample()
    again = peers(SerialPeer())
    by_id.symlink_to(again.port)
    stop = threading.Event()

    def repeat():
        while not stop.wait(0.01):
            again.send(telegram(7_000))

    meter_thread = threading.Thread(target=repeat)
    meter_thread.start()
    try:
        assert reader.sample().import_mwh == 7_000_000
    finally:
        stop.set()
        meter_thread.join()


def test_an_sml_sample_has_counters_power_and_serial_number(peers, closing):
    peer = peers(SerialPeer())
    reader = closing(create_reader(meter(SmlConfig("sml", peer.port, timeout_s=PATIENCE_S)), Clock()))
    samples = []
    reading = threading.Thread(target=lambda: samples.append(reader.sample()))
    reading.start()
    wait_until(lambda: reader._port is not None, "the port to be open")
    peer.send(GOOD_SML)
    reading.join(10)
    (sample,) = samples
    assert (sample.import_mwh, sample.export_mwh, sample.power_w) == (12_345_600, 7_800, -30)
    assert (sample.serial_number, sample.time_s) == ("1ISK0067174915", 1_700_000_000.0)


IDENTIFICATION = even(LANDIS_GYR_IDENTIFICATION.encode())
REQUEST, ACKNOWLEDGEMENT = even(b"/?!\r\n"), even(b"\x06040\r\n")


def data_block(wh: int) -> bytes:
    return even(block(LANDIS_GYR_LINES.replace("1.8.0(001234.120", f"1.8.0({wh // 1000:06d}.{wh % 1000:03d}")))


def one_line(received: bytes) -> int:
    return received.find(even(b"\n")) + 1


class AskedMeter(SerialPeer):
    """Answers a request by its identification, and an acknowledgement by the next of `answers`."""

    def __init__(self, *answers: bytes, identification: bytes = IDENTIFICATION) -> None:
        super().__init__(self._answer, one_line)
        self._identification = identification
        self._answers = list(answers)

    def _answer(self, request, peer):
        if request == REQUEST:
            self.send(self._identification)
        elif self._answers:
            self.send(self._answers.pop(0))


def asking(port, timeout_s=PATIENCE_S, wait_s=lambda duration_s: None, **more):
    config = Iec62056Config("iec62056_21", port, "C", timeout_s=timeout_s, **more)
    return SignOnReader("house-1", config, Clock(), wait_s)


def test_a_meter_is_asked_and_read_at_the_rate_that_it_proposes(peers, closing):
    peer = peers(AskedMeter(data_block(1_000), data_block(2_000)))
    waits = []
    reader = closing(asking(peer.port, wait_s=waits.append))
    sample = reader.sample()
    assert (sample.import_mwh, sample.export_mwh, sample.serial_number) == (1_000_000, 0, "LGZ12314330")
    assert peer.requests == [REQUEST, ACKNOWLEDGEMENT]
    assert reader._handle.baudrate == 4_800
    assert waits == [pytest.approx(6 * 10 / 300 + 0.015)]  # the acknowledgement goes out at 300 Bd
    assert reader.sample().import_mwh == 2_000_000
    assert peer.requests[2:] == [REQUEST, ACKNOWLEDGEMENT]


def test_the_reader_made_from_a_config_waits_for_real(peers, closing):
    peer = peers(AskedMeter(data_block(1_000)))
    config = Iec62056Config("iec62056_21", peer.port, "C", max_baud=2_400, timeout_s=PATIENCE_S)
    reader = closing(create_reader(meter(config), Clock()))
    started = time.monotonic()
    assert reader.sample().import_mwh == 1_000_000
    assert time.monotonic() - started > 0.2
    assert peer.requests[1] == even(b"\x06030\r\n")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "the meter answers and sends no data within"),
        (data_block(1_000)[:80], "the meter answers and sends no data within"),
        (data_block(1_000)[:-1] + b"\xff", "refused: its check character is"),
        (data_block(1_000)[:60] + data_block(1_000)[80:], "refused: its check character is"),
        (bytes(range(256)) * 4, "the meter answers and sends no data|refused"),
        (even(block("F.F(01)\r\n1.8.0(1*kWh)\r\n!\r\n")), "the meter reports a fatal error"),
        (even(block("1.8.0(1)\r\n!\r\n")), "without a unit"),
    ],
    ids=["silent", "short", "garbled", "a piece lost", "noise", "fatal error", "no unit"],
)
def test_a_bad_answer_is_a_failure_and_the_next_is_right(peers, closing, answer, reason):
    peer = peers(AskedMeter(answer, data_block(2_000)))
    reader = closing(asking(peer.port, TIMEOUT_S))
    with pytest.raises(ReadFailure, match=reason):
        reader.sample()
    assert reader._handle is None
    reader._config = Iec62056Config("iec62056_21", peer.port, "C", timeout_s=PATIENCE_S)
    assert reader.sample().import_mwh == 2_000_000


def test_a_doubled_answer_is_read_once(peers, closing):
    peer = peers(AskedMeter(data_block(1_000) * 2, data_block(2_000)))
    reader = closing(asking(peer.port))
    assert reader.sample().import_mwh == 1_000_000
    assert reader.sample().import_mwh == 2_000_000


def test_a_late_answer_is_never_taken_for_the_next_one(peers, closing):
    """It comes when the next request has gone out, before the meter identifies itself again."""
    answers = []

    def behave(request, peer):
        if request == REQUEST:
            peer.send((data_block(1_000) if answers else b"") + IDENTIFICATION)
        else:
            answers.append(request)
            if len(answers) > 1:
                peer.send(data_block(2_000))

    peer = peers(SerialPeer(behave, one_line))
    reader = closing(asking(peer.port, TIMEOUT_S))
    with pytest.raises(ReadFailure, match="sends no data"):
        reader.sample()
    reader._config = Iec62056Config("iec62056_21", peer.port, "C", timeout_s=PATIENCE_S)
    assert reader.sample().import_mwh == 2_000_000


def test_a_head_that_echoes_what_it_sends_is_no_trouble(peers, closing):
    def behave(request, peer):
        peer.send(request + (IDENTIFICATION if request == REQUEST else data_block(1_000)))

    peer = peers(SerialPeer(behave, one_line))
    assert closing(asking(peer.port)).sample().import_mwh == 1_000_000


def test_a_silent_meter_and_one_of_another_mode_are_named(peers, closing):
    silent = peers(SerialPeer(take=one_line))
    with pytest.raises(ReadFailure, match=r"no answer within 0\.15 s; does the optical head sit straight"):
        closing(asking(silent.port, TIMEOUT_S)).sample()
    of_mode_b = peers(AskedMeter(identification=even(b"/LGZCZMF\r\n")))
    with pytest.raises(ReadFailure, match="does not speak mode C"):
        closing(asking(of_mode_b.port)).sample()


def test_noise_without_end_does_not_hold_the_asking_reader(peers, closing):
    stop = threading.Event()

    peer = peers(SerialPeer(lambda request, peer: babble(peer, stop, b"\x55\xaa/LGZ" * 16), one_line))
    reader = closing(asking(peer.port, TIMEOUT_S))
    started = time.monotonic()
    try:
        with pytest.raises(ReadFailure):
            reader.sample()
        assert time.monotonic() - started < 10 * TIMEOUT_S
    finally:
        stop.set()


def test_an_asked_meter_that_is_unplugged_comes_back_by_itself(peers, closing, tmp_path):
    by_id = tmp_path / "usb-head"
    first = peers(AskedMeter(data_block(1_000)))
    by_id.symlink_to(first.port)
    reader = closing(asking(by_id))
    assert reader.sample().import_mwh == 1_000_000
    by_id.unlink()
    first.unplug()
    with pytest.raises(ReadFailure, match="is gone"):
        reader.sample()
    with pytest.raises(ReadFailure, match="is missing; is the cable plugged in"):
        reader.sample()
    second = peers(AskedMeter(data_block(3_000)))
    by_id.symlink_to(second.port)
    assert reader.sample().import_mwh == 3_000_000


@pytest.mark.parametrize(
    ("config", "module"),
    [
        ("SmlConfig('sml', Path('/nowhere'))", "sml"),
        ("Iec62056Config('iec62056_21', Path('/nowhere'), 'C')", "iec62056_21"),
        ("Iec62056Config('iec62056_21', Path('/nowhere'), 'D')", "iec62056_21"),
    ],
)
def test_only_the_reader_that_the_config_names_is_imported(config, module):
    code = (
        "import sys; from pathlib import Path\n"
        "from meter_agent.config import *; from meter_agent.readers import create_reader\n"
        f"create_reader(NamedMeter('house-1', MeterConfig('consumption', Path('k'), 1, {config})), None)\n"
        "found = {name for name in sys.modules if name.startswith(('meter_agent.framing.', 'pymodbus'))}\n"
        f"assert found == {{'meter_agent.framing.telegram', 'meter_agent.framing.{module}'}}, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def config_file(folder: Path, reader: str) -> Path:
    path = folder / "meter.toml"
    path.write_text(f'direction = "consumption"\nkey_file = "k"\ncapacity_w = 1\n[reader]\n{reader}\n')
    assert tomllib.loads(path.read_text())
    return path


def test_configs_are_read_from_files(tmp_path):
    path = config_file(tmp_path, 'protocol = "sml"\nport = "/dev/a"\nobis = { imports = ["1.8.1", "1.8.2"] }')
    assert load_config(path, MeterConfig).reader == SmlConfig(
        "sml", Path("/dev/a"), obis=ObisChoice(imports=("1.8.1", "1.8.2"))
    )
    path = config_file(tmp_path, 'protocol = "iec62056_21"\nport = "/dev/a"\nmode = "C"\nunit = "kWh"')
    assert load_config(path, MeterConfig).reader == Iec62056Config("iec62056_21", Path("/dev/a"), "C", unit="kWh")


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        ('protocol = "sml"\nport = "/dev/a"\nobis = { imports = ["1.8"] }', r"obis\.imports: expected OBIS codes"),
        ('protocol = "sml"\nport = "/dev/a"\nobis = { power = "P" }', r"obis\.power: expected OBIS codes"),
        (
            'protocol = "iec62056_21"\nport = "/dev/a"\nmode = "C"\ndevice_address = "!"',
            "device_address: expected at most",
        ),
        ('protocol = "iec62056_21"\nport = "/dev/a"', "mode"),
    ],
)
def test_configs_that_cannot_be_meant_are_named(tmp_path, reader, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(config_file(tmp_path, reader), MeterConfig)


def test_an_encrypted_p1_port_is_read_with_its_keys_and_says_so_without(peers, closing, tmp_path):
    (tmp_path / "p1.key").write_text(SMARTY_KEY.hex())
    (tmp_path / "p1-auth.key").write_text(LUXEMBOURG_AUTHENTICATION_KEY.hex())
    peer = peers(SerialPeer())
    keys = (tmp_path / "p1.key", tmp_path / "p1-auth.key")
    reader = closing(create_reader(meter(P1Config("p1", peer.port, 115_200, *keys, timeout_s=PATIENCE_S)), Clock()))
    samples = []
    reading = threading.Thread(target=lambda: samples.append(reader.sample()))
    reading.start()
    wait_until(lambda: reader._port is not None, "the port to be open")
    # One that lost bytes, and the next: nobody waits for the length that the first one said.
    peer.send(SMARTY_FRAME[:300] + SMARTY_FRAME[320:] + SMARTY_FRAME)
    reading.join(10)
    assert [(sample.import_mwh, sample.serial_number) for sample in samples] == [(6_695_000, "SAG1030700114004")]
    reader.close()
    blind = closing(create_reader(meter(P1Config("p1", peer.port, timeout_s=TIMEOUT_S)), Clock()))
    peer.send(SMARTY_FRAME)
    with pytest.raises(ReadFailure, match=r"is it encrypted \(then name its keys\)\?"):
        blind.sample()
