"""Several wire-level meters on one RS-485 line (a pseudo-terminal) or behind one TCP gateway, in a thread of the test.

Frames and registers are those of `dengen_testing.wire`, written by hand.
"""

import os
import select
import socket
import threading
import tty
from collections.abc import Mapping
from pathlib import Path

from dengen_testing.wire.faults import Fault
from dengen_testing.wire.modbus import RegisterImage, RtuServer, TcpServer


class _Bus:
    def __init__(self, meters: Mapping[int, RegisterImage]) -> None:
        self.meters = dict(meters)
        self.faults: dict[int, Fault] = {}
        self.asked: list[int] = []
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        raise NotImplementedError


class SerialBus(_Bus):
    """Meters on one line. `port` is the reader's side."""

    def __init__(self, meters: Mapping[int, RegisterImage]) -> None:
        self._ours, self._theirs = os.openpty()
        tty.setraw(self._theirs)
        self.port = Path(os.ttyname(self._theirs))
        self._servers = {device_id: RtuServer(device_id) for device_id in meters}
        super().__init__(meters)

    def close(self) -> None:
        super().close()
        os.close(self._ours)
        os.close(self._theirs)

    def _run(self) -> None:
        while True:
            unfinished = any(server.waiting_for_more for server in self._servers.values())
            readable, _, _ = select.select([self._ours, self._wake_read], [], [], 0.02 if unfinished else None)
            if self._wake_read in readable:
                return
            data = os.read(self._ours, 4_096) if readable else b""
            if data:
                self.asked.append(data[0])
            for device_id, server in self._servers.items():
                image, fault = self.meters[device_id], self.faults.get(device_id, Fault.NONE)
                answer = server.receive(data, image, fault) if data else server.line_idle(image, fault)
                if answer:
                    os.write(self._ours, answer)


class TcpBus(_Bus):
    """Meters behind one gateway on 127.0.0.1, which answers exception 11 for devices that are not there."""

    def __init__(self, meters: Mapping[int, RegisterImage]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        super().__init__(meters)

    def close(self) -> None:
        super().close()
        self._listener.close()

    def _run(self) -> None:
        connections: dict[int, tuple[socket.socket, bytes]] = {}
        while True:
            readable, _, _ = select.select([self._listener.fileno(), self._wake_read, *connections], [], [])
            if self._wake_read in readable:
                break
            for descriptor in readable:
                if descriptor == self._listener.fileno():
                    accepted, _ = self._listener.accept()
                    connections[accepted.fileno()] = (accepted, b"")
                    continue
                connection, held = connections[descriptor]
                data = connection.recv(4_096)
                if not data:
                    del connections[descriptor]
                    connection.close()
                    continue
                received = held + data
                while len(received) >= 7 and len(received) >= 6 + int.from_bytes(received[4:6], "big"):
                    end = 6 + int.from_bytes(received[4:6], "big")
                    frame, received = received[:end], received[end:]
                    self._answer(connection, frame)
                connections[descriptor] = (connection, received)
        for connection, _ in connections.values():
            connection.close()

    def _answer(self, connection: socket.socket, frame: bytes) -> None:
        unit = frame[6]
        self.asked.append(unit)
        image = self.meters.get(unit, RegisterImage(()))
        server = TcpServer(unit if unit in self.meters else -1)
        connection.sendall(server.receive(frame, image, self.faults.get(unit, Fault.NONE)))
