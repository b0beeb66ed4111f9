"""Makes a certificate from what was found on a ledger and in a broker's store. Pure.

`gather` finds; a test or another store may do it otherwise. Whatever is told by parts here is built again at once and
compared with the ledger's own bytes, so a certificate is never signed that could not be verified for that reason.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from broker.certificates.contents import Line, totals_of, utc_text
from broker.certificates.document import (
    Certificate,
    CertifiedInterval,
    ClosingProof,
    Factor,
    Given,
    GivenSlice,
    SignedDemand,
    SignedReading,
    TimedKey,
    Withdrawn,
)
from broker.certificates.evidence import delivery_evidence, demand_evidence, reading_evidence
from broker.ledger.merkle import hashes_of, inclusion_proof, leaf_hash
from broker.ledger.operations import (
    Admit,
    AssetId,
    Correct,
    CorrectDemand,
    Deliver,
    Issue,
    Operation,
    Register,
    RotateKey,
    decode_operation,
)
from broker.ledger.proofs import ProvenOperation
from broker.ledger.receipts import SignedHead
from broker.protocol.envelope import parse
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.messages import (
    Admission,
    Carrier,
    Demand,
    Genesis,
    KeyHolder,
    KeyRotation,
    Reading,
    Registration,
)
from broker.protocol.sources import Source
from broker.service.pseudonyms import DAY_S, commitment, day_key, day_of, interval_key, pseudonym


class CertificateError(Exception):
    """A certificate that cannot be issued. The text says why, and what to do or wait for."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is about one consumer and the period `[from_s, to_s)`.

    `statements`: the broker's registration, admissions and rotations of keys, more than are needed do no harm.
    `readings`: Issue and Correct of every device and interval that the deliveries draw on. `deliveries`: every Deliver
    and CorrectDemand of this consumer in the period. `demands`: the meter's sealed demands by interval. `close` and
    `close_leaves`: the Close of the last interval with a demand, and what its root is over. `end_of`: where the slice
    of an asset that begins at some Wh ends now, if it is still that pseudonym's, else None. `multiproof`: the hashes
    which lead from operations at these places to the `head`.
    """

    genesis: Genesis
    broker: str
    meter: str
    meter_key: PublicKey
    secret: bytes
    from_s: int
    to_s: int
    head: SignedHead
    settled_s: int
    statements: Sequence[ProvenOperation]
    readings: Sequence[ProvenOperation]
    deliveries: Sequence[ProvenOperation]
    demands: Mapping[int, Sequence[bytes]]
    close: ProvenOperation
    close_leaves: Sequence[bytes]
    end_of: Callable[[AssetId, int, bytes], int | None]
    multiproof: Callable[[list[int]], list[bytes]]


def build_certificate(found: Found, issued_s: int, factors: Iterable[Factor], factors_source: str) -> Certificate:
    """The certificate, not yet signed. Raises CertificateError."""
    return _Builder(found).certificate(issued_s, tuple(factors), factors_source)


class _Builder:
    def __init__(self, found: Found) -> None:
        self._found = found
        self._interval_s = found.genesis.interval_s
        self._ledger = found.genesis.ledger
        self._issues: list[SignedReading] = []
        self._places: dict[tuple[int, int, int], int] = {}
        """From (device, number, revision) to the place among `_issues`."""
        self._device_numbers: dict[str, int] = {}
        self._devices: list[str] = []
        self._sources: list[Source] = []
        self._statements: list[ProvenOperation] = []
        self._lines: list[Line] = []

    def certificate(self, issued_s: int, factors: tuple[Factor, ...], factors_source: str) -> Certificate:
        found = self._found
        self._add_readings()
        intervals = self._intervals()
        if not intervals:
            raise CertificateError(
                f"the ledger has no demand of {found.meter} from {utc_text(found.from_s)} to {utc_text(found.to_s)};"
                " `energy-broker list history` shows what it was given when"
            )
        corrections = [proven for proven in found.deliveries if isinstance(_read(proven), CorrectDemand)]
        operations = sorted([*self._statements, *corrections, found.close])
        leaves = [leaf for leaf, _ in operations]
        leaves += [issue.leaf for issue in self._issues]
        leaves += [given.leaf for interval in intervals for given in interval.deliveries]
        day_keys, interval_keys = self._keys()
        demanded_wh = [interval.demands[-1].energy_wh for interval in intervals]
        return Certificate(
            found.genesis.to_bytes(),
            found.broker,
            found.meter,
            found.meter_key.cose_key,
            found.from_s,
            found.to_s,
            issued_s,
            found.head.checkpoint,
            found.head.root,
            b"".join(found.multiproof(sorted(leaves))),
            tuple(operations),
            tuple(self._issues),
            tuple(intervals),
            tuple(day_keys),
            tuple(interval_keys),
            self._closing(operations.index(found.close), intervals[-1]),
            found.settled_s,
            factors,
            factors_source,
            totals_of(self._lines, self._sources, demanded_wh, factors),
        )

    # --- Statements and readings

    def _add_readings(self) -> None:
        found = self._found
        readings = [(leaf, raw, _reading(raw)) for leaf, raw in sorted(found.readings)]
        devices = {reading.meter for _, _, (reading, _, _) in readings}
        keys = self._add_statements(devices)
        for leaf, raw, (reading, key_id, signature) in readings:
            device = self._device_numbers[reading.meter]
            key = [one.key_id for one in keys[device]].index(key_id)
            issue = SignedReading(
                device,
                reading.start_s // self._interval_s,
                reading.revision,
                reading.energy_wh,
                reading.quality,
                reading.sampled_s or (),
                key,
                signature,
                leaf,
            )
            rebuilt, _ = reading_evidence(issue, reading.meter, keys[device][key], self._ledger, self._interval_s)
            _require_same(rebuilt, raw, "reading", reading.start_s)
            self._places[device, issue.number, issue.revision] = len(self._issues)
            self._issues.append(issue)

    def _add_statements(self, devices: set[str]) -> list[list[PublicKey]]:
        """Keep the statements that matter; the keys of each device in the order in which they came."""
        keys: list[list[PublicKey]] = []
        for proven in sorted(self._found.statements):
            match _read(proven):
                case Register(statement):
                    if Registration.from_payload(parse(statement).payload).party == self._found.broker:
                        self._statements.append(proven)
                case Admit(statement):
                    admission = Admission.from_payload(parse(statement).payload)
                    if admission.device in devices:
                        self._device_numbers[admission.device] = len(keys)
                        self._devices.append(admission.device)
                        self._sources.append(admission.source)
                        keys.append([public_key_from_cose(admission.meter_key)])
                        self._statements.append(proven)
                case RotateKey(statement):
                    rotation = KeyRotation.from_payload(parse(statement).payload)
                    if rotation.holder is KeyHolder.DEVICE and rotation.name in self._device_numbers:
                        keys[self._device_numbers[rotation.name]].append(public_key_from_cose(rotation.new_key))
                        self._statements.append(proven)
                    elif (rotation.holder, rotation.name) == (KeyHolder.PARTY, self._found.broker):
                        self._statements.append(proven)
        missing = devices - set(self._device_numbers)
        if missing:
            raise CertificateError(
                f"the admission of {', '.join(sorted(missing))} was not found on the ledger; a copy that was restored"
                " from a snapshot does not have what happened before it, so name a full one"
            )
        return keys

    # --- Intervals

    def _intervals(self) -> list[CertifiedInterval]:
        found = self._found
        by_interval: dict[int, list[tuple[int, bytes, Deliver | CorrectDemand]]] = defaultdict(list)
        for proven in sorted(found.deliveries):
            operation = _read(proven)
            assert isinstance(operation, Deliver | CorrectDemand)
            by_interval[operation.start_s].append((*proven, operation))
        return [self._interval(start_s, by_interval[start_s]) for start_s in sorted(by_interval)]

    def _interval(
        self, start_s: int, operations: Sequence[tuple[int, bytes, Deliver | CorrectDemand]]
    ) -> CertifiedInterval:
        found = self._found
        k_interval = self._interval_key(start_s)
        alias = pseudonym(k_interval, found.meter_key.key_id)
        sealed = {commitment(k_interval, raw): raw for raw in found.demands.get(start_s, ())}
        demands: list[SignedDemand] = []
        committed: list[bytes] = []
        deliveries = []
        ends: dict[tuple[int, int], tuple[int, int]] = {}
        for leaf, raw, operation in operations:
            if not committed or operation.commitment != committed[-1]:
                demands.append(self._demand(sealed.get(operation.commitment), start_s))
                committed.append(operation.commitment)
            if isinstance(operation, CorrectDemand):
                for item in operation.returned:
                    place = self._place(item.asset), item.slice_from_wh
                    ends[place] = item.from_wh, ends[place][1]
                continue
            given = self._given(leaf, operation)
            for slice_ in given.slices:
                ends[slice_.issue, slice_.from_wh] = slice_.to_wh, slice_.line
            assets = [item.asset for item in operation.slices]
            area = found.genesis.areas[given.area]
            rebuilt = delivery_evidence(
                given, assets, alias, start_s, self._interval_s, area, demands[-1].energy_wh, committed[-1]
            )
            _require_same(rebuilt, raw, "delivery", start_s)
            deliveries.append(given)
        withdrawn = self._standing(start_s, alias, ends)
        number = start_s // self._interval_s
        return CertifiedInterval(number, alias, tuple(demands), tuple(deliveries), tuple(withdrawn))

    def _standing(self, start_s: int, alias: bytes, ends: Mapping[tuple[int, int], tuple[int, int]]) -> list[Withdrawn]:
        """Note the lines as the ledger has them now, and which of them are shorter than any delivery or return says."""
        withdrawn = []
        for (place, from_wh), (end_wh, line) in ends.items():
            if from_wh == end_wh:
                continue
            issue = self._issues[place]
            asset = self._asset(issue)
            now_wh = self._found.end_of(asset, from_wh, alias)
            now_wh = from_wh if now_wh is None else now_wh
            if now_wh < end_wh:
                withdrawn.append(Withdrawn(place, from_wh, now_wh))
            if from_wh < now_wh:
                self._lines.append(Line(start_s, place, issue.device, asset.start_s, from_wh, now_wh, line))
        return withdrawn

    def _given(self, leaf: int, operation: Deliver) -> Given:
        slices = [GivenSlice(self._place(item.asset), item.from_wh, item.to_wh, item.line) for item in operation.slices]
        return Given(leaf, operation.window, self._found.genesis.areas.index(operation.area), tuple(slices))

    def _place(self, asset: AssetId) -> int:
        number = asset.start_s // self._interval_s
        place = self._places.get((self._device_numbers.get(asset.device, -1), number, asset.revision))
        if place is None:
            raise CertificateError(f"the reading of {asset.device} at {utc_text(asset.start_s)} was not found")
        return place

    def _asset(self, issue: SignedReading) -> AssetId:
        return AssetId(
            self._devices[issue.device], Carrier.ELECTRICITY, issue.number * self._interval_s, issue.revision
        )

    def _demand(self, raw: bytes | None, start_s: int) -> SignedDemand:
        if raw is None:
            raise CertificateError(
                f"{utc_text(start_s)}: the ledger is committed to a demand that this broker's database does not have;"
                " restore the newest backup of it"
            )
        found = self._found
        parsed = parse(raw)
        demand = Demand.from_payload(parsed.payload)
        signed = SignedDemand(
            demand.revision, demand.energy_wh, demand.quality, demand.sampled_s or (), parsed.signature
        )
        rebuilt, _ = demand_evidence(signed, found.meter, found.meter_key, self._ledger, start_s, self._interval_s)
        _require_same(rebuilt, raw, "demand", start_s)
        return signed

    # --- Keys and close

    def _interval_key(self, start_s: int) -> bytes:
        return interval_key(day_key(self._found.secret, day_of(start_s)), start_s)

    def _keys(self) -> tuple[list[TimedKey], list[TimedKey]]:
        """The keys of whole days, and of single intervals where the period has only part of a day: none opens more.

        Those of intervals without a demand too, so that a copy of the ledger shows that there was none.
        """
        found = self._found
        days: dict[int, TimedKey] = {}
        single = []
        for start_s in range(found.from_s, found.to_s, self._interval_s):
            day = day_of(start_s)
            if found.from_s <= day * DAY_S and (day + 1) * DAY_S <= found.to_s:
                days[day] = TimedKey(day, day_key(found.secret, day))
            else:
                single.append(TimedKey(start_s, self._interval_key(start_s)))
        return list(days.values()), single

    def _closing(self, operation: int, last: CertifiedInterval) -> ClosingProof:
        found = self._found
        k_interval = self._interval_key(last.number * self._interval_s)
        sealed = found.demands[last.number * self._interval_s]
        ours = {leaf_hash(last.pseudonym + commitment(k_interval, raw)) for raw in sealed}
        for number, leaf in enumerate(found.close_leaves):
            if leaf in ours:
                path = inclusion_proof(number, len(found.close_leaves), hashes_of(found.close_leaves))
                return ClosingProof(operation, number, tuple(path))
        raise CertificateError(
            f"{utc_text(last.number * self._interval_s)}: the close of this interval does not count the demand yet; try"
            " again after the next interval"
        )


def _read(proven: ProvenOperation) -> Operation:
    return decode_operation(proven.operation)


def _reading(raw: bytes) -> tuple[Reading, bytes, bytes]:
    """The reading inside an Issue or Correct, the id of the meter's key, and the signature."""
    operation = decode_operation(raw)
    assert isinstance(operation, Issue | Correct)
    parsed = parse(operation.statement)
    return Reading.from_payload(parsed.payload), parsed.key_id, parsed.signature


def _require_same(rebuilt: bytes, raw: bytes, what: str, start_s: int) -> None:
    if rebuilt != raw:
        raise CertificateError(f"{utc_text(start_s)}: the {what} is one that a certificate cannot hold")
