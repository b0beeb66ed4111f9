"""Encrypted P1 ports: a published frame is read with its key; damaged ones are refused without losing the next one."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from support.telegrams import LUXEMBOURG_AUTHENTICATION_KEY, P1_TELEGRAM, SMARTY_FRAME, SMARTY_KEY

from firmware_config.loader import WrongValue
from meter_agent.config import P1Config
from meter_agent.framing.ciphering import MeterKeys
from meter_agent.framing.p1 import parse_telegram
from meter_agent.framing.p1_encrypted import MAX_FRAME_BYTES, EncryptedFrameFinder, EncryptedP1Framer
from meter_agent.framing.telegram import TelegramReading
from meter_agent.readers.p1 import create_p1_reader

KEYS = MeterKeys(SMARTY_KEY, LUXEMBOURG_AUTHENTICATION_KEY)
EXPECTED = TelegramReading(6_695_000, 25_000, 0, "SAG1030700114004", 10**12, 10**12)


def sealed(plain, control=0x30, keys=KEYS, title=b"SAGtest1"):
    """A frame around this, made with AESGCM, whose 16-byte tag is cut to 12 as DLMS does."""
    counter = b"\x00\x00\x00\x07"
    additional = bytes([control]) + keys.authentication
    cipher_text = AESGCM(keys.encryption).encrypt(title + counter, plain, additional if control & 0x10 else None)
    content = bytes([control]) + counter + (cipher_text[:-4] if control & 0x10 else cipher_text[:-16])
    length = bytes([len(content)]) if len(content) < 0x80 else b"\x82" + len(content).to_bytes(2, "big")
    return b"\xdb\x08" + title + length + content


def test_a_frame_of_a_meter_in_luxembourg_is_read():
    framer = EncryptedP1Framer(KEYS)
    (telegram,) = framer.feed(SMARTY_FRAME)
    assert telegram.checked
    assert parse_telegram(telegram) == EXPECTED
    assert (framer.refused, framer.held_bytes) == (0, 0)


def test_a_wrong_key_a_missing_one_and_what_is_no_telegram_are_refused_with_the_reason():
    for keys, frame, reason in (
        (MeterKeys(bytes(16), LUXEMBOURG_AUTHENTICATION_KEY), SMARTY_FRAME, "check both keys"),
        (MeterKeys(SMARTY_KEY), SMARTY_FRAME, "name the port's authentication key"),
        (KEYS, sealed(b"/no telegram"), "there is no telegram with a CRC in it"),
        (KEYS, sealed(P1_TELEGRAM.replace(b"00.244", b"00.245")), "its CRC is F9C3"),
        (KEYS, sealed(P1_TELEGRAM[:-6] + b"\r\n"), "there is no telegram with a CRC in it"),
        (MeterKeys(bytes(16)), sealed(P1_TELEGRAM, control=0x20), "check the port's encryption key"),
    ):
        framer = EncryptedP1Framer(keys)
        assert framer.feed(frame) == ()
        assert framer.refused == 1
        assert reason in framer.last_refusal


def test_a_frame_without_authentication_is_guarded_by_the_telegrams_crc():
    frame = sealed(P1_TELEGRAM, control=0x20)
    for position in range(18, len(frame)):
        damaged = bytearray(frame)
        damaged[position] ^= 0x01
        # Behind the telegram's CRC stand only its CR and LF.
        found = EncryptedP1Framer(MeterKeys(SMARTY_KEY)).feed(bytes(damaged))
        assert found == () or position >= len(frame) - 6
    (telegram,) = EncryptedP1Framer(MeterKeys(SMARTY_KEY)).feed(frame)
    assert parse_telegram(telegram).import_mwh == 6_825_000


@given(st.integers(0, len(SMARTY_FRAME) - 1), st.integers(1, 255))
def test_a_damaged_frame_is_refused_and_the_next_one_read(position, flip):
    damaged = bytearray(SMARTY_FRAME)
    damaged[position] ^= flip
    assert [parse_telegram(t) for t in EncryptedP1Framer(KEYS).feed(bytes(damaged) + SMARTY_FRAME)] == [EXPECTED]


@pytest.mark.parametrize("cut", range(0, len(SMARTY_FRAME), 7))
def test_a_frame_cut_anywhere_costs_only_itself_and_holds_nobody_up(cut):
    framer = EncryptedP1Framer(KEYS)
    assert framer.feed(SMARTY_FRAME[:cut]) == ()
    assert [parse_telegram(t) for t in framer.feed(SMARTY_FRAME)] == [EXPECTED]
    assert [parse_telegram(t) for t in framer.feed(SMARTY_FRAME[cut:] + SMARTY_FRAME)] == [EXPECTED] * (
        2 if not cut else 1
    )


def test_a_frame_that_comes_twice_is_given_out_twice_and_noise_between_is_nothing():
    framer = EncryptedP1Framer(KEYS)
    stream = b"\xdb\x08noise" + SMARTY_FRAME + b"\xdb" * 5 + SMARTY_FRAME + b"\xdb\x08\x00"
    found = [framer.feed(stream[i : i + 11]) for i in range(0, len(stream), 11)]
    assert sum(map(len, found)) == 2


@given(st.lists(st.one_of(st.binary(max_size=60), st.just(b"\xdb\x08" + bytes(8) + b"\x82\x1f\xff\x30")), max_size=30))
def test_any_stream_is_held_in_bounded_memory_and_the_next_frame_is_found(chunks):
    framer = EncryptedP1Framer(KEYS)
    for chunk in chunks:
        framer.feed(chunk)
        assert framer.held_bytes <= MAX_FRAME_BYTES
    assert [parse_telegram(t) for t in framer.feed(SMARTY_FRAME)] == [EXPECTED]


def test_frames_are_found_without_their_keys_where_they_end_with_the_data_or_another_begins():
    assert EncryptedFrameFinder().feed(b"noise\xdb\x08" + SMARTY_FRAME) == (SMARTY_FRAME,)
    finder = EncryptedFrameFinder()
    pieces = [SMARTY_FRAME[i : i + 100] for i in range(0, len(SMARTY_FRAME), 100)]
    assert [finder.feed(piece) for piece in pieces] == [()] * 6 + [(SMARTY_FRAME,)]
    assert EncryptedFrameFinder().feed(SMARTY_FRAME + SMARTY_FRAME[:50]) == (SMARTY_FRAME,)
    # Something else follows, it is far too short, or it is no such frame at all.
    assert EncryptedFrameFinder().feed(SMARTY_FRAME + b"x") == ()
    assert EncryptedFrameFinder().feed(sealed(b"short")) == ()
    assert EncryptedFrameFinder().feed(b"\xdb\x08" + bytes(8) + b"\xff" * 400) == ()


def test_the_config_names_the_keys_and_mistakes_in_them_are_found_before_the_port_is_opened(tmp_path):
    (tmp_path / "p1.key").write_text(SMARTY_KEY.hex() + "\n")
    (tmp_path / "short.key").write_text("00")

    def create(encryption, authentication=None):
        create_p1_reader("house", P1Config("p1", tmp_path / "tty", 115_200, encryption, authentication), None)

    create(None)
    create(tmp_path / "p1.key")
    create(tmp_path / "p1.key", tmp_path / "p1.key")
    for arguments, key in (
        ((tmp_path / "short.key",), "meters.house.reader.encryption_key_file"),
        ((tmp_path / "p1.key", tmp_path / "missing.key"), "meters.house.reader.authentication_key_file"),
        ((None, tmp_path / "p1.key"), "meters.house.reader.encryption_key_file"),
    ):
        with pytest.raises(WrongValue) as error:
            create(*arguments)
        assert error.value.key == key
