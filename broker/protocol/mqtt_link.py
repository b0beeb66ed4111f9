"""The one MQTT shell, for agents, brokers and whoever else takes part: paho-mqtt, MQTT 5, one thread.

The caller owns the loop: `poll` waits for messages, keeps the connection alive and reconnects with back-off and jitter.
QoS 1 messages are acknowledged by the caller, after the effect is committed to disk. Every connection is a clean start
with a fresh client, and what is published while the link is down is dropped: queues belong to those who persist them.
They watch `connections` and send again what has no answer yet when it changes.

QoS 0 messages and acknowledgements, which are most of what a broker sends, are encoded here and go out many to a system
call: paho makes several objects for each packet and writes each by itself. What needs an answer (CONNECT, SUBSCRIBE,
QoS 1) is paho's. There is one order for all: own bytes are only queued while paho has nothing to write, and paho writes
only when all own bytes are out.
"""

import contextlib
import os
import random
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from broker.protocol.addresses import Host, Port, Seconds, Topic
from broker.protocol.errors import KeyFileError
from broker.protocol.files import read_file, reason_of
from broker.protocol.lean_import import deferred
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.topics import DEFAULT_ROOT

with deferred("urllib.request"):
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
    from paho.mqtt.subscribeoptions import SubscribeOptions

FIRST_BACK_OFF_S: Final = 0.2
LONGEST_BACK_OFF_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 5.0
CONNACK_TIMEOUT_S: Final = 10.0
DEFAULT_RECEIVE_MAXIMUM: Final = 1_024
"""Unacknowledged messages that the server may send us: larger than a group commit, or the window limits throughput."""

MAX_MESSAGES_A_POLL: Final = 512
"""Bounds the memory and the time of one turn of the caller's loop. Half the receive maximum, so that the server goes on
sending while a turn is in work; and what a turn of so many needs fits into a processor's cache.
"""

SEND_AT_BYTES: Final = 65_536
"""So many bytes are not held back for more to come; about what a socket's send buffer takes at once."""

_MAX_PASSWORD_BYTES: Final = 65_535
"""More does not fit into CONNECT (OASIS MQTT 5.0, section 3.1.3.6)."""

_PUBACK: Final = b"\x40\x02"
_PUBLISH_QOS_0: Final = 0x30
_RETAIN: Final = 0x01


@dataclass(frozen=True, slots=True)
class MqttConfig:
    """How to reach the MQTT server. TLS is on when `ca_file` is given; then TLS 1.3 or 1.2 with that CA only."""

    host: Annotated[str, Host()] = "localhost"
    port: Annotated[int, Port()] = 1883
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    keepalive_s: Annotated[int, Seconds()] = 30
    root: Annotated[str, Topic()] = DEFAULT_ROOT


class Incoming(NamedTuple):
    """One received message. `connection` tells which connection it came on; acknowledging it on a later one is void."""

    topic: str
    payload: bytes
    retained: bool
    qos: int
    mid: int
    connection: int


class MqttLink:
    """A connection to one MQTT server that comes back by itself. Not thread-safe but for `wake`."""

    def __init__(
        self,
        config: MqttConfig,
        client_id: str,
        subscriptions: Sequence[tuple[str, int]],
        *,
        will: tuple[str, bytes] | None = None,
        receive_maximum: int = DEFAULT_RECEIVE_MAXIMUM,
    ) -> None:
        """`subscriptions` are (topic filter, QoS); `will` is retained at QoS 1 when the connection is lost.

        Raises KeyFileError for a file of `config` that cannot be used.
        """
        self._config = config
        self._client_id = client_id
        self._subscriptions = list(subscriptions)
        self._will = will
        self._receive_maximum = receive_maximum
        self._client: paho.Client | None = None
        self._messages: deque[Incoming] = deque()
        self._unsent = bytearray()
        self._jitter = random.Random()
        self._back_off_s = FIRST_BACK_OFF_S
        self._next_attempt_s = 0.0
        self._connack_by_s = 0.0
        self._last_failure = ""
        self.connected = False
        self.connections = 0
        # Re-entrant, because a signal handler may call `wake` while its own thread is in `wake` or `close`.
        self._wake_lock = threading.RLock()
        self._closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._tls = _tls_context(config) if config.ca_file is not None else None
        self._password = _password(config.password_file) if config.password_file is not None else None

    @property
    def last_failure(self) -> str:
        """Why the link is down, in words for an operator; empty while it never failed."""
        return self._last_failure

    def poll(self, timeout_s: float, max_messages: int = MAX_MESSAGES_A_POLL) -> list[Incoming]:
        """Wait up to `timeout_s` for messages and return those that have come, oldest first, at most `max_messages`.

        Returns early (possibly empty) when the connection changes or `wake` is called.
        """
        deadline_s = time.monotonic() + timeout_s
        before = self.connections, self.connected
        while True:
            self._keep_up()
            wait_s = deadline_s - time.monotonic()
            if self._client is None:
                wait_s = min(wait_s, self._next_attempt_s - time.monotonic())
            woken = self._wait(max(0.0, wait_s if not self._messages else 0.0), max_messages)
            changed = before != (self.connections, self.connected)
            if self._messages or woken or changed or time.monotonic() >= deadline_s:
                break
        count = min(max_messages, len(self._messages))
        return [self._messages.popleft() for _ in range(count)]

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Queue a message for sending; it goes out at the next `poll` or `flush`. Dropped while the link is down."""
        if self._client is None or not self.connected:
            return
        if qos == 0 and self._may_queue(self._client):
            self._unsent += publish_packet(topic, payload, retain)
            if len(self._unsent) >= SEND_AT_BYTES:
                self._send_own(self._client)
        else:
            self._client.publish(topic, payload, qos, retain)

    def acknowledge(self, incoming: Incoming) -> None:
        """Tell the server that the effect of `incoming` is committed. Void if the connection has changed since."""
        if not incoming.qos or self._client is None or not self.connected or incoming.connection != self.connections:
            return
        if incoming.qos == 1 and self._may_queue(self._client):
            self._unsent += _PUBACK + incoming.mid.to_bytes(2, "big")
        else:
            self._client.ack(incoming.mid, incoming.qos)

    def flush(self) -> None:
        """Send what is queued as far as the socket takes it."""
        if self._client is not None and self._send_own(self._client) and self._client.want_write():
            self._client.loop_write()

    def wake(self) -> None:
        """Make a `poll` return. From any thread or a signal handler, also after `close`: then nobody waits any more."""
        with self._wake_lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Send what is queued, disconnect properly (the will is not published) and free everything."""
        client = self._client
        if client is not None:
            if self.connected:
                client.disconnect()
            deadline_s = time.monotonic() + 2.0
            while self._wants_write(client) and client.socket() is not None and time.monotonic() < deadline_s:
                if not self._writable(0.1):
                    continue
                self.flush()
            self._drop_client()
        with self._wake_lock:
            # Before the descriptors are closed, because their numbers go to the next files that are opened.
            self._closed = True
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _keep_up(self) -> None:
        now_s = time.monotonic()
        if self._client is None:
            if now_s >= self._next_attempt_s:
                self._connect(now_s)
            return
        self._client.loop_misc()
        if not self.connected and now_s > self._connack_by_s:
            self._failed(f"no answer to CONNECT within {CONNACK_TIMEOUT_S:.0f} s")
        elif self._client is not None and self._client.socket() is None:
            self._failed(self._last_failure or "connection lost")

    def _connect(self, now_s: float) -> None:
        client = paho.Client(CallbackAPIVersion.VERSION2, self._client_id, protocol=paho.MQTTv5, manual_ack=True)
        client.suppress_exceptions = False
        client.connect_timeout = CONNECT_TIMEOUT_S
        # 0 means unlimited: how much is under way is bounded by the queues of those who publish.
        client.max_inflight_messages = 0
        # With this callback set paho queues packets instead of writing each at once; `flush` and `poll` write.
        client.on_socket_register_write = _leave_writing_to_the_loop
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        if self._config.username is not None:
            client.username_pw_set(self._config.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        if self._will is not None:
            client.will_set(self._will[0], self._will[1], qos=1, retain=True)
        properties: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = self._receive_maximum
        properties.MaximumPacketSize = 2 * MAX_BLOCK_BYTES + 65_536
        self._client = client
        self._connack_by_s = now_s + CONNECT_TIMEOUT_S + CONNACK_TIMEOUT_S
        try:
            client.connect(
                self._config.host, self._config.port, self._config.keepalive_s, clean_start=True, properties=properties
            )
        except OSError as error:
            self._failed(f"{self._config.host}:{self._config.port}: {reason_of(error)}")
            return
        sock: Any = client.socket()
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _failed(self, reason: str) -> None:
        self._last_failure = reason
        self._drop_client()
        # Full jitter on the upper half, so that ten thousand agents do not come back in the same second.
        self._next_attempt_s = time.monotonic() + self._back_off_s * self._jitter.uniform(0.5, 1.0)
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)

    def _drop_client(self) -> None:
        client, self._client = self._client, None
        self._unsent.clear()
        self.connected = False
        if client is not None:
            client.on_disconnect = None
            sock: Any = client.socket()
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.close()

    def _wait(self, timeout_s: float, max_messages: int) -> bool:
        """Wait for the socket or a wake-up, then read and write what can be. True if woken."""
        client = self._client
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        sock: Any = client.socket() if client is not None else None
        if client is not None and sock is not None:
            self.flush()
            sock = client.socket()
        if client is not None and sock is not None:
            poller.register(sock.fileno(), select.POLLIN | (select.POLLOUT if self._wants_write(client) else 0))
            if self._tls is not None and sock.pending():
                timeout_s = 0.0
            # At least once a second, so that keep-alive and time-outs are looked at.
            timeout_s = min(timeout_s, 1.0)
        events = dict(poller.poll(timeout_s * 1000))
        woken = self._wake_read in events
        if woken:
            os.read(self._wake_read, 4_096)
        if client is not None and sock is not None:
            readable = events.get(sock.fileno(), 0) if sock.fileno() >= 0 else 0
            if readable & ~select.POLLOUT or (self._tls is not None and sock.pending()):
                self._read(client, sock, max_messages)
            if client.socket() is None:
                self._failed(self._last_failure or "connection lost")
            else:
                self.flush()
        return woken

    def _may_queue(self, client: paho.Client) -> bool:
        """True if nothing of paho's is waiting, so that own bytes put in now keep their place."""
        if not client.want_write():
            return True
        self.flush()
        return not client.want_write()

    def _wants_write(self, client: paho.Client) -> bool:
        return bool(self._unsent) or client.want_write()

    def _send_own(self, client: paho.Client) -> bool:
        """Send own bytes as far as the socket takes them; True if none are left."""
        sock: Any = client.socket()
        while self._unsent and sock is not None:
            try:
                sent = sock.send(self._unsent)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return False
            except OSError:
                # The connection is gone; reading from it says so, and why.
                self._unsent.clear()
                break
            del self._unsent[:sent]
        return not self._unsent

    def _read(self, client: paho.Client, sock: Any, max_messages: int) -> None:
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLIN)
        while client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS and client.socket() is not None:
            if len(self._messages) >= max_messages:
                return
            if not poller.poll(0) and not (self._tls is not None and sock.pending()):
                return

    def _writable(self, timeout_s: float) -> bool:
        sock: Any = self._client.socket() if self._client is not None else None
        return sock is not None and bool(select.select([], [sock], [], timeout_s)[1])

    def _on_connect(self, client: paho.Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._last_failure = f"the MQTT server refused the connection: {reason}"
            return
        if self._subscriptions:
            client.subscribe([(topic, SubscribeOptions(qos=qos)) for topic, qos in self._subscriptions])
        self.connected = True
        self.connections += 1
        self._back_off_s = FIRST_BACK_OFF_S

    def _on_disconnect(self, _client: paho.Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if self.connected:
            self._last_failure = f"connection lost: {reason}"
        self.connected = False

    def _on_message(self, _client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        self._messages.append(
            Incoming(message.topic, bytes(message.payload), message.retain, message.qos, message.mid, self.connections)
        )


def publish_packet(topic: str, payload: bytes, retain: bool) -> bytes:
    """An MQTT 5 PUBLISH packet at QoS 0 without properties (OASIS MQTT 5.0, section 3.3)."""
    name = topic.encode()
    remaining = 2 + len(name) + 1 + len(payload)
    head = bytearray((_PUBLISH_QOS_0 | (_RETAIN if retain else 0),))
    # Section 1.5.5: seven bits a byte, the lowest first, the high bit says that more follow.
    while remaining >= 0x80:
        head.append(remaining & 0x7F | 0x80)
        remaining >>= 7
    head.append(remaining)
    return b"".join((head, len(name).to_bytes(2, "big"), name, b"\0", payload))


def _leave_writing_to_the_loop(_client: paho.Client, _userdata: Any, _socket: Any) -> None:
    """Called by paho when it has something to write; the loop looks at `want_write` itself."""


def check_files(config: MqttConfig) -> None:
    """Read the files that `config` names, as a link will. Raises KeyFileError for one that cannot be used."""
    if config.ca_file is not None:
        _tls_context(config)
    if config.password_file is not None:
        _password(config.password_file)


def _password(path: Path) -> str:
    try:
        return read_file(path, _MAX_PASSWORD_BYTES).decode().rstrip("\n")
    except OSError as error:
        raise KeyFileError(str(path), f"{error.strerror}; give a file with the MQTT password") from error
    except UnicodeDecodeError as error:
        raise KeyFileError(str(path), "not text in UTF-8; give a file with the MQTT password") from error


def _tls_context(config: MqttConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(config.ca_file))
    except OSError as error:  # Of which ssl's own are a kind.
        reason = f"no certificates in PEM ({reason_of(error)}); check ca_file"
        raise KeyFileError(str(config.ca_file), reason) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.certificate_file is not None:
        try:
            context.load_cert_chain(str(config.certificate_file), str(config.key_file) if config.key_file else None)
        except OSError as error:
            reason = f"no certificate in PEM with its key ({reason_of(error)}); check certificate_file and key_file"
            raise KeyFileError(str(config.certificate_file), reason) from error
    return context
