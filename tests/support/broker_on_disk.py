"""A ledger and the database of broker b1 as both really are, with one consumer whose certificates can be issued."""

from collections.abc import Iterable
from pathlib import Path

from broker.certificates.document import Certificate
from broker.certificates.gather import issue_certificate
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.operations import Close, Deliver, DeliveredSlice, Operation, Window
from broker.ledger.proving import Prover
from broker.ledger.store import FILE_NAME, Store
from broker.protocol.messages import MessageType
from broker.service.pseudonyms import commitment
from broker.service.store import BrokerStore, ConsumerRow
from support.certificate_world import BROKER, FACTORS, METER, SECRET, demand_of, key_of, name_of
from support.ledger_world import GENESIS, INTERVAL_S, LEDGER, T0, asset, batch, found, issue, key, take


class DiskBroker:
    """A ledger and the database of broker b1, which serves one consumer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger: EmbeddedLedger = found(folder / "ledger")
        self.store = BrokerStore(folder / "broker.db")
        meter = key(METER).public
        self.store.begin()
        self.store.add_consumer(ConsumerRow(METER, meter.cose_key, meter.key_id, SECRET, T0))
        self.store.commit()

    def close(self) -> None:
        self.store.close()
        self.ledger.close()

    def commit(self, *operations: Operation, not_after_s: int = T0 + 86_400, by_key: str | None = None) -> None:
        """A batch of b1's that the ledger takes."""
        raw = batch(*operations, not_after_s=not_after_s, with_key=by_key)
        assert self.ledger.submit(raw) is None
        refused = [result for result in self.ledger.commit().results if result.result.reason is not None]
        assert not refused, refused

    def demand(self, start_s: int, energy_wh: int, revision: int = 0) -> bytes:
        """The meter's demand is accepted. Returns its commitment."""
        raw = demand_of(start_s, energy_wh, revision)
        committed = commitment(key_of(start_s), raw)
        self.store.begin()
        kept = self.store.add_message(
            start_s, METER, MessageType.DEMAND, revision, raw[-32:], raw, energy_wh, name_of(start_s), committed
        )
        self.store.commit()
        assert kept
        return committed

    def deliver(self, start_s: int, energy_wh: int, *slices: tuple[str, int, int], revision: int = 0) -> Deliver:
        """The operation by which the demand of that revision gets these Wh of its own interval."""
        items = tuple(DeliveredSlice(asset(device, start_s), low, high, 0) for device, low, high in slices)
        raw = demand_of(start_s, energy_wh, revision)
        committed = commitment(key_of(start_s), raw)
        end_s = start_s + INTERVAL_S
        return Deliver(name_of(start_s), start_s, end_s, Window.INTERVAL, "north", energy_wh, committed, items)

    def close_of(self, start_s: int, revision: int = 0) -> Close:
        """The close over what the database has."""
        demands = list(self.store.commitments(start_s))
        leaves = [leaf_hash(name + committed) for name, committed, _ in demands]
        demanded_wh = sum(energy_wh for _, _, energy_wh in demands)
        return Close(start_s, start_s + INTERVAL_S, revision, len(leaves), demanded_wh, root_of(leaves))

    def serve_two_intervals(self, wind_wh: int = 400) -> None:
        """Two intervals: 300 Wh from two devices, then 50 Wh for which there was nothing."""
        self.commit(
            issue("solar-1", 900), take("solar-1", 0, 900), issue("wind-1", wind_wh), take("wind-1", 0, wind_wh)
        )
        self.demand(T0, 300)
        self.commit(self.deliver(T0, 300, ("solar-1", 0, 240), ("wind-1", 0, 60)), self.close_of(T0))
        later_s = T0 + INTERVAL_S
        self.demand(later_s, 50)
        self.commit(self.deliver(later_s, 50), self.close_of(later_s))

    def certificate(self, from_s: int = T0, to_s: int = T0 + 2 * INTERVAL_S, meter: str = METER) -> bytes:
        """As the broker issues it now."""
        return issue_certificate(
            self.store,
            self.folder / "ledger",
            self.folder / "index.db",
            GENESIS,
            BROKER,
            key(BROKER),
            meter,
            (from_s, to_s),
            to_s,
            FACTORS,
            "table",
        )

    def hashes(self, leaves: Iterable[int]) -> bytes:
        """What leads from these operations to the head, for a certificate that is put together by hand."""
        store = Store.open_read_only(self.folder / "ledger" / FILE_NAME)
        try:
            return b"".join(Prover(store, LEDGER).multiproof(sorted(leaves)))
        finally:
            store.close()

    @staticmethod
    def leaves_of(certificate: Certificate) -> list[int]:
        """The places of all that is no reading."""
        given = [given.leaf for interval in certificate.intervals for given in interval.deliveries]
        return given + [proven.leaf for proven in certificate.operations]
