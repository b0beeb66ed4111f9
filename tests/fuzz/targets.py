"""What is fuzzed: each target takes any bytes, and may fail only by its framing's declared exception.

A stream target cuts its input into pieces as a serial port would and watches that the framer holds no more than it
says. Then it feeds two good telegrams: whatever came before, the second must be found. A message target hands its input
to the parser behind the checksums, which random bytes would hardly ever pass.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from support.telegrams import (
    ASKED,
    EASYMETER,
    GOOD_SML,
    IMPORT_12345_6_WH,
    LANDIS_GYR_LINES,
    P1_TELEGRAM,
    PUSHED,
    maker,
    power,
    value_list,
)

from meter_agent.framing import dlms, hdlc, iec62056_21, p1, sml
from meter_agent.framing.telegram import MalformedTelegram

KAIFA_FRAME: Final = bytes.fromhex("7EA027010201105A87E6E7000F40000000090C07E1090C0217122AFF80000002010600000528B80C7E")
"""A Kaifa meter's short list, 1320 W, as Norwegian grid companies document it."""


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
}
"""By name. Each is worth a process of its own: a finding ends it."""
