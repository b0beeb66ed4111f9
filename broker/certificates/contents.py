"""What a certificate says: which Wh of which device were used when, and the sums of that. Pure, integers only.

Nothing is believed here: `verify` holds the same contents against their proofs. What contradicts itself raises
ProofFailed.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from broker.certificates.codes import UNMATCHED
from broker.certificates.document import Certificate, CertifiedInterval, Factor, SourceTotal, Totals
from broker.ledger.operations import Admit, AssetId, CorrectDemand, Operation, RotateKey, decode_operation
from broker.ledger.receipts import ProofFailed
from broker.market.windows import Window, window_span
from broker.protocol.envelope import parse
from broker.protocol.errors import MalformedMessage
from broker.protocol.market_time import Interval
from broker.protocol.messages import Admission, Genesis, KeyHolder, KeyRotation, MessageType
from broker.protocol.sources import Source


class Placed(NamedTuple):
    """An operation and its place on the ledger."""

    leaf: int
    operation: Operation


@dataclass(frozen=True, slots=True)
class Device:
    """A device as a registrar admitted it, and the rotations of its meter's key in the order of the ledger."""

    admission: Admission
    rotations: tuple[KeyRotation, ...]


class Line(NamedTuple):
    """Wh `[from_wh, to_wh)` of what a device made, used in the interval that begins at `start_s`.

    `issue` and `device` count those of the certificate. `made_s`: the start of the interval in which it was made.
    """

    start_s: int
    issue: int
    device: int
    made_s: int
    from_wh: int
    to_wh: int
    line: int

    @property
    def energy_wh(self) -> int:
        return self.to_wh - self.from_wh


@dataclass(frozen=True, slots=True)
class Contents:
    """A certificate, read. `demanded_wh` stands beside `certificate.intervals`, `assets` beside `certificate.issues`;
    `corrections` are by pseudonym.
    """

    certificate: Certificate
    genesis: Genesis
    operations: tuple[Placed, ...]
    devices: tuple[Device, ...]
    assets: tuple[AssetId, ...]
    corrections: dict[bytes, tuple[Placed, ...]]
    lines: tuple[Line, ...]
    demanded_wh: tuple[int, ...]

    @property
    def final_s(self) -> int:
        """The market clock from which on nothing in it can change: the correction deadline of what comes last."""
        certificate, interval_s = self.certificate, self.genesis.interval_s
        last_s = (certificate.intervals[-1].number + 1) * interval_s
        for interval in certificate.intervals:
            for given in interval.deliveries[-1:]:
                # What is unfilled may still be given while the window is open.
                start_s = interval.number * interval_s
                span = window_span(Window(given.window), Interval(start_s, start_s + interval_s))
                last_s = max(last_s, span.end_s)
        return last_s + self.genesis.correction_deadline_s

    @property
    def is_provisional(self) -> bool:
        """True if, by the broker's word, something in it may still be corrected."""
        return self.certificate.settled_s < self.final_s

    @property
    def assets_used(self) -> set[tuple[str, int]]:
        """(device, start of the interval) of every reading in it."""
        return {(asset.device, asset.start_s) for asset in self.assets}

    def source_of(self, line: Line) -> Source:
        """What the device of a line is admitted as."""
        return self.devices[line.device].admission.source


def utc_text(time_s: int) -> str:
    """A time as people and registries read it."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_contents(certificate: Certificate) -> Contents:
    """Raises ProofFailed or MalformedMessage where the certificate contradicts itself."""
    genesis = Genesis.from_bytes(certificate.genesis)
    operations = tuple([Placed(leaf, decode_operation(raw)) for leaf, raw in certificate.operations])
    devices = _devices(operations)
    corrections = _corrections(operations)
    assets = []
    for reading in certificate.issues:
        if reading.device >= len(devices):
            raise ProofFailed(f"it speaks of device {reading.device}, and holds the admission of {len(devices)}")
        admission = devices[reading.device].admission
        made_s = reading.number * genesis.interval_s
        assets.append(AssetId(admission.device, admission.carrier, made_s, reading.revision))
    if not certificate.intervals:
        raise ProofFailed("it certifies no interval at all")
    lines: list[Line] = []
    demanded_wh = []
    for interval in certificate.intervals:
        start_s = interval.number * genesis.interval_s
        lines += _standing(certificate, interval, start_s, assets, corrections.get(interval.pseudonym, ()))
        if not interval.demands:
            raise ProofFailed(f"it holds no demand of the interval at {utc_text(start_s)}")
        demanded_wh.append(interval.demands[-1].energy_wh)
    return Contents(
        certificate, genesis, operations, devices, tuple(assets), corrections, tuple(lines), tuple(demanded_wh)
    )


def totals_of(
    lines: Iterable[Line], sources: Sequence[Source], demanded_wh: Iterable[int], factors: Iterable[Factor]
) -> Totals:
    """The sums over lines; `sources` are those of the devices, `factors` what the CO2 is reckoned by.

    1 Wh at 1 mg/kWh is 1 µg; each source's sum is rounded half up to a mg, so that the mg of the sources add up.
    """
    made: dict[Source, int] = defaultdict(int)
    at_once: dict[Source, int] = defaultdict(int)
    for line in lines:
        source = sources[line.device]
        made[source] += line.to_wh - line.from_wh
        if line.made_s == line.start_s:
            at_once[source] += line.to_wh - line.from_wh
    demanded = sum(demanded_wh)
    delivered = sum(made.values())
    by_number: dict[int, int] = {int(source): energy_wh for source, energy_wh in made.items()}
    by_number[UNMATCHED] = demanded - delivered
    mg_per_kwh = dict(factors)
    co2_mg = sum([(by_number[number] * mg + 500) // 1_000 for number, mg in mg_per_kwh.items() if number in by_number])
    return Totals(
        demanded,
        delivered,
        sum(at_once.values()),
        demanded - delivered,
        tuple([SourceTotal(source, made[source], at_once[source]) for source in sorted(made)]),
        co2_mg,
        sum([energy_wh for number, energy_wh in by_number.items() if number not in mg_per_kwh]),
    )


# --- Inside


def _devices(operations: Iterable[Placed]) -> tuple[Device, ...]:
    rotations: dict[str, list[KeyRotation]] = defaultdict(list)
    admissions = []
    for _, operation in operations:
        if isinstance(operation, RotateKey):
            rotation = KeyRotation.from_payload(_payload(operation.statement, MessageType.KEY_ROTATION))
            if rotation.holder is KeyHolder.DEVICE:
                rotations[rotation.name].append(rotation)
        elif isinstance(operation, Admit):
            admissions.append(Admission.from_payload(_payload(operation.statement, MessageType.ADMISSION)))
    return tuple([Device(admission, tuple(rotations[admission.device])) for admission in admissions])


def _payload(statement: bytes, kind: MessageType) -> bytes:
    parsed = parse(statement)
    if parsed.message_type is not kind:
        raise MalformedMessage("certificate.operations", f"a {kind.name.lower()}, got {parsed.message_type.name}")
    return parsed.payload


def _corrections(operations: Iterable[Placed]) -> dict[bytes, tuple[Placed, ...]]:
    found: dict[bytes, list[Placed]] = defaultdict(list)
    for placed in operations:
        if isinstance(placed.operation, CorrectDemand):
            found[placed.operation.pseudonym].append(placed)
    return {pseudonym: tuple(placed) for pseudonym, placed in found.items()}


def _standing(
    certificate: Certificate,
    interval: CertifiedInterval,
    start_s: int,
    assets: Sequence[AssetId],
    corrections: Sequence[Placed],
) -> list[Line]:
    """What the interval has of its deliveries after all that was returned or withdrawn."""
    standing: dict[tuple[int, int], Line] = {}
    returns = list(corrections)
    withdrawn = {(item.issue, item.from_wh): item.to_wh for item in interval.withdrawn}
    for given in interval.deliveries:
        while returns and returns[0].leaf < given.leaf:
            _give_back(assets, standing, returns.pop(0))
        for number, from_wh, to_wh, line in given.slices:
            if number >= len(assets):
                raise ProofFailed(f"{utc_text(start_s)}: it has a slice of an issue that it does not hold")
            if not from_wh < to_wh or (number, from_wh) in standing:
                raise ProofFailed(f"{utc_text(start_s)}: a slice of {assets[number].device} is empty or listed twice")
            device = certificate.issues[number].device
            standing[number, from_wh] = Line(start_s, number, device, assets[number].start_s, from_wh, to_wh, line)
    for placed in returns:
        _give_back(assets, standing, placed)
    for key, end_wh in withdrawn.items():
        held = standing.get(key)
        if held is None or not held.from_wh <= end_wh < held.to_wh:
            raise ProofFailed(f"{utc_text(start_s)}: it tells of a withdrawal from a slice that it does not have")
        standing[key] = held._replace(to_wh=end_wh)
    return [line for line in standing.values() if line.from_wh < line.to_wh]


def _give_back(
    assets: Sequence[AssetId],
    standing: dict[tuple[int, int], Line],
    placed: Placed,
) -> None:
    """A correction of the demand returned the tails of slices."""
    assert isinstance(placed.operation, CorrectDemand)
    for item in placed.operation.returned:
        key = next(
            (key for key in standing if (assets[key[0]], key[1]) == (item.asset, item.slice_from_wh)),
            None,
        )
        if key is None:
            raise ProofFailed(f"a correction returns Wh of {item.asset.device} that the certificate does not list")
        line = standing[key]
        # It may end sooner than was delivered: a correction of the reading may have come before.
        if not item.from_wh < item.to_wh <= line.to_wh:
            raise ProofFailed(f"a correction returns Wh of {item.asset.device} that are no end of a slice")
        if item.from_wh > item.slice_from_wh:
            standing[key] = line._replace(to_wh=item.from_wh)
        else:
            del standing[key]
