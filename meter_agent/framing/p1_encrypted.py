"""Encrypted P1 ports (Luxembourg, parts of Austria): DSMR telegrams inside of DLMS frames. Pure.

A frame is a general-glo-ciphering APDU (see `ciphering`) and nothing else: no flags around it, no check sequence. Its
plain text is a P1 telegram with its CRC. So where a frame begins is not sure before it is deciphered, since its first
two bytes may also stand in a cipher text or in noise: every place where one may begin is kept, until one of them
proves right, or is complete and proves wrong.
Source: Luxmetering, "P1 Specification E-meter", section 3.2.5 (channel security), as implemented by
https://github.com/NEXXTLAB/go-smarty-reader.
"""

from typing import Final

from meter_agent.framing.ciphering import GENERAL_GLO_CIPHERING, SYSTEM_TITLE_BYTES, MeterKeys, apdu_bytes, deciphered
from meter_agent.framing.p1 import MAX_TELEGRAM_BYTES, P1Framer, Telegram
from meter_agent.framing.telegram import MalformedTelegram

MAX_FRAME_BYTES: Final = MAX_TELEGRAM_BYTES
"""Longest frame taken; real ones have 650 to 1 300 bytes."""

_LEAST_FRAME_BYTES: Final = 200
"""No telegram with two counters in it is shorter."""

_BEGIN: Final = bytes([GENERAL_GLO_CIPHERING, SYSTEM_TITLE_BYTES])


class EncryptedP1Framer:
    """Cuts a stream into frames and gives out the telegrams in them.

    `refused` counts frames that could not be deciphered, `last_refusal` says why.
    """

    def __init__(self, keys: MeterKeys) -> None:
        self.refused = 0
        self.last_refusal: str | None = None
        self._keys = keys
        self._buffer = bytearray()
        self._begins: list[int] = []
        self._searched = 0

    def feed(self, data: bytes) -> tuple[Telegram, ...]:
        """The telegrams in the frames that `data` completes, in order. Never raises."""
        self._buffer += data
        while (begin := self._buffer.find(_BEGIN, self._searched)) >= 0:
            self._begins.append(begin)
            self._searched = begin + 1
        telegrams: list[Telegram] = []
        pending: list[int] = []
        taken = 0
        for begin in self._begins:
            if begin < taken:
                # It stands inside of a frame that was right.
                continue
            try:
                size = self._size(begin)
                if size is None or begin + size > len(self._buffer):
                    pending.append(begin)
                    continue
                telegrams.append(self._telegram(bytes(self._buffer[begin : begin + size])))
            except MalformedTelegram as error:
                self.refused += 1
                self.last_refusal = error.reason
                continue
            taken = begin + size
            # What began before it and is not complete was cut, or no frame.
            pending.clear()
        # A first byte of a frame at the very end counts as well.
        kept = pending[0] if pending else max(taken, len(self._buffer) - 1)
        del self._buffer[:kept]
        self._begins = [begin - kept for begin in pending]
        self._searched = max(0, len(self._buffer) - 1)
        return tuple(telegrams)

    @property
    def held_bytes(self) -> int:
        """Bytes that may become a frame, at most MAX_FRAME_BYTES."""
        return len(self._buffer)

    def _size(self, begin: int) -> int | None:
        size = apdu_bytes(bytes(self._buffer[begin : begin + 16]))
        if size is not None and size > MAX_FRAME_BYTES:
            raise MalformedTelegram(f"it is {size} bytes long, more than {MAX_FRAME_BYTES}")
        return size

    def _telegram(self, frame: bytes) -> Telegram:
        framer = P1Framer()
        telegrams = framer.feed(deciphered(frame, self._keys) + b"\r\n")
        if len(telegrams) != 1 or not telegrams[0].checked:
            reason = framer.last_refusal or "there is no telegram with a CRC in it"
            raise MalformedTelegram(f"deciphering it gives no telegram ({reason}); check the port's encryption key")
        return telegrams[0]


class EncryptedFrameFinder:
    """Finds frames without their keys, to tell that a port is encrypted. Nothing proves them right: it is a guess."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> tuple[bytes, ...]:
        """What looks like a frame, and ends where the data ends or another one begins. Never raises."""
        self._buffer = (self._buffer + data)[-2 * MAX_FRAME_BYTES :]
        begin = self._buffer.find(_BEGIN)
        while begin >= 0:
            frame, rest = self._frame(self._buffer[begin:])
            if frame and (not rest or rest.startswith(_BEGIN)):
                self._buffer = rest
                return (frame,)
            begin = self._buffer.find(_BEGIN, begin + 1)
        return ()

    def _frame(self, start: bytes) -> tuple[bytes, bytes]:
        """A whole frame of plausible length at the start, and what follows; empty if there is none."""
        try:
            size = apdu_bytes(start)
        except MalformedTelegram:
            size = None
        if size is None or not _LEAST_FRAME_BYTES <= size <= min(MAX_FRAME_BYTES, len(start)):
            return b"", b""
        return start[:size], start[size:]
