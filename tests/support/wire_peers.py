"""The other ends of wires that readers read from, for tests in which a meter misbehaves byte by byte."""

import os
import pty
import select
import threading
import time
import tty
from pathlib import Path

from meter_agent.config import MeterConfig, NamedMeter


class Clock:
    """Monotonic time that is real, calendar time that stands still."""

    def monotonic_s(self):
        return time.monotonic()

    def time_s(self):
        return 1_700_000_000.0


class Peer:
    """The other end of a wire in a thread. `behave(request, peer)` answers each request by `peer.send`."""

    def __init__(self, behave):
        self.behave = behave
        self.requests = []
        self._wake_reader, self._wake_writer = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def stop(self):
        os.write(self._wake_writer, b"x")
        self._thread.join(5)
        assert not self._thread.is_alive()


class SerialPeer(Peer):
    """A device on a pseudo-terminal; `port` is the agent's side.

    `take` gives the length of the first whole request in what came, or 0; reads of Modbus RTU have eight bytes.
    """

    def __init__(self, behave=lambda request, peer: None, take=lambda received: 8 if len(received) >= 8 else 0):
        super().__init__(behave)
        self._take = take
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self.port = Path(os.ttyname(self._slave))
        self._received = b""

    def send(self, data):
        os.write(self.master, data)

    def unplug(self):
        self.stop()
        os.close(self._slave)
        os.close(self.master)

    def _run(self):
        while True:
            readable, _, _ = select.select([self.master, self._wake_reader], [], [])
            if self._wake_reader in readable:
                return
            self._received += os.read(self.master, 4096)
            while length := self._take(self._received):
                request, self._received = self._received[:length], self._received[length:]
                self.requests.append(request)
                self.behave(request, self)


def meter(reader, name="house-1", direction="consumption"):
    return NamedMeter(name, MeterConfig(direction, Path("key.pem"), 10_000, reader))
