"""Asks the broker for a consumer's certificate and writes what comes, part by part: `meter-agent certificate`.

The answer is checked to be the broker's. Whether the certificate is true says `energy-broker certificate verify`, on a
machine of your choice; a gateway does not carry what that needs.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker.protocol.envelope import Signer, open_envelope, seal
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import PrivateKey
from broker.protocol.limits import CERTIFICATE_PART_BYTES
from broker.protocol.messages import REQUEST_ID_BYTES, CertificatePart, CertificateRequest
from broker.protocol.mqtt_link import MqttLink
from broker.protocol.topics import Topics
from meter_agent.config import AgentConfig

ASK_AGAIN_S: Final = 20.0
"""After so long without a part the request is sent again; making a certificate may take minutes."""


class NoCertificate(Exception):
    """None came. The text says why, and what to do."""


class Collected:
    """The parts of one certificate, as they come in; in any order, some of them twice."""

    def __init__(self, request: CertificateRequest, broker: Signer, ledger: str, path: Path) -> None:
        self._request = request
        self._broker = broker
        self._ledger = ledger
        self._path = path
        self._have: set[int] = set()

    def take(self, raw: bytes) -> bool:
        """Write a part to its place in the file. True when all are there. Raises ProtocolError, NoCertificate, OSError.

        A message that is no part of the certificate asked for is passed over.
        """
        key_id = self._broker.key.key_id
        part = open_envelope(raw, self._ledger, lambda key: self._broker if key == key_id else None).message
        if not isinstance(part, CertificatePart):
            return False
        if (part.meter, part.request_id) != (self._request.meter, self._request.request_id):
            return False
        if part.reason is not None or part.part >= part.parts:
            raise NoCertificate(f"{self._broker.name} issues no certificate: {part.reason or 'it gives no reason'}")
        with self._path.open("r+b") as file:
            file.seek(part.part * CERTIFICATE_PART_BYTES)
            file.write(part.content)
        self._have.add(part.part)
        return len(self._have) == part.parts


def fetch(config: AgentConfig, meter: str, key: PrivateKey, period: tuple[int, int], out: Path, limit_s: float) -> None:
    """Ask for the certificate of `[from_s, to_s)` and write it to `out`, whole or not at all.

    Raises NoCertificate when there is none or it has not come within `limit_s`, and OSError.
    """
    settings, topics = config.agent, Topics(config.mqtt.root)
    request = CertificateRequest(meter, os.urandom(REQUEST_ID_BYTES), *period)
    broker = Signer(settings.broker.name, settings.broker.public_key())
    beside = out.parent / f"{out.name}.part"
    beside.write_bytes(b"")
    answers = topics.meter(broker.name, meter, "certificate-part")
    link = MqttLink(config.mqtt, f"certificate-{request.request_id.hex()}", [(answers, 1)])
    try:
        raw = seal(request, key, settings.ledger, meter)
        asked_on = topics.meter(broker.name, meter, "certificate")
        _collect(
            link, Collected(request, broker, settings.ledger, beside), lambda: link.publish(asked_on, raw), limit_s
        )
        beside.replace(out)
    finally:
        link.close()
        beside.unlink(missing_ok=True)


def _collect(link: MqttLink, collected: Collected, ask: Callable[[], None], limit_s: float) -> None:
    """Ask, at each connection and when nothing has come for a while, until all parts are there."""
    give_up_s = time.monotonic() + limit_s
    ask_at_s, connections = 0.0, 0
    while (now_s := time.monotonic()) < give_up_s:
        if link.connected and (link.connections != connections or now_s >= ask_at_s):
            connections, ask_at_s = link.connections, now_s + ASK_AGAIN_S
            ask()
        for message in link.poll(min(1.0, max(0.0, give_up_s - now_s))):
            try:
                complete = collected.take(message.payload)
            except ProtocolError:
                complete = False  # Anybody may publish; what the broker did not sign is not from it.
            link.acknowledge(message)
            ask_at_s = time.monotonic() + ASK_AGAIN_S
            if complete:
                return
    failure = f" ({link.last_failure})" if not link.connected else ""
    raise NoCertificate(
        f"no certificate has come within {limit_s:g} s{failure}; ask again, or allow more with --timeout"
    )
