"""What DLMS meters encrypt: general-glo-ciphering APDUs, undone with the keys that the utility gives out. Pure.

Tag DB, the system title behind its length, a length, then security control, frame counter, cipher text, and with
authentication a tag of 12 bytes. The cipher is AES-128-GCM of security suites 0 and 1; the nonce is system title and
counter, and what is authenticated besides is the control byte and a key of its own.
Source: DLMS UA Green Book, section 9.2.7 (summary in IEC 62056-5-3).
"""

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM

from meter_agent.framing.telegram import MalformedTelegram

GENERAL_GLO_CIPHERING: Final = 0xDB
SYSTEM_TITLE_BYTES: Final = 8
KEY_BYTES: Final = 16

_TAG_BYTES: Final = 12
_COUNTER_BYTES: Final = 4
_AUTHENTICATED: Final = 0x10
_ENCRYPTED: Final = 0x20
_COMPRESSED: Final = 0x80
_SUITE: Final = 0x0F
_SUITES_WITH_AES_128: Final = (0, 1)

_TITLE_END: Final = 2 + SYSTEM_TITLE_BYTES
_LENGTH_BYTES: Final = {0x81: 1, 0x82: 2}
"""How many bytes of length follow; below 80 the byte is the length itself."""


@dataclass(frozen=True, slots=True)
class MeterKeys:
    """The keys of an encrypted port, 16 bytes each. `authentication` is needed where the meter uses it."""

    encryption: bytes
    authentication: bytes | None = None


def apdu_bytes(start: bytes) -> int | None:
    """How long the APDU is that begins so; None if that is not known yet. Raises MalformedTelegram if it is none."""
    if len(start) >= 2 and start[:2] != bytes([GENERAL_GLO_CIPHERING, SYSTEM_TITLE_BYTES]):
        raise MalformedTelegram("it is not encrypted as DLMS does, or its system title is not 8 bytes long")
    if len(start) <= _TITLE_END:
        return None
    first = start[_TITLE_END]
    if first < 0x80:
        return _TITLE_END + 1 + first
    if first not in _LENGTH_BYTES:
        raise MalformedTelegram(f"a length starts with {first:02X}")
    content = _TITLE_END + 1 + _LENGTH_BYTES[first]
    return content + int.from_bytes(start[_TITLE_END + 1 : content], "big") if len(start) >= content else None


def deciphered(apdu: bytes, keys: MeterKeys | None) -> bytes:
    """The plain text of a whole APDU. Raises MalformedTelegram.

    Without authentication nothing tells a wrong key: then the caller has to see whether the plain text makes sense.
    """
    if keys is None:
        raise MalformedTelegram("it is encrypted; ask the utility for the port's keys and name them in the config")
    size = apdu_bytes(apdu)
    if size is None or size > len(apdu):
        raise MalformedTelegram(f"it ends too early, after {len(apdu)} bytes")
    if size < len(apdu):
        raise MalformedTelegram(f"{len(apdu) - size} bytes follow its end")
    content = apdu[_TITLE_END + 1 + _LENGTH_BYTES.get(apdu[_TITLE_END], 0) :]
    if len(content) < 1 + _COUNTER_BYTES:
        raise MalformedTelegram("it is too short to be encrypted")
    control, cipher_text = content[0], content[1 + _COUNTER_BYTES :]
    nonce = apdu[2:_TITLE_END] + content[1 : 1 + _COUNTER_BYTES]
    if control & _COMPRESSED or control & _SUITE not in _SUITES_WITH_AES_128 or not control & _ENCRYPTED:
        raise MalformedTelegram(f"its security control is {control:02X}, which is not AES-128-GCM without compression")
    if not control & _AUTHENTICATED:
        # GCM without its tag is counter mode from 2 on; only the checks of what is around it and inside guard it.
        return Cipher(AES(keys.encryption), CTR(nonce + b"\x00\x00\x00\x02")).decryptor().update(cipher_text)
    if keys.authentication is None:
        raise MalformedTelegram("it is authenticated; name the port's authentication key in the config too")
    if len(cipher_text) < _TAG_BYTES:
        raise MalformedTelegram("it is too short to be authenticated")
    tag = cipher_text[-_TAG_BYTES:]
    decryptor = Cipher(AES(keys.encryption), GCM(nonce, tag, min_tag_length=_TAG_BYTES)).decryptor()
    decryptor.authenticate_additional_data(bytes([control]) + keys.authentication)
    plain = decryptor.update(cipher_text[:-_TAG_BYTES])
    try:
        return plain + decryptor.finalize()
    except InvalidTag as error:
        raise MalformedTelegram("its authentication tag is wrong; check both keys of the port") from error
