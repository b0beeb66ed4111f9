"""Consumers ask for certificates over MQTT; a process beside the broker makes them, one at a time.

Making one takes in what has come to the ledger since the last one, which may take longer than a gate lasts, so the
event loop only takes requests, looks whether one is done, and sends a few parts a turn. Nothing of this is stored:
whoever gets no answer asks again.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Final, NamedTuple

from broker.certificates.build import CertificateError
from broker.certificates.issuing import NoLedger, issue, ledger_of
from broker.config import BrokerConfig
from broker.ledger.store import LedgerError
from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.errors import BadSignature, KeyFileError, MalformedMessage, ProtocolError
from broker.protocol.keys import public_key_from_cose
from broker.protocol.limits import CERTIFICATE_PART_BYTES, MAX_CERTIFICATE_PARTS, MAX_REASON_CHARACTERS
from broker.protocol.messages import CertificatePart, CertificateRequest
from broker.protocol.topics import Topics
from broker.service.outputs import Identity, Publication
from broker.service.store import BrokerStore, StoreError
from firmware_config.loader import ConfigError

MAX_WAITING: Final = 64
"""Requests that wait; a consumer beyond it is told to ask later."""

PARTS_OF_A_TURN: Final = 8
"""Two megabytes, so that a long certificate does not hold up receipts."""

NICENESS: Final = 10


class Made(NamedTuple):
    """A certificate, or the reason why there is none."""

    content: bytes
    reason: str | None


Make = Callable[[CertificateRequest], "Future[Made]"]


class CertificateDesk:
    """Requests in, publications out. `make` begins to make a certificate, elsewhere."""

    def __init__(self, identity: Identity, topics: Topics, store: BrokerStore, make: Make) -> None:
        self._identity = identity
        self._topics = topics
        self._store = store
        self._make = make
        self._waiting: deque[CertificateRequest] = deque()
        self._under_way: tuple[CertificateRequest, Future[Made]] | None = None
        self._unsent: deque[Publication] = deque()

    @property
    def has_more(self) -> bool:
        """True if `publications` has something to give at once."""
        return bool(self._unsent) or (self._under_way is not None and self._under_way[1].done())

    def take(self, meter: str, raw: bytes) -> None:
        """A message on the meter's topic. Raises ProtocolError for what is no request of that consumer."""
        opened = open_envelope(raw, self._identity.ledger, self._signer)
        request = opened.message
        if not isinstance(request, CertificateRequest):
            raise MalformedMessage("certificate", f"a certificate-request, got a {request.TYPE.name.lower()}")
        if opened.sender != meter or request.meter != meter:
            raise BadSignature(meter, "certificate-request")
        if any(request == other for other in self._all()):
            return
        # One consumer's haste is not to keep the others waiting.
        if len(self._waiting) >= MAX_WAITING or any(request.meter == other.meter for other in self._waiting):
            self._refuse(request, "other certificates are being made; ask again in some minutes")
        else:
            self._waiting.append(request)

    def publications(self) -> list[Publication]:
        """What there is to send now; begins the next certificate when one is done."""
        if self._under_way is not None and self._under_way[1].done():
            request, future = self._under_way
            self._under_way = None
            self._answer(request, future)
        if self._under_way is None and self._waiting:
            request = self._waiting.popleft()
            self._under_way = request, self._make(request)
        return [self._unsent.popleft() for _ in range(min(PARTS_OF_A_TURN, len(self._unsent)))]

    def _all(self) -> list[CertificateRequest]:
        return [*self._waiting, *([self._under_way[0]] if self._under_way is not None else [])]

    def _signer(self, key_id: bytes) -> Signer | None:
        row = self._store.consumer_by_key(key_id)
        return None if row is None else Signer(row.meter, public_key_from_cose(row.cose_key))

    def _answer(self, request: CertificateRequest, future: "Future[Made]") -> None:
        try:
            made = future.result()
        except BrokenProcessPool:
            made = Made(b"", "the process that makes certificates has ended; ask again")
        if made.reason is not None:
            self._refuse(request, made.reason)
            return
        parts = -(-len(made.content) // CERTIFICATE_PART_BYTES)
        if parts > MAX_CERTIFICATE_PARTS:
            self._refuse(request, f"it has {len(made.content)} bytes, too many to send; ask for shorter periods")
            return
        for part in range(parts):
            content = made.content[part * CERTIFICATE_PART_BYTES : (part + 1) * CERTIFICATE_PART_BYTES]
            self._send(CertificatePart(request.meter, request.request_id, part, parts, content))

    def _refuse(self, request: CertificateRequest, reason: str) -> None:
        short = reason[:MAX_REASON_CHARACTERS]
        self._send(CertificatePart(request.meter, request.request_id, 0, 0, b"", short))

    def _send(self, part: CertificatePart) -> None:
        topic = self._topics.meter(self._identity.name, part.meter, "certificate-part")
        self._unsent.append(Publication(topic, self._identity.seal(part)))


class CertificateProcess:
    """Makes certificates in a process of its own, which ends with each."""

    def __init__(self, config: BrokerConfig, on_done: Callable[[], None]) -> None:
        self._config = config
        self._on_done = on_done
        self._pool: Executor | None = None

    def make(self, request: CertificateRequest) -> "Future[Made]":
        """Begin one; `on_done` is called, from another thread, when it is made."""
        # A fresh interpreter: the broker's threads and open databases must not be copied into it.
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1,
                multiprocessing.get_context("spawn"),
                initializer=os.nice,
                initargs=(NICENESS,),
                max_tasks_per_child=1,
            )
        try:
            future = self._pool.submit(_make, self._config, request)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = None
            return self.make(request)
        future.add_done_callback(lambda _: self._on_done())
        return future

    def close(self) -> None:
        """End the process; what it was making is given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _make(config: BrokerConfig, request: CertificateRequest) -> Made:
    try:
        return Made(issue(config, ledger_of(config), request.meter, (request.from_s, request.to_s)), None)
    except CertificateError as error:
        return Made(b"", str(error))
    except NoLedger:
        return Made(b"", f"{config.broker.name} has no copy of the ledger to issue certificates from; ask its operator")
    except (LedgerError, StoreError, KeyFileError, ProtocolError, ConfigError, OSError) as error:
        return Made(b"", f"{config.broker.name} cannot issue certificates at present: {type(error).__name__}")
