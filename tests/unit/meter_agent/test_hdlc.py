"""HDLC frames: found in a dirty stream, checked and joined; damaged ones are refused one by one.

The frames come from other people's meters: https://github.com/toreamun/amshan tests/test_hdlc.py (Aidon, with an escape
character in it; Kaifa, with a flag in it) and https://github.com/roarfred/AmsToMqttBridge Samples/Kaifa.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meter_agent.framing.hdlc import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, HdlcFramer, crc16_x25

AIDON = bytes.fromhex("7ea02a410883130413e6e7000f40000000000101020309060100010700ff060000067d02020f00161b1c057e")
KAIFA_WITH_FLAG = bytes.fromhex("7ea027010201105a87e6e7000f40000000090c07e4020f06011922ff8000000201060000157eea5e7e")
KAIFA = bytes.fromhex("7ea027010201105a87e6e7000f40000000090c07e1090c0217122aff80000002010600000528b80c7e")
FRAMES = (AIDON, KAIFA_WITH_FLAG, KAIFA)


def content(frame: bytes) -> bytes:
    return frame[9:-3]


def frame(information: bytes, more: bool = False, header: str = "4108 8313") -> bytes:
    """A frame with addresses 41 and 0883, control 13. Independent of the code under test but for the CRC."""
    addresses = bytes.fromhex(header)
    length = 2 + len(addresses) + 2 + len(information) + 2
    head = (0xA000 | (0x0800 if more else 0) | length).to_bytes(2, "big") + addresses
    head += crc16_x25(head).to_bytes(2, "little")
    body = head + information
    return b"\x7e" + body + crc16_x25(body).to_bytes(2, "little") + b"\x7e"


@pytest.mark.parametrize("captured", FRAMES)
def test_frames_of_real_meters_are_whole_with_flags_and_escapes_inside(captured):
    framer = HdlcFramer()
    assert framer.feed(captured) == (content(captured),)
    assert (framer.refused, framer.held_bytes) == (0, 1)


def test_frames_follow_each_other_with_one_flag_or_many_between():
    for between in (b"", b"\x7e" * 5_000):
        framer = HdlcFramer()
        stream = KAIFA[:-1] + between + AIDON
        assert framer.feed(stream) == (content(KAIFA), content(AIDON))
        assert framer.refused == 0


@given(st.lists(st.sampled_from(FRAMES), max_size=4), st.integers(1, 50))
def test_how_the_stream_is_cut_into_reads_changes_nothing(frames, size):
    stream = b"".join(frames)
    framer = HdlcFramer()
    messages = [m for i in range(0, len(stream), size) for m in framer.feed(stream[i : i + size])]
    assert messages == [content(f) for f in frames]


@pytest.mark.parametrize("position", range(1, len(KAIFA) - 1))
def test_every_flipped_bit_is_noticed_and_the_next_frame_is_read(position):
    for bit in range(8):
        damaged = bytearray(KAIFA)
        damaged[position] ^= 1 << bit
        framer = HdlcFramer()
        messages = framer.feed(bytes(damaged) + AIDON + AIDON)
        assert messages == (content(AIDON), content(AIDON))
        assert framer.refused >= 1


@pytest.mark.parametrize("cut", range(1, len(KAIFA) - 1))
def test_a_frame_cut_anywhere_costs_only_itself(cut):
    framer = HdlcFramer()
    messages = framer.feed(KAIFA[:cut] + AIDON)
    assert messages[-1:] == (content(AIDON),)
    assert content(KAIFA) not in messages


@pytest.mark.parametrize("start", range(1, len(KAIFA)))
def test_a_stream_that_starts_inside_a_frame_is_picked_up(start):
    framer = HdlcFramer()
    assert framer.feed(KAIFA[start:] + AIDON)[-1:] == (content(AIDON),)


def test_a_frame_that_is_doubled_is_given_out_twice():
    assert HdlcFramer().feed(KAIFA + KAIFA) == (content(KAIFA),) * 2


def test_segments_are_joined():
    framer = HdlcFramer()
    assert framer.feed(frame(b"abc", more=True) + frame(b"def", more=True)) == ()
    assert framer.feed(frame(b"gh")) == (b"abcdefgh",)
    assert framer.feed(frame(b"ij")) == (b"ij",)


def test_a_damaged_segment_takes_the_others_with_it():
    bad = bytearray(frame(b"def", more=True))
    bad[-2] ^= 1
    framer = HdlcFramer()
    assert framer.feed(frame(b"abc", more=True) + bytes(bad) + frame(b"gh")) == (b"gh",)
    assert "frame check sequence" in framer.last_refusal


def test_a_cut_frame_does_not_hold_back_the_next_one():
    """Its length asks for far more bytes than come within a minute."""
    framer = HdlcFramer()
    assert framer.feed(frame(bytes(1_000))[:50] + AIDON) == (content(AIDON),)
    assert framer.last_refusal == "it was cut off"


def test_segments_without_end_are_given_up():
    framer = HdlcFramer()
    segment = frame(bytes(2_000), more=True)
    for _ in range(20):
        assert framer.feed(segment) == ()
        assert framer.held_bytes <= MAX_MESSAGE_BYTES + 2
    assert "segments are longer" in framer.last_refusal


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"\x7e\xb0\x27" + KAIFA[3:], "its format is B0"),
        (b"\x7e\xa0\x03" + KAIFA[3:], "its length is 3"),
        (b"\x7e\xa0\x08" + KAIFA[3:], "shorter than its header|check sequence|no flag"),
        (KAIFA[:8] + b"\x00" + KAIFA[9:], "header check sequence"),
        (KAIFA[:20] + b"\x00" + KAIFA[21:], "frame check sequence"),
        (KAIFA[:-1] + b"\x00", "no flag stands at its end"),
        (b"\x7e\xa0\x20" + b"\x02" * 12, "addresses do not end"),
    ],
)
def test_the_reason_is_named(damaged, reason):
    framer = HdlcFramer()
    framer.feed(damaged)
    assert re.search(reason, framer.last_refusal)


@given(st.binary(max_size=3_000))
def test_garbage_is_never_a_message_and_never_kept(garbage):
    framer = HdlcFramer()
    framer.feed(garbage)
    assert framer.held_bytes <= MAX_FRAME_BYTES + 2
    assert framer.feed(AIDON)[-1:] == (content(AIDON),)
