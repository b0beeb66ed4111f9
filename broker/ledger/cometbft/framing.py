"""How messages follow one another on the socket: an unsigned varint with the length, then the message. Pure.

Source: https://docs.cometbft.com/v0.38/spec/abci/abci++_client_server ("TSP socket protocol")
"""

from collections.abc import Iterator
from typing import Final

from broker.ledger.cometbft.protobuf import MalformedProtobuf, encode_varint, read_varint

MAX_MESSAGE_BYTES: Final = 32 * 2**20
"""The largest is a snapshot chunk of at most 16 MB; a block's transactions are 2 MB."""


def framed(message: bytes) -> bytes:
    """The bytes of one message on the socket."""
    return encode_varint(len(message)) + message


class FrameReader:
    """Cuts what comes from a socket into messages."""

    __slots__ = ("_at", "_buffer")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take in bytes; gives each message that is whole now. Raises MalformedProtobuf for one over the limit."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += data
        while True:
            head = read_varint(self._buffer, self._at)
            if head is None:
                return
            length, start = head
            if length > MAX_MESSAGE_BYTES:
                raise MalformedProtobuf(f"a message of {length} bytes; {MAX_MESSAGE_BYTES} is the most")
            if start + length > len(self._buffer):
                return
            self._at = start + length
            yield bytes(self._buffer[start : self._at])
