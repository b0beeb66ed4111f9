"""Takes back from the ledger what a broker did after the backup that its database was restored from.

The ledger has every batch of this broker, so readings, transfers, deliveries, closes and the consumers' accounts come
back whole. It has no consumer's name and no signed demand. The names are found again, because pseudonyms follow from
the secrets in the database; such a demand is kept without its message, and `Intake` puts that in when the meter sends
it once more, if it is the one that the ledger is committed to. Of a consumer who was registered after the backup there
is no secret: its demands are kept under a made-up name, so that the closes still count them, and are served no more.

What had a receipt and did not reach the ledger is in the meters' journals alone. A close whose demands are not all back
is said as a complaint, interval by interval.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from broker.ledger.merkle import leaf_hash, root_of
from broker.ledger.operations import (
    Admit,
    AssetId,
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    Issue,
    Operation,
    Transfer,
    Void,
)
from broker.market.contracts import History
from broker.market.mix import quotas
from broker.market.statements import Flow
from broker.market.tariff import Tariff
from broker.market.windows import window_span
from broker.protocol.envelope import parse, sealed_id
from broker.protocol.market_time import Interval
from broker.protocol.messages import NO_LINE, Admission, MessageType, Order, Reading
from broker.protocol.sources import Source
from broker.service.batches import BatchDesk
from broker.service.orders_in import transfer_row
from broker.service.outputs import Identity, Outputs
from broker.service.pseudonyms import day_key, day_of, interval_key, pseudonym
from broker.service.registry import Account, Consumer, ContractVersion, Registry
from broker.service.store import (
    BatchKind,
    BatchRow,
    BrokerStore,
    DeliveryRow,
    IntervalState,
    MessageRow,
    Standing,
    encode_quotas,
)

NO_MESSAGE: Final = b""
"""Stands for the bytes and the id of a demand that is known from the ledger alone."""

_LOST: Final = "its consumer was registered after the backup that this database was restored from"


@dataclass(slots=True)
class Recovered:
    """How much came back."""

    batches: int = 0
    closes: int = 0
    demands: int = 0
    """Without their messages, those of `strangers` among them."""
    strangers: int = 0
    """Demands of consumers whom this database does not know."""


class Recovery:
    """Notes own batches that the store has forgotten, in the order of the ledger."""

    def __init__(
        self,
        identity: Identity,
        store: BrokerStore,
        registry: Registry,
        desk: BatchDesk,
        outputs: Outputs,
        tariff: Tariff,
    ) -> None:
        self._identity = identity
        self._store = store
        self._registry = registry
        self._desk = desk
        self._outputs = outputs
        self._tariff = tariff
        self._sources: dict[str, Source] = {}
        """Of devices that were admitted since the backup."""
        self._aliases: dict[bytes, str] = {}
        """Pseudonym to meter, in the interval that begins at `_aliases_of`."""
        self._aliases_of: int | None = None
        self.recovered = Recovered()

    def note_admissions(self, operations: Iterable[Operation]) -> None:
        """Remember the sources of devices, whoever put their admission on the ledger."""
        for operation in operations:
            if isinstance(operation, Admit):
                admission = Admission.from_payload(parse(operation.statement).payload)
                self._sources[admission.device] = admission.source

    def take_back(self, batch_id: bytes, height: int, operations: Sequence[Operation]) -> BatchRow:
        """Note what a forgotten batch did; corrections of demands are left to `DemandCorrections`. Returns its row."""
        kind, start_s = _kind_of(operations)
        batch = self._desk.take_back(batch_id, kind, start_s, height)
        self.recovered.batches += 1
        self.note_admissions(operations)
        for operation in operations:
            match operation:
                case Issue() | Correct():
                    self._reading(operation.statement)
                case Transfer():
                    self._transfer(operation)
                case Deliver():
                    self._delivery(operation, batch)
                case CorrectDemand():
                    self._correction(operation)
                case Close():
                    self._close(operation)
        return batch

    # Generation and trade

    def _reading(self, raw: bytes) -> None:
        reading = Reading.from_payload(parse(raw).payload)
        if self._registry.device(reading.meter) is not None:
            message_id = sealed_id(raw, self._identity.ledger, reading.meter)
            place = reading.start_s, reading.meter, MessageType.READING, reading.revision
            self._store.add_message(*place, message_id, raw, reading.energy_wh, None, None)

    def _transfer(self, transfer: Transfer) -> None:
        if transfer.order is not None:
            order = Order.from_payload(parse(transfer.order).payload)
            row = transfer_row(Flow.SOLD, transfer, order.source, order.order_id)
        else:
            row = transfer_row(Flow.PROVIDED, transfer, self._source_of(transfer.asset, transfer.from_wh), b"")
        self._store.add_transfers([row])

    def _source_of(self, asset: AssetId, at_wh: int) -> Source:
        device = self._registry.device(asset.device)
        if device is not None:
            return device.source
        acquired = self._store.acquisitions(asset.device, asset.start_s, asset.revision, at_wh, at_wh + 1)
        # What is not ours came by a transfer, or was admitted since: whatever else there was is in the backup.
        return Source(acquired[0].source) if acquired else self._sources[asset.device]

    # Demands

    def _delivery(self, deliver: Deliver, batch: BatchRow) -> None:
        row, known = self._demand_of(deliver.start_s, deliver.pseudonym, deliver.demanded_wh, deliver.commitment)
        energy_wh = sum(item.to_wh - item.from_wh for item in deliver.slices)
        state, revision = self._store.interval_state(deliver.start_s)
        if state is IntervalState.OPEN:
            self._store.set_interval(deliver.start_s, IntervalState.CLEARED, revision)
        stored_quotas = None if row.quotas is None else encode_quotas(row.quotas)
        if known is not None:
            consumer, version = known
            account = self._registry.account(consumer, version, deliver.start_s)
            if row.quotas is None:
                # Decided as it was then: by what had been delivered before.
                shares_ppm = version.contract.shares_ppm
                stored_quotas = encode_quotas(quotas(shares_ppm, account.history, row.energy_wh))
            self._keep_deliveries(row, deliver, batch)
            self._keep_account(row.meter, account, deliver)
        self._store.set_delivered([(row.delivered_wh + energy_wh, stored_quotas, row.start_s, row.meter, row.revision)])

    def _keep_deliveries(self, row: MessageRow, deliver: Deliver, batch: BatchRow) -> None:
        sequence = max([item.sequence for item in self._store.deliveries(row.start_s, row.meter)], default=-1) + 1
        kept = []
        for item in deliver.slices:
            asset = item.asset
            own = self._registry.device(asset.device) is not None
            for from_wh, to_wh, price, party in self._bought(asset, item.from_wh, item.to_wh):
                kept.append(
                    DeliveryRow(
                        *(row.start_s, row.meter, sequence, item.line, int(self._source_of(asset, from_wh))),
                        *(asset.device, asset.start_s, asset.revision, from_wh, to_wh),
                        *(self._tariff.for_consumers(price), None if own else party, batch.number),
                    )
                )
                sequence += 1
        self._store.add_deliveries(kept)

    def _bought(self, asset: AssetId, from_wh: int, to_wh: int) -> list[tuple[int, int, int, str | None]]:
        """The range cut where prices change, as (from, to, price paid, from whom)."""
        acquired = self._store.acquisitions(asset.device, asset.start_s, asset.revision, from_wh, to_wh)
        borders = {from_wh, to_wh}
        for row in acquired:
            borders.update([border for border in (row.from_wh, row.to_wh) if from_wh < border < to_wh])
        parts: list[tuple[int, int, int, str | None]] = []
        for low, high in pairwise(sorted(borders)):
            bought = next((row for row in acquired if row.from_wh <= low < row.to_wh), None)
            parts.append((low, high, 0, None) if bought is None else (low, high, bought.price, bought.party))
        return parts

    def _keep_account(self, meter: str, account: Account, deliver: Deliver) -> None:
        lines = len(account.history.by_line)
        history: History = account.history.plus(
            # A line beyond the contract is one of a version that was lost with the database.
            *[(item.line if item.line < lines else NO_LINE, item.to_wh - item.from_wh) for item in deliver.slices]
        )
        self._registry.keep_accounts([(meter, account._replace(history=history))])

    def _demand_of(
        self, start_s: int, alias: bytes, energy_wh: int, commitment: bytes
    ) -> tuple[MessageRow, tuple[Consumer, ContractVersion] | None]:
        """The demand that counts, made if it is not there; with it the consumer, None for a stranger."""
        meter = self._meter_of(start_s, alias)
        consumer = None if meter is None else self._registry.consumer(meter)
        version = None if consumer is None else consumer.contract_at(start_s)
        known = None if consumer is None or version is None else (consumer, version)
        name = f"lost-{alias.hex()}" if known is None else known[0].meter
        row = self._store.current_demand(start_s, name)
        if row is None or row.commitment != commitment:
            row = self._keep_demand(row, start_s, name, energy_wh, alias, commitment)
            if known is None:
                self._store.refuse_message(start_s, name, MessageType.DEMAND, row.revision, _LOST)
                self.recovered.strangers += 1
        return row, known

    def _keep_demand(
        self, before: MessageRow | None, start_s: int, meter: str, energy_wh: int, alias: bytes, commitment: bytes
    ) -> MessageRow:
        """A demand without its message, in place of an earlier revision that the ledger was not told of."""
        revision = 0
        if before is not None:
            self._store.set_standing(start_s, meter, before.revision, Standing.SUPERSEDED, before.ledger_revision)
            revision = before.revision + 1
        place = start_s, meter, MessageType.DEMAND, revision
        self._store.add_message(*place, NO_MESSAGE, NO_MESSAGE, energy_wh, alias, commitment)
        self._store.set_standing(start_s, meter, revision, Standing.CURRENT, 0)
        self.recovered.demands += 1
        row = self._store.current_demand(start_s, meter)
        assert row is not None
        return row

    def _meter_of(self, start_s: int, alias: bytes) -> str | None:
        """Whose pseudonym it is, None if nobody's who is known here."""
        if self._aliases_of != start_s:
            self._aliases, self._aliases_of = {}, start_s
            # Past the registry: it would read everybody's contracts for the few that are needed.
            for row in self._store.consumers():
                k_interval = interval_key(day_key(row.secret, day_of(start_s)), start_s)
                self._aliases[pseudonym(k_interval, row.key_id)] = row.meter
        return self._aliases.get(alias)

    def _correction(self, operation: CorrectDemand) -> None:
        """Have the revision there that `DemandCorrections` puts into effect."""
        meter = self._meter_of(operation.start_s, operation.pseudonym)
        old = None if meter is None else self._store.current_demand(operation.start_s, meter)
        if meter is None or old is None:
            return
        rows = self._store.messages_of(operation.start_s, meter, MessageType.DEMAND)
        if all(row.commitment != operation.commitment for row in rows):
            place = operation.start_s, meter, MessageType.DEMAND, max(row.revision for row in rows) + 1
            stands_as = operation.demanded_wh, operation.pseudonym, operation.commitment
            self._store.add_message(*place, NO_MESSAGE, NO_MESSAGE, *stands_as)
            self.recovered.demands += 1

    # Closes

    def _close(self, close: Close) -> None:
        self.recovered.closes += 1
        self._store.set_interval(close.start_s, IntervalState.CLOSED, close.revision + 1)
        if close.revision == 0:
            self._end_windows(close.end_s)
            self._leave_open(Interval(close.start_s, close.end_s))
        leaves, demanded_wh = [], 0
        for alias, commitment, energy_wh in self._store.commitments(close.start_s):
            leaves.append(leaf_hash(alias + commitment))
            demanded_wh += energy_wh
        if root_of(leaves) != close.root:
            self._outputs.complain(
                f"the close of the interval at {close.start_s} is over {close.demands} demands of"
                f" {close.demanded_wh} Wh, of which {len(leaves)} of {demanded_wh} Wh are known again; demands of 0 Wh"
                " and open ones come back when their meters send them again"
            )

    def _end_windows(self, closed_to_s: int) -> None:
        ended = [row for row in self._store.open_demands() if (row.open_until_s or 0) <= closed_to_s]
        self._store.set_open_until([(None, row.start_s, row.meter, row.revision) for row in ended])

    def _leave_open(self, interval: Interval) -> None:
        rows = []
        for row in self._store.short_demands(interval.start_s):
            consumer = self._registry.consumer(row.meter)
            version = None if consumer is None else consumer.contract_at(row.start_s)
            if version is not None:
                span = window_span(version.contract.window, interval)
                if span.end_s > interval.end_s:
                    rows.append((span.end_s, row.start_s, row.meter, row.revision))
        self._store.set_open_until(rows)


def _kind_of(operations: Sequence[Operation]) -> tuple[BatchKind, int]:
    """What a batch was made for, and the interval it is of: this program puts operations of one purpose in a batch."""
    for operation in operations:
        match operation:
            case Issue() | Correct():
                looked_into = not any(isinstance(other, Transfer) for other in operations)
                start_s = Reading.from_payload(parse(operation.statement).payload).start_s
                return (BatchKind.CORRECT if looked_into else BatchKind.PROVIDE), start_s
            case Transfer():
                kind = BatchKind.TAKE_OVER if operation.order is None else BatchKind.SUPPLY
                return kind, operation.asset.start_s
            case Deliver():
                corrected = any(isinstance(other, CorrectDemand) for other in operations)
                return (BatchKind.CORRECT_DEMAND if corrected else BatchKind.DELIVER), operation.start_s
            case CorrectDemand():
                return BatchKind.CORRECT_DEMAND, operation.start_s
            case Close():
                return BatchKind.CLOSE, operation.start_s
    # A close may have voids beside it; alone they are of orders.
    if isinstance(operations[0], Void):
        return BatchKind.VOID, 0
    return BatchKind.STATEMENTS, 0
