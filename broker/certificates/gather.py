"""Finds what a certificate is made of: in the broker's database, and on the ledger whose directory is here.

Places on the ledger come from an index of it (`index`), which takes in what came since it was last asked; then only the
blocks are read that hold something of this consumer's. An engine may run on the ledger meanwhile: everything is of one
moment.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from broker.certificates.build import CertificateError, Found, build_certificate
from broker.certificates.contents import utc_text
from broker.certificates.document import Factor, seal_certificate
from broker.certificates.index import LedgerIndex, Operations, is_about
from broker.certificates.standing import settled_until_s, standing
from broker.certificates.verify import verify_certificate
from broker.ledger.chain import genesis_hash
from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.opening import charter_of
from broker.ledger.operations import AssetId, Close, CorrectDemand, Deliver, decode_operation
from broker.ledger.proofs import ProvenOperation
from broker.ledger.proving import Prover
from broker.ledger.rules.step import clock_of
from broker.ledger.rules.validators import validators_now
from broker.ledger.state import CLOSED, DEMAND, SLICE, ClosedRow, SliceRow, asset_key
from broker.ledger.store import FILE_NAME, LedgerError, Store
from broker.ledger.trust import read_trust, trust_of
from broker.protocol.keys import PrivateKey, public_key_from_cose
from broker.protocol.messages import Genesis, MessageType
from broker.service.pseudonyms import day_key, day_of, interval_key, pseudonym
from broker.service.store import BrokerStore, ConsumerRow


def issue_certificate(
    store: BrokerStore,
    ledger: Path,
    index: Path,
    genesis: Genesis,
    broker: str,
    key: PrivateKey,
    meter: str,
    period: tuple[int, int],
    issued_s: int,
    factors: Iterable[Factor],
    factors_source: str,
) -> bytes:
    """The signed certificate of a consumer for `[from_s, to_s)`, once it is verified as others will do it.

    `ledger` is a directory, `index` the file of its index, which is made where it is not there. Raises
    CertificateError, LedgerError, and ProtocolError where store or ledger are damaged.
    """
    consumer = store.consumer(meter)
    if consumer is None:
        raise CertificateError(f"no consumer {meter} is registered here; `energy-broker list consumers` names them")
    if not (ledger / FILE_NAME).is_file():
        raise LedgerError(ledger, f"holds no {FILE_NAME}; give the ledger's directory")
    try:
        opened = Store.open_read_only(ledger / FILE_NAME)
    except sqlite3.Error as error:
        raise LedgerError(ledger, f"cannot be read: {error}; run `energy-broker ledger verify` on it") from error
    places: LedgerIndex | None = None
    try:
        with opened.snapshot():
            if genesis_hash(Genesis.from_bytes(opened.meta("genesis") or b"")) != genesis_hash(genesis):
                raise LedgerError(ledger, f"is not the ledger {genesis.ledger} of this broker")
            trust = read_trust(json.dumps(trust_of(genesis, validators_now(opened, charter_of(genesis)))))
            places = LedgerIndex(index, genesis_hash(genesis))
            places.take_in(opened)
            found = _Search(store, opened, places, genesis, broker, consumer, period).found()
            certificate = build_certificate(found, issued_s, factors, factors_source)
            raw = seal_certificate(certificate, key, genesis.ledger)
            # What goes out in the broker's name must hold elsewhere, whatever a damaged copy or database made of it.
            faults = standing(verify_certificate(raw, trust), opened).faults
    except (sqlite3.Error, LookupError, ValueError) as error:
        raise LedgerError(
            ledger, f"cannot be read: {error}; run `energy-broker ledger verify` on it, and remove {index}"
        ) from error
    finally:
        if places is not None:
            places.close()
        opened.close()
    if faults:
        raise CertificateError(f"the ledger has it otherwise than this broker's database: {faults[0]}")
    return raw


class _Search:
    """One consumer and period in one store and ledger."""

    def __init__(
        self,
        store: BrokerStore,
        ledger: Store,
        index: LedgerIndex,
        genesis: Genesis,
        broker: str,
        consumer: ConsumerRow,
        period: tuple[int, int],
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._index = index
        self._operations = Operations(ledger)
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
        closed_s = max(self._from_s, clock_of(self._ledger, self._broker))
        if closed_s < self._to_s:
            # Nothing may be disclosed of a time to come, and nothing be said of one that is still open.
            raise CertificateError(
                f"the interval at {utc_text(closed_s)} is not closed yet; ask for a period that ends before it, or"
                " later"
            )
        names = self._pseudonyms()
        self._require_recorded(names)
        deliveries = [proven for start_s, name in names.items() for proven in self._deliveries(start_s, name)]
        if not deliveries:
            raise CertificateError(
                f"the ledger has no demand of {self._consumer.meter} from {utc_text(self._from_s)} to"
                f" {utc_text(self._to_s)}; `energy-broker list history` shows what it was given when"
            )
        wanted = _assets_of(deliveries)
        by_place = sorted(place for device, start_s in wanted for place in self._index.readings(device, start_s))
        last_s = max(_start_of(proven) for proven in deliveries)
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
            settled_until_s(self._ledger, self._broker, wanted),
            list(self._operations.at(self._index.statements())),
            list(self._operations.at(by_place)),
            deliveries,
            self._demands(),
            self._close(last_s, close_leaves),
            close_leaves,
            self._end_of,
            prover.multiproof,
        )

    def _pseudonyms(self) -> dict[int, bytes]:
        """The consumer's pseudonym in each interval of the period."""
        key_id = public_key_from_cose(self._consumer.cose_key).key_id
        names = {}
        day, k_day = -1, b""
        for start_s in self._starts:
            if day_of(start_s) != day:
                day, k_day = day_of(start_s), day_key(self._consumer.secret, day_of(start_s))
            names[start_s] = pseudonym(interval_key(k_day, start_s), key_id)
        return names

    def _require_recorded(self, names: Mapping[int, bytes]) -> None:
        """Every demand must be on the ledger: a certificate without the ones that got nothing would say too much.

        One of a longer window that was given nothing yet comes there at its end, a late one with the next close.
        """
        for start_s, name in names.items():
            demand = self._store.current_demand(start_s, self._consumer.meter)
            if demand is None or not demand.energy_wh or demand.refusal is not None:
                continue
            if self._ledger.get((DEMAND, start_s, name)) is None:
                until = "the next close" if demand.open_until_s is None else utc_text(demand.open_until_s)
                raise CertificateError(
                    f"the demand at {utc_text(start_s)} is still open and has been given nothing yet; ask for a period"
                    f" without it, or again after {until}"
                )

    def _deliveries(self, start_s: int, name: bytes) -> Iterator[ProvenOperation]:
        for proven in self._operations.at(self._index.deliveries(start_s, name)):
            if is_about(proven.operation, name):
                yield proven

    def _demands(self) -> dict[int, list[bytes]]:
        return {
            start_s: [row.raw for row in self._store.messages_of(start_s, self._consumer.meter, MessageType.DEMAND)]
            for start_s in self._starts
        }

    def _close(self, last_s: int, leaves: list[bytes]) -> ProvenOperation:
        """The last close of the interval by this broker: the one over all demands that it accepted."""
        row: ClosedRow | None = self._ledger.get((CLOSED, self._broker, last_s))
        root = root_of(leaves)
        for proven in self._operations.at(self._index.closes(last_s)):
            close = decode_operation(proven.operation)
            assert isinstance(close, Close)
            if row is not None and (close.revision, close.root) == (row.revision, root):
                return proven
        raise CertificateError(
            f"the last close of the interval at {utc_text(last_s)} does not count all its demands; try again after the"
            " next interval"
        )

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


def _start_of(proven: ProvenOperation) -> int:
    operation = decode_operation(proven.operation)
    assert isinstance(operation, Deliver | CorrectDemand)
    return operation.start_s
