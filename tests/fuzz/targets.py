"""What is fuzzed: each target takes any bytes, and may fail only by the declared exception of what reads them.

A stream target cuts its input into pieces as a serial port would and watches that the framer holds no more than it
says. Then it feeds two good telegrams: whatever came before, the second must be found. A message target hands its input
to the parser behind the checksums, which random bytes would hardly ever pass. Where a library takes the bytes apart
(M-Bus, route B) the whole reader is fuzzed with the library inside, and only the port is replaced.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import momonga
from momonga.momonga_device import BP35A1Strategy, parse_sk_line
from support.telegrams import (
    ASKED,
    EASYMETER,
    GOOD_SML,
    IMPORT_12345_6_WH,
    LANDIS_GYR_LINES,
    LUXEMBOURG_AUTHENTICATION_KEY,
    P1_TELEGRAM,
    PUSHED,
    SMARTY_FRAME,
    SMARTY_KEY,
    maker,
    power,
    value_list,
)

from meter_agent.config import MBusConfig
from meter_agent.framing import dlms, hdlc, iec62056_21, mbus, p1, p1_encrypted, sml
from meter_agent.framing.ciphering import MeterKeys
from meter_agent.framing.telegram import MalformedTelegram
from meter_agent.readers.broute import BRouteReader, Errors
from meter_agent.readers.mbus import MBusReader, import_meterbus
from meter_agent.readings import ReadFailure

KAIFA_FRAME: Final = bytes.fromhex("7EA027010201105A87E6E7000F40000000090C07E1090C0217122AFF80000002010600000528B80C7E")
"""A Kaifa meter's short list, 1320 W, as Norwegian grid companies document it."""

FINDER: Final = bytes.fromhex(
    "6838386808197207620023 2E19230292000000 8C100468281700 8C110468281700 02FDC9FF01E600 02FDDBFF010600"
    "02ACFF010900 8240ACFF01FDFF 5B16"
)
"""A Finder 7E.23: https://github.com/rscada/libmbus test/test-frames/FIN-Finder-7E.23.8.230.0020.hex."""

MBUS_ADDRESS: Final = 0x19
METERBUS: Final = import_meterbus("fuzz")

METER: Final = "FE80:0000:0000:0000:021C:6400:6014:21A3"
HALF_HOUR: Final = datetime(2026, 5, 20, 5, 0, tzinfo=UTC)
"""14:00 in Japan, the half hour of the values below."""

ROUTE_B_PROPERTIES: Final = ("01", "00000001", "1941414160404000624300414040430202")
"""E1, D3 and 9F of real meters, captured by their owners (tests/unit/meter_agent/test_echonet.py names them)."""
ROUTE_B_SEEDS: Final[tuple[tuple[int, tuple[str, ...]], ...]] = (
    (0, ("463234473336363530350000", "06", "07EA05140E00000000FE68", "07EA05140E000000000016", "00000278")),
    (1, ("463234473336363530350000", "06", "07EA05140E00000000FE68", "07EA05140E0000FFFFFFFE", "7FFFFFFE")),
    (2, ("463234473336363530350000", "06", "0000FE68", "00000016", "00000278")),
)
"""What follows them, for each way of reading."""
ROUTE_B_REPLIES: Final = (
    "1081 0001 028801 05FF01 72 01 E1 01 01",
    "1081 0002 028801 05FF01 72 01 D3 04 00000001",
    "1081 0003 028801 05FF01 72 01 9F 11 1941414160404000624300414040430202",
    "1081 0004 028801 05FF01 72 02 8D 0C 463234473336363530350000 D7 01 06",
    "1081 0005 028801 05FF01 72 03 EA 0B 07EA05140E00000000FE68 EB 0B 07EA05140E000000000016 E7 04 00000278",
)
"""The same as whole ECHONET Lite frames."""


class Broken(AssertionError):
    """The code under test did what it must never do."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something to fuzz: `run` raises on a finding; `seeds` are inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def feed_stream(
    data: bytes, make_framer: Callable[[], Any], parse: Callable[[Any], Any], good: bytes, most_held: int
) -> None:
    """Cut `data` into pieces whose size is its first byte, feed them, and then two good telegrams."""
    framer = make_framer()
    size = (data[0] if data else 0) % 64 + 1
    for start in range(1, len(data), size):
        for telegram in framer.feed(data[start : start + size]):
            with suppress(MalformedTelegram):
                parse(telegram)
        if framer.held_bytes > most_held:
            raise Broken(f"the framer holds {framer.held_bytes} bytes, more than {most_held}")
    framer.feed(good)
    found = framer.feed(good)
    if not found:
        raise Broken("a good telegram was not found")
    parse(found[-1])


def parse_message(data: bytes, parse: Callable[[bytes], Any]) -> None:
    """Read `data` as a message whose checksums were right."""
    with suppress(MalformedTelegram):
        parse(data)


def with_inner_crc(data: bytes) -> bytes:
    """An SML message that ends with the right checksum."""
    return data + b"\x63" + sml.Crc.X25.of(data) + b"\x00"


def p1_lines(data: bytes) -> p1.Telegram:
    """A P1 telegram with these lines; its first byte says whether it had a checksum."""
    return p1.Telegram(b"/X\r\n" + data[1:] + b"!", checked=bool(data[:1] > b"\x7f"))


def text_lines(data: bytes) -> iec62056_21.Telegram:
    """An IEC 62056-21 telegram with these lines; its first byte says whether it was a data block."""
    lines = data[1:].decode("ascii", "replace").split("\n")
    return iec62056_21.Telegram(
        iec62056_21.Identification("LGZ", "5", ""), tuple(lines), checked=bool(data[:1] > b"\x7f")
    )


def sign_on(data: bytes) -> None:
    """A conversation with a meter that answers anything."""
    conversation = iec62056_21.SignOn()
    for start in range(0, len(data), 16):
        with suppress(MalformedTelegram):
            conversation.feed(data[start : start + 16])


class Clock:
    """Stands still."""

    def monotonic_s(self) -> float:
        return 1_000_000.0

    def time_s(self) -> float:
        return HALF_HOUR.timestamp() + 100


class MBusAnswers:
    """A line on which an acknowledgement comes first, and then whatever `next_answer` gives, byte by byte as asked."""

    def __init__(self, data: bytes, next_answer: Callable[[bytes], tuple[bytes, bytes]]) -> None:
        self.lock = threading.RLock()
        self._rest = data
        self._next_answer = next_answer

    def exchange(self, meter: str, request: bytes, timeout_s: float) -> bytes:
        if request[1] == mbus.SND_NKE:
            return bytes([mbus.ACKNOWLEDGE])
        arriving, self._rest = self._next_answer(self._rest)
        answer = b""
        while missing := mbus.missing_bytes(answer):
            if len(answer) + missing > mbus.MAX_FRAME_BYTES:
                raise Broken(f"waits for a frame of {len(answer) + missing} bytes")
            piece = arriving[len(answer) : len(answer) + missing]
            if not piece:
                raise mbus.MalformedFrame("no answer")
            answer += piece
        return answer

    def close(self) -> None:
        """Nothing to let go of."""


def mbus_bytes(rest: bytes) -> tuple[bytes, bytes]:
    """Any bytes are the first answer."""
    return rest, b""


def mbus_frame(rest: bytes) -> tuple[bytes, bytes]:
    """A frame whose envelope is right: its length, header and records are from the input."""
    size = rest[0] if rest else 0
    body = bytes([0x08, MBUS_ADDRESS, 0x72]) + rest[1 : 1 + min(size, 250)]
    frame = bytes([0x68, len(body), len(body), 0x68]) + body + bytes([sum(body) & 0xFF, 0x16])
    return frame, rest[1 + size :]


def read_mbus(data: bytes, next_answer: Callable[[bytes], tuple[bytes, bytes]]) -> None:
    """An M-Bus meter that answers what it likes."""
    config = MBusConfig("mbus", Path("tty"), MBUS_ADDRESS)
    line: Any = MBusAnswers(data, next_answer)
    with suppress(ReadFailure):
        sample = MBusReader("fuzz", config, line, Clock(), METERBUS).sample()
        for energy_mwh in (sample.import_mwh, sample.export_mwh):
            if not (energy_mwh is None or (type(energy_mwh) is int and energy_mwh >= 0)):
                raise Broken(f"a counter reads {energy_mwh!r}")


class Adapter:
    """In place of momonga's session: each request is answered by lines that `next_lines` makes of request and input."""

    smart_meter_addr = METER

    def __init__(self, data: bytes, next_lines: "NextLines") -> None:
        self.recv_q = Received()
        self._rest = data
        self._next_lines = next_lines

    def open(self) -> None:
        """The session is there."""

    def close(self) -> None:
        """Nothing to end."""

    def xmitter(self, payload: bytes, timeout: float) -> None:
        lines, self._rest = self._next_lines(payload, self._rest)
        for line in lines.decode(errors="replace").split("\r\n"):
            parsed = parse_sk_line(line, BP35A1Strategy())
            if parsed is not None:
                self.recv_q.put(parsed)


class Received(queue.Queue[Any]):
    """A queue into which nothing more comes while somebody waits."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block=False)


NextLines = Callable[[bytes, bytes], tuple[bytes, bytes]]


def any_lines(_request: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """Up to an empty line of the input is the answer."""
    lines, _, rest = rest.partition(b"\r\n\r\n")
    return lines, rest


def property_lines(request: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """A reply that fits the request; how long each property is and what it says is from the input."""
    reply = request[:4] + request[7:10] + request[4:7] + b"\x72" + request[11:12]
    for position in range(request[11]):
        size = rest[0] if rest else 0
        value, rest = rest[1 : 1 + size], rest[1 + size :]
        reply += bytes([request[12 + 2 * position], len(value)]) + value
    return udp_line(reply), rest


def udp_line(payload: bytes) -> bytes:
    """What a BP35A1 says when the meter has sent this."""
    return f"ERXUDP {METER} {METER} 0E1A 0E1A 001C6400601421A3 1 {len(payload):04X} {payload.hex()}".encode()


def read_broute(data: bytes, next_lines: NextLines) -> None:
    """A meter on route B that answers what it likes. The first byte says which register is billed, and how."""
    flags = data[0] if data else 0
    register: Literal["import", "export"] = "export" if flags & 1 else "import"

    def make_session() -> Any:
        session = momonga.Momonga("0" * 32, "0" * 12, "tty")
        session.internal_xmit_interval = 0
        session.xmit_retries = 1
        session.session_manager = Adapter(data[1:], next_lines)
        return session

    errors = Errors(momonga.MomongaError, (momonga.MomongaResponseNotExpected, momonga.MomongaResponseNotPossible))
    reader = BRouteReader("fuzz", register, "present" if flags & 2 else "half_hour", Clock(), make_session, errors)
    with suppress(ReadFailure):
        sample = reader.sample()
        for energy_mwh in (sample.import_mwh, sample.export_mwh):
            if not (energy_mwh is None or (type(energy_mwh) is int and energy_mwh >= 0)):
                raise Broken(f"a counter reads {energy_mwh!r}")


def sized(*values: str) -> bytes:
    """Values in hex, each behind its length, as the targets take them."""
    return b"".join(bytes([len(value)]) + value for value in map(bytes.fromhex, values))


TARGETS: Final = {
    "p1": Target(
        partial(
            feed_stream,
            make_framer=p1.P1Framer,
            parse=p1.parse_telegram,
            good=P1_TELEGRAM,
            most_held=p1.MAX_TELEGRAM_BYTES + p1.MAX_TRAILER_BYTES,
        ),
        (b"\x00" + P1_TELEGRAM, b"\x3f" + P1_TELEGRAM[:50] + P1_TELEGRAM),
    ),
    "p1_encrypted": Target(
        partial(
            feed_stream,
            make_framer=partial(p1_encrypted.EncryptedP1Framer, MeterKeys(SMARTY_KEY, LUXEMBOURG_AUTHENTICATION_KEY)),
            parse=p1.parse_telegram,
            good=SMARTY_FRAME,
            most_held=p1_encrypted.MAX_FRAME_BYTES,
        ),
        (b"\x00" + SMARTY_FRAME, b"\x3f" + SMARTY_FRAME[:99] + SMARTY_FRAME),
    ),
    "p1_lines": Target(
        lambda data: parse_message(data, lambda raw: p1.parse_telegram(p1_lines(raw))),
        (b"\x00" + P1_TELEGRAM[4:-7], b"\xff" + P1_TELEGRAM[4:-7]),
    ),
    "sml": Target(
        partial(
            feed_stream,
            make_framer=sml.SmlFramer,
            parse=sml.parse_frame,
            good=GOOD_SML,
            most_held=sml.MAX_FRAME_BYTES,
        ),
        (b"\x00" + GOOD_SML, b"\x3f" + GOOD_SML[:-3] + GOOD_SML, b"\x07" + b"\x1b" * 20 + GOOD_SML),
    ),
    "sml_message": Target(
        lambda data: parse_message(with_inner_crc(data), sml.parse_frame),
        tuple(
            value_list(*entries)[:-4]
            for entries in ((IMPORT_12345_6_WH,), (maker("DZG"), IMPORT_12345_6_WH, power("53 8B28")))
        ),
    ),
    "iec62056_21": Target(
        partial(
            feed_stream,
            make_framer=iec62056_21.Iec62056Framer,
            parse=iec62056_21.parse_telegram,
            good=ASKED,
            most_held=iec62056_21.MAX_TELEGRAM_BYTES + iec62056_21.MAX_LINE_BYTES,
        ),
        (b"\x00" + PUSHED, b"\x3f" + ASKED[:100] + PUSHED + ASKED),
    ),
    "iec62056_21_lines": Target(
        lambda data: parse_message(data, lambda raw: iec62056_21.parse_telegram(text_lines(raw), unit="kWh")),
        (b"\x00" + EASYMETER.encode()[22:], b"\xff" + LANDIS_GYR_LINES.encode()),
    ),
    "iec62056_21_sign_on": Target(sign_on, (ASKED, PUSHED)),
    "hdlc": Target(
        partial(
            feed_stream,
            make_framer=hdlc.HdlcFramer,
            parse=dlms.parse_list,
            good=KAIFA_FRAME,
            most_held=hdlc.MAX_FRAME_BYTES + hdlc.MAX_MESSAGE_BYTES + 2,
        ),
        (b"\x00" + KAIFA_FRAME, b"\x3f" + KAIFA_FRAME[:20] + KAIFA_FRAME),
    ),
    "dlms_list": Target(lambda data: parse_message(data, dlms.parse_list), (KAIFA_FRAME[8:-3],)),
    "mbus": Target(partial(read_mbus, next_answer=mbus_bytes), (FINDER, FINDER[:40], b"\xe5" + FINDER)),
    "mbus_records": Target(
        partial(read_mbus, next_answer=mbus_frame),
        (sized(FINDER[7:-2].hex()), sized(FINDER[7:-2].hex() + "1F", FINDER[7:-2].hex())),
    ),
    "broute": Target(
        partial(read_broute, next_lines=any_lines),
        (b"\x00" + b"\r\n\r\n".join(udp_line(bytes.fromhex(reply)) for reply in ROUTE_B_REPLIES),),
    ),
    "broute_properties": Target(
        partial(read_broute, next_lines=property_lines),
        tuple(bytes([flags]) + sized(*ROUTE_B_PROPERTIES, *more) for flags, more in ROUTE_B_SEEDS),
    ),
}
"""By name. Each is worth a process of its own: a finding ends it."""
