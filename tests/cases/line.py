"""A line between one broker and the MQTT server that loses chosen messages, as a bad network or a dying server does.

It understands as much MQTT 5 as that takes. A message that is lost was acknowledged to its sender, so nobody sends it
again but those who miss its answer. What was lost is kept in `lost`: a test can let it arrive late.
"""

import selectors
import socket
import threading
from dataclasses import dataclass
from typing import Final, Self

_CHUNK_BYTES: Final = 65_536
_LOOK_S: Final = 0.05
_PUBLISH: Final = 3
_PUBACK: Final = b"\x40\x02"


@dataclass(frozen=True, slots=True)
class Published:
    """One PUBLISH that passed or was lost."""

    topic: str
    payload: bytes


class Line:
    """A TCP relay to `port` of 127.0.0.1. `lose` says what does not arrive on the other side, in either direction."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._unread: dict[socket.socket, bytearray] = {}
        self._to_lose: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.lost: list[Published] = []
        self._thread = threading.Thread(target=self._run, name="line", daemon=True)
        self._thread.start()

    def lose(self, topic_end: str, times: int) -> None:
        """The next `times` messages whose topic ends like this do not arrive."""
        with self._lock:
            self._to_lose[topic_end] = times

    def lose_nothing(self) -> None:
        """From now on everything arrives."""
        with self._lock:
            self._to_lose = {}

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._listening.close()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            for key, _ in self._selector.select(_LOOK_S):
                if key.data is None:
                    self._accept()
                elif key.data.fileno() != -1:  # The other end of a pair that has just ended is closed already.
                    self._pass_on(key.fileobj, key.data)
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._end(key.fileobj)

    def _accept(self) -> None:
        near, _ = self._listening.accept()
        try:
            far = socket.create_connection(("127.0.0.1", self._server_port), timeout=2.0)
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.settimeout(10.0)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(one, selectors.EVENT_READ, other)
            self._unread[one] = bytearray()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        try:
            data = one.recv(_CHUNK_BYTES)
            if data:
                self._unread[one] += data
                for packet in _packets(self._unread[one]):
                    if self._is_lost(packet):
                        one.sendall(_acknowledgement(packet))
                    else:
                        other.sendall(packet)
                return
        except OSError:
            pass
        self._end(one)
        self._end(other)

    def _end(self, one: socket.socket) -> None:
        self._selector.unregister(one)
        del self._unread[one]
        one.close()

    def _is_lost(self, packet: bytes) -> bool:
        if packet[0] >> 4 != _PUBLISH:
            return False
        message = _published(packet)
        with self._lock:
            for topic_end, times in self._to_lose.items():
                if times and message.topic.endswith(topic_end):
                    self._to_lose[topic_end] = times - 1
                    self.lost.append(message)
                    return True
        return False


def _packets(unread: bytearray) -> list[bytes]:
    """Take the whole packets off the front."""
    packets = []
    while len(unread) >= 2:
        length, at = _variable_integer(unread, 1)
        if at is None or len(unread) < at + length:
            break
        packets.append(bytes(unread[: at + length]))
        del unread[: at + length]
    return packets


def _variable_integer(data: bytes | bytearray, at: int) -> tuple[int, int | None]:
    """MQTT's length: the number, and where it ends; None if it is not whole."""
    value = 0
    for shift in range(0, 28, 7):
        if at >= len(data):
            return 0, None
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("no MQTT packet")


def _published(packet: bytes) -> Published:
    _, at = _variable_integer(packet, 1)
    assert at is not None
    length = int.from_bytes(packet[at : at + 2], "big")
    topic = packet[at + 2 : at + 2 + length].decode()
    at += 2 + length + (2 if _quality_of_service(packet) else 0)
    properties, at_end = _variable_integer(packet, at)
    assert at_end is not None
    return Published(topic, packet[at_end + properties :])


def _quality_of_service(packet: bytes) -> int:
    return packet[0] >> 1 & 3


def _acknowledgement(packet: bytes) -> bytes:
    """PUBACK of a QoS 1 message; nothing for QoS 0."""
    if not _quality_of_service(packet):
        return b""
    _, at = _variable_integer(packet, 1)
    assert at is not None
    length = int.from_bytes(packet[at : at + 2], "big")
    return _PUBACK + packet[at + 2 + length : at + 4 + length]
