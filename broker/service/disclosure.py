"""Opening one day of one consumer to an auditor: what the broker gives out, and how anyone checks it by the ledger.

A disclosure is a JSON file with the day key and the demands that the meter signed for that day. Pseudonyms and the
salts of commitments follow from the day key (`pseudonyms`), so they are made again here instead of believed. The key of
one day says nothing about another.

The check answers: did this meter sign these demands, do they stand on the ledger under its pseudonyms with these very
commitments and amounts, what was delivered for them, and does the ledger have a demand of this meter that was left out?
It cannot find demands that neither the file nor the ledger has; receipts in the consumer's hands can.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from broker.ledger.chain import genesis_hash
from broker.ledger.inspect import opened
from broker.ledger.state import (
    CLOSED,
    DEMAND,
    DEVICE,
    SLICE,
    DemandRow,
    DeviceRow,
    SliceRow,
    decode_key,
    decode_row,
    scan_bounds,
)
from broker.ledger.store import Store
from broker.protocol.codec import is_name
from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.messages import Demand, Genesis, MessageType
from broker.protocol.sources import Source
from broker.service.pseudonyms import DAY_KEY_BYTES, DAY_S, commitment, day_key, day_of, interval_key, pseudonym
from broker.service.registration import RegistrationError
from broker.service.store import BrokerStore

VERSION: Final = 1
MAX_FILE_CHARACTERS: Final = 16 * 2**20
"""96 demands of a kilobyte each, with corrections, fit many times."""


class DisclosureError(Exception):
    """A file that is no disclosure. The text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What a broker tells an auditor of one meter and UTC day. `demands` are the messages as the meter sealed them."""

    ledger: str
    genesis_hash: bytes
    broker: str
    meter: str
    meter_key: PublicKey
    day: int
    day_key: bytes
    demands: tuple[bytes, ...]

    def to_json(self) -> str:
        """The disclosure as it is given out; bytes are in hex."""
        return json.dumps(
            {
                "disclosure": VERSION,
                "ledger": self.ledger,
                "genesis_sha256": self.genesis_hash.hex(),
                "broker": self.broker,
                "meter": self.meter,
                "meter_key": self.meter_key.cose_key.hex(),
                "day": day_text(self.day),
                "day_key": self.day_key.hex(),
                "demands": [raw.hex() for raw in self.demands],
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str) -> "Disclosure":
        """Raises DisclosureError naming the entry that is wrong."""
        if len(text) > MAX_FILE_CHARACTERS:
            raise DisclosureError(f"it is longer than {MAX_FILE_CHARACTERS} characters, which no disclosure is")
        try:
            value: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise DisclosureError(f"it is no JSON: {error}") from error
        except (ValueError, RecursionError) as error:
            # A number of thousands of digits, or thousands of brackets within each other.
            raise DisclosureError("it is no JSON of a disclosure") from error
        if type(value) is not dict or value.get("disclosure") != VERSION:
            raise DisclosureError("it is no disclosure, or one of another version of this program")
        demands = value.get("demands")
        if type(demands) is not list:
            raise DisclosureError("demands: expected a list of sealed demands in hex")
        k_day = _bytes(value, "day_key")
        if len(k_day) != DAY_KEY_BYTES:
            raise DisclosureError(f"day_key: expected {DAY_KEY_BYTES} bytes in hex")
        try:
            key = public_key_from_cose(_bytes(value, "meter_key"))
        except MalformedMessage as error:
            raise DisclosureError(f"meter_key: {error}") from error
        return cls(
            _name(value, "ledger"),
            _bytes(value, "genesis_sha256"),
            _name(value, "broker"),
            _name(value, "meter"),
            key,
            day_number(value.get("day")),
            k_day,
            tuple([_from_hex(raw, "demands") for raw in demands]),
        )


def day_number(text: Any) -> int:
    """The UTC day that `YYYY-MM-DD` names, counted from 1970-01-01. Raises DisclosureError."""
    try:
        moment = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except (ValueError, TypeError) as error:
        raise DisclosureError(f"{text!r} is no UTC day, for example 2026-01-31") from error
    if moment.year < 1970:
        raise DisclosureError(f"{text} is before 1970, and so before any demand")
    return day_of(int(moment.timestamp()))


def day_text(day: int) -> str:
    """The UTC day as `YYYY-MM-DD`."""
    return datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m-%d")


def _name(value: dict[str, Any], entry: str) -> str:
    text = value.get(entry)
    if type(text) is not str or not is_name(text):
        raise DisclosureError(f"{entry}: expected a name")
    return text


def _bytes(value: dict[str, Any], entry: str) -> bytes:
    return _from_hex(value.get(entry), entry)


def _from_hex(text: Any, entry: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (ValueError, TypeError) as error:
        raise DisclosureError(f"{entry}: expected hex") from error


# --- Giving out


def disclose(store: BrokerStore, genesis: Genesis, broker: str, meter: str, day: int) -> Disclosure:
    """All that the broker has of a meter's demands on a UTC day. Raises RegistrationError if it does not serve it."""
    consumer = store.consumer(meter)
    if consumer is None:
        raise RegistrationError(f"no consumer {meter} is registered here; `energy-broker list consumers` names them")
    demands = [
        row.raw
        for start_s in range(day * DAY_S, (day + 1) * DAY_S, genesis.interval_s)
        for row in store.messages_of(start_s, meter, MessageType.DEMAND)
        # Known from the ledger alone after a recovery, until the meter sends it again: the check says what is missing.
        if row.raw
    ]
    return Disclosure(
        genesis.ledger,
        genesis_hash(genesis),
        broker,
        meter,
        public_key_from_cose(consumer.cose_key),
        day,
        day_key(consumer.secret, day),
        tuple(demands),
    )


# --- Checking


@dataclass(frozen=True, slots=True)
class DisclosedDelivery:
    """Wh of one source that a demand got, by contract line and device."""

    line: int
    source: Source
    device: str
    energy_wh: int


@dataclass(frozen=True, slots=True)
class DisclosedInterval:
    """One interval of the day: what the meter asked for, and what the ledger has of it (None: nothing)."""

    start_s: int
    pseudonym: bytes
    demanded_wh: int
    delivered_wh: int | None
    deliveries: tuple[DisclosedDelivery, ...]


@dataclass(frozen=True, slots=True)
class DisclosureReport:
    """The opened day, and what does not fit; `faults` empty means that all of it was found on the ledger."""

    meter: str
    day: int
    intervals: tuple[DisclosedInterval, ...]
    faults: tuple[str, ...]


def check_disclosure(disclosure: Disclosure, path: Path) -> DisclosureReport:
    """Hold a disclosure against the ledger in directory `path`. Raises LedgerError if that cannot be read."""
    with opened(path) as store:
        return _Check(disclosure, store).report()


class _Check:
    """One check; faults gather while it goes."""

    def __init__(self, disclosure: Disclosure, store: Store) -> None:
        self._disclosure = disclosure
        self._store = store
        self._genesis = Genesis.from_bytes(store.meta("genesis") or b"")
        self._faults: list[str] = []

    def report(self) -> DisclosureReport:
        """Hold all of it against the ledger, interval by interval."""
        disclosure = self._disclosure
        if (disclosure.ledger, disclosure.genesis_hash) != (self._genesis.ledger, genesis_hash(self._genesis)):
            fault = f"it is about ledger {disclosure.ledger}, founded on another genesis than this copy"
            return DisclosureReport(disclosure.meter, disclosure.day, (), (fault,))
        demands = self._demands()
        rows: dict[int, tuple[bytes, DemandRow | None]] = {}
        for start_s in range(disclosure.day * DAY_S, (disclosure.day + 1) * DAY_S, self._genesis.interval_s):
            k_interval = interval_key(disclosure.day_key, start_s)
            alias = pseudonym(k_interval, disclosure.meter_key.key_id)
            row: DemandRow | None = self._store.get((DEMAND, start_s, alias))
            rows[start_s] = alias, row
            self._compare(start_s, k_interval, demands[start_s], row)
        deliveries = self._deliveries(rows)
        intervals = []
        for start_s, (alias, row) in rows.items():
            if row is None and not demands[start_s]:
                continue
            newest = max(demands[start_s], key=lambda item: item[0].revision, default=None)
            demanded_wh = newest[0].energy_wh if newest is not None else row.demanded_wh if row is not None else 0
            delivered_wh = None if row is None else row.delivered_wh
            intervals.append(DisclosedInterval(start_s, alias, demanded_wh, delivered_wh, tuple(deliveries[start_s])))
        return DisclosureReport(disclosure.meter, disclosure.day, tuple(intervals), tuple(self._faults))

    def _demands(self) -> dict[int, list[tuple[Demand, bytes]]]:
        """The disclosed demands by interval, each with its sealed bytes, once its meter has signed it."""
        disclosure = self._disclosure
        signer = Signer(disclosure.meter, disclosure.meter_key)
        found: dict[int, list[tuple[Demand, bytes]]] = defaultdict(list)
        for number, raw in enumerate(disclosure.demands, start=1):
            try:
                demand = open_envelope(
                    raw, disclosure.ledger, lambda key_id: signer if key_id == signer.key.key_id else None
                ).message
            except ProtocolError as error:
                self._faults.append(f"demand {number} is not what {disclosure.meter} signed: {error}")
                continue
            if not isinstance(demand, Demand) or demand.meter != disclosure.meter:
                self._faults.append(f"message {number} is no demand of {disclosure.meter}")
            elif day_of(demand.start_s) != disclosure.day:
                self._faults.append(f"demand {number} is of {day_text(day_of(demand.start_s))}, another day")
            elif any(other.revision == demand.revision for other, _ in found[demand.start_s]):
                self._faults.append(f"demand {number} is there twice, or in two versions")
            else:
                found[demand.start_s].append((demand, raw))
        return found

    def _compare(
        self, start_s: int, k_interval: bytes, demands: list[tuple[Demand, bytes]], row: DemandRow | None
    ) -> None:
        if row is None:
            # A demand of nothing never comes to the ledger, and one of an interval that is still open may yet come.
            closed = self._store.get((CLOSED, self._disclosure.broker, start_s)) is not None
            if closed and any(demand.energy_wh for demand, _ in demands):
                self._faults.append(
                    f"{_time(start_s)}: the demand is not on the ledger under this day key, although"
                    f" {self._disclosure.broker} has closed the interval"
                )
            return
        if not demands:
            self._faults.append(f"{_time(start_s)}: the ledger has a demand of this meter, which was left out")
            return
        if row.broker != self._disclosure.broker:
            self._faults.append(f"{_time(start_s)}: the demand was served by {row.broker}")
        for demand, raw in demands:
            if commitment(k_interval, raw) == row.commitment:
                if demand.energy_wh != row.demanded_wh:
                    self._faults.append(
                        f"{_time(start_s)}: the meter asked for {demand.energy_wh} Wh, the ledger has {row.demanded_wh}"
                    )
                return
        self._faults.append(f"{_time(start_s)}: the ledger is committed to another demand than the disclosed one")

    def _deliveries(self, rows: dict[int, tuple[bytes, DemandRow | None]]) -> dict[int, list[DisclosedDelivery]]:
        """The delivered slices of the day's demands, and a fault where they are not what the demand's row says."""
        found: dict[int, list[DisclosedDelivery]] = defaultdict(list)
        delivered_wh = {start_s: row.delivered_wh for start_s, (_, row) in rows.items() if row is not None}
        short = {alias: start_s for start_s, (alias, _) in rows.items() if delivered_wh.get(start_s)}
        # Nearly all demands are met from their own interval. Only for the others a whole month has to be gone through.
        for alias, start_s in list(short.items()):
            end_s = start_s + self._genesis.interval_s
            found[start_s] = [delivery for _, delivery in self._slices({alias: start_s}, start_s, end_s)]
            if sum([delivery.energy_wh for delivery in found[start_s]]) == delivered_wh[start_s]:
                del short[alias]
        if short:
            for start_s in short.values():
                found[start_s] = []
            for start_s, delivery in self._slices(short, *_month_of(self._disclosure.day)):
                found[start_s].append(delivery)
        for start_s in short.values():
            if sum([delivery.energy_wh for delivery in found[start_s]]) != delivered_wh[start_s]:
                self._faults.append(f"{_time(start_s)}: the ledger's slices are not what it says was delivered")
        return found

    def _slices(self, wanted: dict[bytes, int], low_s: int, high_s: int) -> Iterator[tuple[int, DisclosedDelivery]]:
        """(start of the demand, slice) of everything made in [low_s, high_s) that went to one of these pseudonyms."""
        for raw_key, raw in self._store.state_rows(*scan_bounds((SLICE,), low_s, high_s)):
            # Looking for the bytes first: decoding every slice of an interval would take a hundred times as long.
            if not any(alias in raw for alias in wanted):
                continue
            key, row = decode_key(raw_key), decode_row(SLICE, raw)
            assert isinstance(row, SliceRow)
            if wanted.get(row.pseudonym) == row.demand_start_s:
                device: DeviceRow = self._store.get((DEVICE, key[2]))
                energy_wh = row.to_wh - key[5]
                yield row.demand_start_s, DisclosedDelivery(row.line, Source(device.source), key[2], energy_wh)


def _month_of(day: int) -> tuple[int, int]:
    """The UTC month of a day as [start_s, end_s): no window of a demand is longer."""
    first = datetime.fromtimestamp(day * DAY_S, UTC).replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)
    return int(first.timestamp()), int(following.timestamp())


def _time(start_s: int) -> str:
    return datetime.fromtimestamp(start_s, UTC).strftime("%Y-%m-%dT%H:%MZ")
