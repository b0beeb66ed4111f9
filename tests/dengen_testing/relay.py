"""TCP relays between nodes, so that a test can cut one off from the others without touching the machine's network."""

import selectors
import socket
import threading
from types import TracebackType
from typing import Final, Self

_CHUNK_BYTES: Final = 65_536
_LOOK_S: Final = 0.05


class Relay:
    """Passes on what comes to `port` of 127.0.0.1 to `target`. While it is cut, connections are closed and refused."""

    def __init__(self, target: str) -> None:
        """`target` is HOST:PORT."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self.port: int = self._listening.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._cut = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """End all connections, and every new one at once."""
        self._cut.set()

    def mend(self) -> None:
        self._cut.clear()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._listening.close()
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            if self._cut.is_set():
                self._drop_all()
            for key, _ in self._selector.select(_LOOK_S):
                if key.data is None:
                    self._accept()
                elif key.data.fileno() != -1:  # The other end of a pair that has just ended is closed already.
                    self._pass_on(key.fileobj, key.data)
        self._drop_all()

    def _accept(self) -> None:
        near, _ = self._listening.accept()
        if self._cut.is_set():
            near.close()
            return
        try:
            far = socket.create_connection(self._target, timeout=2.0)
        except OSError:
            near.close()
            return
        # A peer that reads slowly is waited for: on one machine that never lasts.
        for one, other in ((near, far), (far, near)):
            one.settimeout(10.0)
            self._selector.register(one, selectors.EVENT_READ, other)

    def _pass_on(self, one: object, other: socket.socket) -> None:
        assert isinstance(one, socket.socket)
        try:
            data = one.recv(_CHUNK_BYTES)
            if data:
                other.sendall(data)
                return
        except OSError:
            data = b""
        for each in (one, other):
            self._selector.unregister(each)
            each.close()

    def _drop_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, socket.socket):
                assert isinstance(key.fileobj, socket.socket)
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
