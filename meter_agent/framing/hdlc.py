"""HDLC: whole messages out of a stream of bytes, as smart meters push them on their HAN port. Pure.

A frame is a flag (7E), two bytes of format and length, destination and source address (1 to 4 bytes each, the last one
odd), a control byte, a check sequence of this header (HCS) if data follows, the data, a check sequence of everything
between the flags (FCS), and a flag. The length says where a frame ends, so a 7E inside is data and nothing is escaped.
A message too long for one frame comes in segments: bit 0x0800 of the format says that more follow.
Source: IEC 62056-46 (frame format type 3); the check sequence is the FCS-16 of RFC 1662, appendix C.

A stream starts anywhere and is damaged anywhere. What does not check out is refused and counted, and the search goes on
behind its first flag only, so that a good frame right after (or inside of what looked like) a bad one is found.
"""

from contextlib import suppress
from typing import Final

MAX_FRAME_BYTES: Final = 2_047
"""The length field has eleven bits. Flags are not counted."""

MAX_MESSAGE_BYTES: Final = 8_192
"""Longest message of several segments that is put together; the longest list known has about 900 bytes."""

_FLAG: Final = 0x7E
_FLAG_BYTES: Final = b"\x7e"
_FORMAT_TYPE: Final = 0xA
_MORE_SEGMENTS: Final = 0x08
_MAX_ADDRESS_BYTES: Final = 4
_CHECK_BYTES: Final = 2
_SHORTEST: Final = 2 + 1 + 1 + 1 + _CHECK_BYTES


class _Refused(Exception):
    """What starts at the flag is no good frame, because of this."""


class _Unfinished(Exception):
    """More bytes are needed to tell."""


class HdlcFramer:
    """Cuts a stream into messages. `refused` counts frames that were not whole, `last_refusal` says why."""

    def __init__(self) -> None:
        self.refused = 0
        self.last_refusal: str | None = None
        self._buffer = bytearray()
        self._segments = bytearray()

    def feed(self, data: bytes) -> tuple[bytes, ...]:
        """The messages that `data` completes, in order, without HDLC header and check sequences. Never raises."""
        messages: list[bytes] = []
        # In pieces, because a frame that looks unfinished holds back what follows it.
        for start in range(0, len(data), MAX_FRAME_BYTES):
            self._buffer += data[start : start + MAX_FRAME_BYTES]
            self._scan(messages)
        return tuple(messages)

    @property
    def held_bytes(self) -> int:
        """Bytes that wait for more: at most MAX_FRAME_BYTES and the flags, and MAX_MESSAGE_BYTES in segments."""
        return len(self._buffer) + len(self._segments)

    def _scan(self, messages: list[bytes]) -> None:
        while True:
            start = self._buffer.find(_FLAG)
            if start < 0:
                self._buffer.clear()
                return
            # Several flags in a row are one: the first of them ended a frame.
            while self._buffer[start + 1 : start + 2] == _FLAG_BYTES:
                start += 1
            del self._buffer[:start]
            try:
                length, header_bytes = self._check(0)
            except _Unfinished:
                if not self._cut_off():
                    return
                continue
            except _Refused as refusal:
                del self._buffer[0]
                self._note(str(refusal))
                continue
            information = bytes(self._buffer[1 + header_bytes : 1 + length - _CHECK_BYTES])
            more = bool(self._buffer[1] & _MORE_SEGMENTS)
            # The closing flag stays: it may be the next frame's opening flag as well.
            del self._buffer[: length + 1]
            message = self._join(information, more)
            if message:
                messages.append(message)

    def _cut_off(self) -> bool:
        """Give up an unfinished frame if a whole one has come behind it: only a cut one is followed by another."""
        start = self._buffer.find(_FLAG, 1)
        while start >= 0:
            with suppress(_Unfinished, _Refused):
                self._check(start)
                del self._buffer[:start]
                self._note("it was cut off")
                return True
            start = self._buffer.find(_FLAG, start + 1)
        return False

    def _check(self, start: int) -> tuple[int, int]:
        """Length of the frame that starts there, and of its header with HCS."""
        buffer = self._buffer[start : start + MAX_FRAME_BYTES + 2]
        if len(buffer) < 2:
            raise _Unfinished
        if buffer[1] >> 4 != _FORMAT_TYPE:
            raise _Refused(f"its format is {buffer[1]:02X}, not that of HDLC frame type 3")
        if len(buffer) < 3:
            raise _Unfinished
        length = (buffer[1] & 0x07) << 8 | buffer[2]
        if length < _SHORTEST:
            raise _Refused(f"its length is {length}")
        header_bytes = _header_bytes(buffer, length)
        if length > header_bytes + _CHECK_BYTES:
            _require(buffer, header_bytes + _CHECK_BYTES)
            if not _checks(buffer[1 : 1 + header_bytes + _CHECK_BYTES]):
                raise _Refused("its header check sequence is wrong")
            header_bytes += _CHECK_BYTES
        _require(buffer, length + 1)
        if buffer[1 + length] != _FLAG:
            raise _Refused("no flag stands at its end")
        if not _checks(buffer[1 : 1 + length]):
            raise _Refused("its frame check sequence is wrong")
        return length, header_bytes

    def _join(self, information: bytes, more: bool) -> bytes:
        """The whole message, or nothing yet."""
        if not more and not self._segments:
            return information
        if len(self._segments) + len(information) > MAX_MESSAGE_BYTES:
            self._note(f"its segments are longer than {MAX_MESSAGE_BYTES} bytes")
            return b""
        self._segments += information
        if more:
            return b""
        message = bytes(self._segments)
        self._segments.clear()
        return message

    def _note(self, reason: str) -> None:
        self._segments.clear()
        self.refused += 1
        self.last_refusal = reason


def _header_bytes(buffer: bytearray, length: int) -> int:
    """Bytes of format, addresses and control."""
    position = 2
    for _ in ("destination", "source"):
        for i in range(_MAX_ADDRESS_BYTES):
            _require(buffer, position + i + 1)
            if buffer[1 + position + i] & 1:
                position += i + 1
                break
        else:
            raise _Refused("its addresses do not end")
    if position + 1 + _CHECK_BYTES > length:
        raise _Refused(f"its length is {length}, shorter than its header")
    return position + 1


def _require(buffer: bytearray, count: int) -> None:
    """That many bytes behind the flag."""
    if len(buffer) < 1 + count:
        raise _Unfinished


def crc16_x25(data: bytes) -> int:
    """FCS-16 of RFC 1662 (also called CRC-16/X-25). In a frame it stands low byte first."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x8408 if crc & 1 else 0)
    return crc ^ 0xFFFF


def _checks(checked: bytearray) -> bool:
    """Whether the last two bytes are the check sequence of those before."""
    return crc16_x25(bytes(checked[:-_CHECK_BYTES])) == int.from_bytes(checked[-_CHECK_BYTES:], "little")
