"""Serves the application on a unix socket: CometBFT's four connections, one request after the other.

One thread and one selector for all connections, so the application needs no lock and answers each connection in the
order of its requests. CometBFT reads what was written when it asks to flush; answers are written at once here, which
is sooner.
"""

import selectors
import socket
from collections.abc import Iterable
from pathlib import Path
from threading import Event
from typing import Final

from broker.ledger.cometbft import abci
from broker.ledger.cometbft.application import ApplicationStopped, NodeApplication
from broker.ledger.cometbft.framing import FrameReader, framed
from broker.ledger.cometbft.protobuf import MalformedProtobuf
from broker.ledger.store import LedgerError
from broker.protocol.keys import PrivateKey
from broker.protocol.messages import Genesis

MAX_CONNECTIONS: Final = 16
"""CometBFT opens four; the rest is for a second one that is being started while the first one still goes down."""

MAX_UNSENT_BYTES: Final = 64 * 2**20
"""Answers that a connection has not taken yet. Beyond it its requests wait."""

_READ_BYTES: Final = 256 * 1024
_STOP_CHECK_S: Final = 0.2
_FAREWELL_S: Final = 2.0
_MAX_PATH_BYTES: Final = 107  # sun_path of Linux, without its closing zero byte


def serve_application(
    path: Path,
    genesis: Genesis,
    validator_name: str,
    validator_key: PrivateKey,
    socket_path: Path,
    stop: Event,
    snapshot_every: int,
) -> None:
    """Open the ledger in directory `path` and serve it on `socket_path` until `stop` is set.

    `snapshot_every` must be the same on all nodes; genesis.json's `app_state` says it too.

    Raises LedgerError if the directory cannot be used or the disk refuses, ApplicationStopped if CometBFT and the
    ledger do not fit together, OSError if the socket cannot be made. Whatever was committed stays; a restart goes on.
    """
    application = NodeApplication(path, genesis, validator_name, validator_key, snapshot_every)
    try:
        with ApplicationServer(application, socket_path) as server:
            server.run(stop)
    finally:
        application.close()


class _Connection:
    __slots__ = ("reader", "socket", "unsent")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.reader = FrameReader()
        self.unsent = bytearray()


class ApplicationServer:
    """The socket and its connections. A context manager: leaving it closes all and removes the socket's file."""

    def __init__(self, application: NodeApplication, socket_path: Path) -> None:
        if len(str(socket_path).encode()) > _MAX_PATH_BYTES:
            raise OSError(f"{socket_path}: a socket's path has at most {_MAX_PATH_BYTES} bytes; choose a shorter one")
        self._application = application
        self._path = socket_path
        # What a killed process left behind. The ledger's lock has shown that no other one serves this ledger.
        socket_path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listening.bind(str(socket_path))
            socket_path.chmod(0o600)
            self._listening.listen(MAX_CONNECTIONS)
        except OSError:
            self._listening.close()
            raise
        self._listening.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)

    def __enter__(self) -> "ApplicationServer":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections():
            connection.socket.close()
        self._selector.close()
        self._listening.close()
        self._path.unlink(missing_ok=True)

    def run(self, stop: Event) -> None:
        """Serve until `stop` is set. Raises what `NodeApplication.handle` raises, after telling CometBFT."""
        while not stop.is_set():
            for key, events in self._selector.select(_STOP_CHECK_S):
                if key.data is None:
                    self._accept()
                elif events & selectors.EVENT_WRITE:
                    self._send(key.data)
                else:
                    self._receive(key.data)

    def _connections(self) -> Iterable[_Connection]:
        return [key.data for key in self._selector.get_map().values() if key.data is not None]

    def _accept(self) -> None:
        connected, _ = self._listening.accept()
        if len(list(self._connections())) >= MAX_CONNECTIONS:
            connected.close()
            return
        connected.setblocking(False)
        self._selector.register(connected, selectors.EVENT_READ, _Connection(connected))

    def _receive(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._drop(connection)
            return
        try:
            for frame in connection.reader.feed(data):
                answer = self._application.handle(abci.decode_request(frame))
                connection.unsent += framed(abci.encode_response(answer))
        except (ApplicationStopped, LedgerError, MalformedProtobuf) as error:
            # CometBFT writes this into its log and stops, which is what must happen.
            connection.unsent += framed(abci.encode_response(abci.ExceptionResponse(str(error))))
            self._say_farewell(connection)
            if isinstance(error, MalformedProtobuf):
                self._drop(connection)
                return
            raise
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        """Write what the socket takes; go on reading once little enough is left."""
        try:
            while connection.unsent:
                del connection.unsent[: connection.socket.send(connection.unsent)]
        except BlockingIOError:
            pass
        except ConnectionError:
            self._drop(connection)
            return
        wanted = selectors.EVENT_WRITE if connection.unsent else 0
        if len(connection.unsent) <= MAX_UNSENT_BYTES:
            wanted |= selectors.EVENT_READ
        self._selector.modify(connection.socket, wanted, connection)

    def _say_farewell(self, connection: _Connection) -> None:
        """The last words of a connection: they are worth a short wait."""
        connection.socket.settimeout(_FAREWELL_S)
        try:
            connection.socket.sendall(connection.unsent)
        except OSError:
            return  # Whoever does not listen any more cannot be told; the error itself goes on to the operator.

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
