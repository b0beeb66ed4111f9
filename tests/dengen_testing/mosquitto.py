"""A real mosquitto for tests and the demo: a free loopback port, its own config, and it can be killed and restarted.

Persistence is off, as it is by default in the field: whoever needs a message to survive keeps it until it is answered.
"""

import getpass
import os
import shutil
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.topics import DEFAULT_ROOT
from dengen_testing.certificates import Authority
from dengen_testing.processes import ManagedProcess, ProcessEnded
from dengen_testing.waiting import wait_until

MESSAGE_LIMIT_BYTES: Final = 4 * MAX_BLOCK_BYTES
"""Room for the largest message of the protocol (a page, two blocks long) and its topic."""

START_LIMIT_S: Final = 10.0
_PORT_ATTEMPTS: Final = 5
_STANDARD_FOLDERS: Final = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

# MQTT 5 CONNECT: protocol name and version, clean start, keep-alive 10 s, no properties, empty client id.
_CONNECT: Final = bytes.fromhex("10 0d 00 04 4d 51 54 54 05 02 00 0a 00 00 00")
_DISCONNECT: Final = bytes.fromhex("e0 00")
_CONNACK: Final = 0x20


class MosquittoMissing(Exception):
    """There is no mosquitto on this machine."""

    def __init__(self) -> None:
        super().__init__("mosquitto is not installed; install it with `sudo apt-get install mosquitto`")


class Mosquitto:
    """One MQTT server process on 127.0.0.1. Use it in a `with`, or call `start` and `stop`."""

    def __init__(
        self, folder: Path, *, port: int | None = None, tls: Authority | None = None, extra: Sequence[str] = ()
    ) -> None:
        """Config and log go to `folder`. Without `port` a free one is taken. `extra` are further config lines."""
        self._folder = folder
        self._fixed_port = port
        self._tls = tls
        self._extra = tuple(extra)
        self._process: ManagedProcess | None = None
        self.port = port or 0

    @property
    def log_file(self) -> Path:
        return self._folder / "mosquitto.log"

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process is not None else None

    def mqtt_config(self, root: str = DEFAULT_ROOT) -> MqttConfig:
        """How clients reach this server."""
        return MqttConfig(
            host="127.0.0.1", port=self.port, root=root, ca_file=self._tls.ca_file if self._tls is not None else None
        )

    def start(self) -> Self:
        """Start the server and wait until it answers CONNECT. Raises MosquittoMissing, ProcessEnded, WaitedTooLong."""
        binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:{_STANDARD_FOLDERS}")
        if binary is None:
            raise MosquittoMissing
        self._folder.mkdir(parents=True, exist_ok=True)
        attempts = 1 if self._fixed_port else _PORT_ATTEMPTS
        for attempt in range(attempts):
            self.port = self._fixed_port or _free_port()
            config = self._folder / "mosquitto.conf"
            config.write_text(self._config_text())
            process = ManagedProcess("mosquitto", [binary, "-c", str(config)], self.log_file)
            process.start()
            self._process = process
            try:
                wait_until(self._answers, "mosquitto to answer CONNECT", limit_s=START_LIMIT_S, detail=process.log_tail)
            except ProcessEnded:
                # Somebody else took the port between our look and mosquitto's bind.
                if attempt + 1 == attempts:
                    raise
                continue
            # A restart must come back where the clients look for it.
            self._fixed_port = self.port
            return self
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stop(self) -> None:
        """End it as an operator would; kill it if it does not."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """SIGKILL: what was only in its memory is gone."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def restart(self) -> None:
        """Start again on the same port, after `stop` or `kill` or in their place."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _config_text(self) -> str:
        lines = [
            f"listener {self.port} 127.0.0.1",
            "allow_anonymous true",
            "persistence false",
            f"message_size_limit {MESSAGE_LIMIT_BYTES}",
            f"max_packet_size {MESSAGE_LIMIT_BYTES}",
            # 0 means no limit: the windows are the clients' Receive Maximum, and nothing is dropped behind their backs.
            "max_inflight_messages 0",
            "max_queued_messages 0",
            "set_tcp_nodelay true",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            # Started by root, mosquitto becomes another user, who could not read our keys.
            f"user {getpass.getuser()}",
        ]
        if self._tls is not None:
            server = self._tls.server()
            lines += [
                f"cafile {self._tls.ca_file}",
                f"certfile {server.certificate}",
                f"keyfile {server.key}",
                "tls_version tlsv1.3",
            ]
        return "\n".join([*lines, *self._extra, ""])

    def _answers(self) -> bool:
        assert self._process is not None
        self._process.check_running()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as plain:
                if self._tls is None:
                    return _connects(plain)
                context = ssl.create_default_context(cafile=str(self._tls.ca_file))
                with context.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted:
                    return _connects(encrypted)
        except OSError:
            return False


def _connects(connection: socket.socket) -> bool:
    connection.sendall(_CONNECT)
    answer = connection.recv(1)
    if answer != bytes((_CONNACK,)):
        return False
    connection.sendall(_DISCONNECT)
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
