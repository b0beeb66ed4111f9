"""Finds what a certificate is made of: in the broker's database, and on the ledger whose directory is here.

The ledger's operations are gone through twice, once for the consumer's deliveries and the statements of registrars,
once for the readings behind those. An engine may run on the ledger meanwhile: everything is of one moment.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from broker.certificates.build import CertificateError, Found, build_certificate
from broker.certificates.contents import utc_text
from broker.certificates.document import Factor, seal_certificate
from broker.certificates.verify import verify_certificate
from broker.ledger.chain import genesis_hash
from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.opening import charter_of
from broker.ledger.operations import (
    AssetId,
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    Issue,
    OperationCode,
    decode_operation,
    operation_code,
)
from broker.ledger.proofs import ProvenOperation
from broker.ledger.proving import Prover
from broker.ledger.rules.step import clock_of, responsible_broker
from broker.ledger.rules.validators import validators_now
from broker.ledger.state import CLOSED, SLICE, ClosedRow, SliceRow, asset_key
from broker.ledger.store import FILE_NAME, LedgerError, Store
from broker.ledger.trust import read_trust, trust_of
from broker.protocol.envelope import parse
from broker.protocol.keys import PrivateKey, public_key_from_cose
from broker.protocol.messages import PSEUDONYM_BYTES, Batch, Block, Genesis, MessageType, Reading
from broker.service.pseudonyms import day_key, day_of, interval_key, pseudonym
from broker.service.store import BrokerStore, ConsumerRow

_STATEMENTS = (OperationCode.REGISTER, OperationCode.ADMIT, OperationCode.ROTATE_KEY)
_READINGS = (OperationCode.ISSUE, OperationCode.CORRECT)
_DELIVERIES = (OperationCode.DELIVER, OperationCode.CORRECT_DEMAND)

_PSEUDONYM_AT = 4
"""Where the pseudonym stands in a Deliver or CorrectDemand: behind [code, [ and the head of a byte string of 16."""


def issue_certificate(
    store: BrokerStore,
    ledger: Path,
    genesis: Genesis,
    broker: str,
    key: PrivateKey,
    meter: str,
    period: tuple[int, int],
    issued_s: int,
    factors: Iterable[Factor],
    factors_source: str,
) -> bytes:
    """The signed certificate of a consumer for `[from_s, to_s)`, once it has been verified by the ledger's own trust.

    Raises CertificateError, LedgerError, and ProtocolError where store or ledger are damaged.
    """
    consumer = store.consumer(meter)
    if consumer is None:
        raise CertificateError(f"no consumer {meter} is registered here; `energy-broker list consumers` names them")
    if not (ledger / FILE_NAME).is_file():
        raise LedgerError(ledger, f"holds no {FILE_NAME}; give the ledger's directory")
    opened = Store.open_read_only(ledger / FILE_NAME)
    try:
        with opened.snapshot():
            if genesis_hash(Genesis.from_bytes(opened.meta("genesis") or b"")) != genesis_hash(genesis):
                raise LedgerError(ledger, f"is not the ledger {genesis.ledger} of this broker")
            trust = read_trust(json.dumps(trust_of(genesis, validators_now(opened, charter_of(genesis)))))
            found = _Search(store, opened, genesis, broker, consumer, period).found()
            certificate = build_certificate(found, issued_s, factors, factors_source)
    except (sqlite3.Error, IndexError, ValueError) as error:
        raise LedgerError(ledger, f"cannot be read: {error}; run `energy-broker ledger verify` on it") from error
    finally:
        opened.close()
    raw = seal_certificate(certificate, key, genesis.ledger)
    # What goes out in the broker's name must hold elsewhere, whatever a damaged copy or database made of it.
    verify_certificate(raw, trust)
    return raw


class _Search:
    """One consumer and period in one store and ledger."""

    def __init__(
        self,
        store: BrokerStore,
        ledger: Store,
        genesis: Genesis,
        broker: str,
        consumer: ConsumerRow,
        period: tuple[int, int],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._genesis = genesis
        self._broker = broker
        self._consumer = consumer
        interval_s = genesis.interval_s
        self._from_s, self._to_s = period
        if self._from_s % interval_s or self._to_s % interval_s or not self._from_s < self._to_s:
            raise CertificateError(f"a period begins and ends at a market interval of {interval_s // 60} minutes")
        self._starts = range(self._from_s, self._to_s, interval_s)

    def found(self) -> Found:
        """All of it, or CertificateError with what is missing."""
        names = self._pseudonyms()
        deliveries, statements, closes = [], [], []
        for proven in self._operations():
            code = operation_code(proven.operation)
            if code in _DELIVERIES:
                name = proven.operation[_PSEUDONYM_AT : _PSEUDONYM_AT + PSEUDONYM_BYTES]
                if name in names:
                    deliveries.append(proven)
            elif code in _STATEMENTS:
                statements.append(proven)
            elif code == OperationCode.CLOSE:
                closes.append(proven)
        if not deliveries:
            raise CertificateError(
                f"the ledger has no demand of {self._consumer.meter} from {utc_text(self._from_s)} to"
                f" {utc_text(self._to_s)}"
            )
        wanted = _assets_of(deliveries)
        readings = [proven for proven in self._operations() if self._is_wanted(proven, wanted)]
        last_s = max(names[proven.operation[_PSEUDONYM_AT : _PSEUDONYM_AT + PSEUDONYM_BYTES]] for proven in deliveries)
        close_leaves = [leaf_hash(name + commitment) for name, commitment, _ in self._store.commitments(last_s)]
        prover = Prover(self._ledger, self._genesis.ledger)
        return Found(
            self._genesis,
            self._broker,
            self._consumer.meter,
            public_key_from_cose(self._consumer.cose_key),
            self._consumer.secret,
            self._from_s,
            self._to_s,
            prover.signed_head,
            self._settled_s(wanted),
            statements,
            readings,
            deliveries,
            self._demands(),
            self._close(closes, last_s, close_leaves),
            close_leaves,
            self._end_of,
            prover.multiproof,
        )

    def _pseudonyms(self) -> dict[bytes, int]:
        """The start of each interval of the period by the consumer's pseudonym in it."""
        key_id = public_key_from_cose(self._consumer.cose_key).key_id
        names = {}
        day, k_day = -1, b""
        for start_s in self._starts:
            if day_of(start_s) != day:
                day, k_day = day_of(start_s), day_key(self._consumer.secret, day_of(start_s))
            names[pseudonym(interval_key(k_day, start_s), key_id)] = start_s
        return names

    def _operations(self) -> Iterator[ProvenOperation]:
        for _, _, raw in self._ledger.blocks():
            block = Block.from_payload(parse(raw).payload)
            batches = [Batch.from_payload(parse(batch).payload).operations for batch in block.batches]
            leaf = block.tree_size - sum(map(len, batches))
            for operations in batches:
                for operation in operations:
                    yield ProvenOperation(leaf, operation)
                    leaf += 1

    def _is_wanted(self, proven: ProvenOperation, wanted: set[tuple[str, int]]) -> bool:
        if operation_code(proven.operation) not in _READINGS:
            return False
        operation = decode_operation(proven.operation)
        assert isinstance(operation, Issue | Correct)
        reading = Reading.from_payload(parse(operation.statement).payload)
        return (reading.meter, reading.start_s) in wanted

    def _demands(self) -> dict[int, list[bytes]]:
        return {
            start_s: [row.raw for row in self._store.messages_of(start_s, self._consumer.meter, MessageType.DEMAND)]
            for start_s in self._starts
        }

    def _close(self, closes: Iterable[ProvenOperation], last_s: int, leaves: list[bytes]) -> ProvenOperation:
        """The last close of the interval by this broker: the one over all demands that it accepted."""
        row: ClosedRow | None = self._ledger.get((CLOSED, self._broker, last_s))
        if row is None:
            raise CertificateError(
                f"the interval at {utc_text(last_s)} is not closed yet; ask for a period that ends before it, or later"
            )
        root = root_of(leaves)
        for proven in closes:
            close = decode_operation(proven.operation)
            assert isinstance(close, Close)
            if (close.start_s, close.revision, close.root) == (last_s, row.revision, root):
                return proven
        raise CertificateError(
            f"the last close of the interval at {utc_text(last_s)} does not count all its demands; try again after the"
            " next interval"
        )

    def _settled_s(self, assets: Iterable[tuple[str, int]]) -> int:
        """The earliest clock by which corrections are judged: of this broker, and of those mandated for the devices."""
        brokers = {responsible_broker(self._ledger, device, start_s) for device, start_s in assets}
        return min(clock_of(self._ledger, broker) for broker in {self._broker, *brokers} if broker is not None)

    def _end_of(self, asset: AssetId, from_wh: int, name: bytes) -> int | None:
        row: SliceRow | None = self._ledger.get((SLICE, *asset_key(asset)[1:], from_wh))
        return row.to_wh if row is not None and row.pseudonym == name else None


def _assets_of(deliveries: Iterable[ProvenOperation]) -> set[tuple[str, int]]:
    """(device, start of the interval) of all that was delivered, whatever its revision."""
    found = set()
    for proven in deliveries:
        operation = decode_operation(proven.operation)
        if isinstance(operation, Deliver):
            found |= {(item.asset.device, item.asset.start_s) for item in operation.slices}
        else:
            assert isinstance(operation, CorrectDemand)
    return found
