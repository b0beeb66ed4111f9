"""Whether a certificate is true, by the file and the ledger's trust file alone. Pure.

What is checked, in this order: the broker is registered by a registrar and signed the certificate; the ledger is the
trust file's, by the hash of its genesis; a validator signed the checkpoint; every pseudonym and commitment follows from
the disclosed keys, the meter's key and its signed demands; every slice is of a device that a registrar admitted, made
and used inside the demand's window and area, and stands once; all these operations lead to the checkpoint's root; the
broker closed the last interval, with this consumer's demand counted; the sums add up; every meter signed.

docs/certificates.md says what follows from that and what cannot be seen.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, pairwise
from typing import Final, NamedTuple, TypeVar

from broker.certificates.contents import Contents, Line, read_contents, totals_of, utc_text
from broker.certificates.document import Certificate, CertifiedInterval, SealedCertificate, read_certificate
from broker.certificates.evidence import MeterSignature, delivery_evidence, demand_evidence, reading_evidence
from broker.ledger.merkle import leaf_hash, root_from_inclusion, root_from_multiproof
from broker.ledger.operations import Admit, Close, CorrectDemand, Register, RotateKey, Window
from broker.ledger.receipts import ProofFailed, verify_checkpoint, verify_signed_root
from broker.ledger.rules.delivery import same_window
from broker.ledger.trust import Trust
from broker.protocol.envelope import Signer, open_envelope, parse
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import (
    HASH_BYTES,
    Admission,
    Checkpoint,
    KeyHolder,
    KeyRotation,
    Message,
    Quality,
    Registration,
    Role,
)
from broker.service.pseudonyms import commitment, day_of, interval_key, pseudonym

M = TypeVar("M", bound=Message)

SignatureChecks = Callable[[Sequence[MeterSignature]], Callable[[], int | None]]
"""Begins to check some signatures. What it returns waits for the end and gives the index of the first one that does not
hold, None if all do. It is called for a share after the other, so that the first are under way early."""

_SHARE: Final = 2_048
"""Signatures that are begun together."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A certificate that is true, at this checkpoint. `carried_wh`: Wh above what meters counted in those intervals.

    Such Wh are carried over from corrections of other intervals (docs/ledger.md); whether as many were, only a copy of
    the ledger can tell. `signed_with` is the id of the broker's key.
    """

    contents: Contents
    certificate_id: bytes
    checkpoint: Checkpoint
    validator: str
    carried_wh: int
    signed_with: bytes


class _MeterKey(NamedTuple):
    """A key of a device's meter; from `retired_from_s` on another one speaks for the device."""

    key: PublicKey
    retired_from_s: int | None


def one_by_one(signatures: Sequence[MeterSignature]) -> Callable[[], int | None]:
    """Checks signatures one after the other, when asked."""

    def first_that_fails() -> int | None:
        for index, (key, signature, message, _, _) in enumerate(signatures):
            if not key.verifies(signature, message):
                return index
        return None

    return first_that_fails


def verify_certificate(
    raw: bytes, trust: Trust, known: Checkpoint | None = None, check_signatures: SignatureChecks = one_by_one
) -> Verified:
    """Check a certificate; `known` is a checkpoint of the ledger that it must not be older than.

    Raises ProtocolError (ProofFailed, MalformedMessage, BadSignature, UnknownKey) with what does not hold.
    """
    sealed = read_certificate(raw)
    certificate = sealed.certificate
    if sha256(certificate.genesis).digest() != trust.genesis_hash:
        raise ProofFailed(f"it is about another ledger than {trust.ledger}: its genesis is not the trust file's")
    contents = read_contents(certificate)
    return _Verification(sealed, contents, trust).run(known, check_signatures)


class _Verification:
    """One certificate on its way from what it says to what is proven."""

    def __init__(self, sealed: SealedCertificate, contents: Contents, trust: Trust) -> None:
        self._sealed = sealed
        self._certificate: Certificate = sealed.certificate
        self._contents = contents
        self._trust = trust
        self._interval_s = contents.genesis.interval_s
        self._leaves: list[tuple[int, bytes]] = []
        self._keys: list[list[_MeterKey]] = []
        self._device_numbers: dict[str, int] = {}
        self._commitments: list[bytes] = []
        """Of the demands of the interval that was looked at last."""

    def run(self, known: Checkpoint | None, check_signatures: SignatureChecks) -> Verified:
        certificate, contents = self._certificate, self._contents
        self._check_statements()
        checkpoint, validator = self._checked_checkpoint(known)
        self._leaves = [(leaf, leaf_hash(operation)) for leaf, operation in certificate.operations]
        # Signatures are checked meanwhile, where there are processors for it.
        checking = [
            (share, check_signatures(share))
            for signatures in (self._add_readings(), self._add_intervals())
            for share in _shares(signatures)
        ]
        carried_wh = self._check_amounts()
        self._check_close()
        self._check_root(checkpoint)
        sources = [device.admission.source for device in contents.devices]
        if totals_of(contents.lines, sources, contents.demanded_wh, certificate.factors) != certificate.totals:
            raise ProofFailed("the sums that it states are not those of its lines")
        for share, first_that_fails in checking:
            failed = first_that_fails()
            if failed is not None:
                what, at_s = share[failed][3:]
                raise ProofFailed(f"the meter did not sign the {what} of {utc_text(at_s)}")
        certificate_id = self._sealed.certificate_id(self._trust.ledger)
        return Verified(contents, certificate_id, checkpoint, validator, carried_wh, self._sealed.key_id)

    # --- Who speaks

    def _check_statements(self) -> None:
        """Registrars admitted broker and devices, keys changed hands properly, the broker signed all of this."""
        broker = (KeyHolder.PARTY, self._certificate.broker)
        current: dict[tuple[KeyHolder, str], PublicKey] = {}
        before = -1
        for leaf, operation in self._contents.operations:
            if leaf <= before:
                raise ProofFailed(f"operation {leaf} of the ledger is listed twice, or out of its order")
            before = leaf
            match operation:
                case Register():
                    registration = self._opened(operation.statement, Registration, None)
                    if (registration.party, registration.role) != (broker[1], Role.BROKER) or broker in current:
                        raise ProofFailed(f"it holds a registration that is not the one of broker {broker[1]}")
                    current[broker] = public_key_from_cose(registration.key)
                case Admit():
                    admission = self._opened(operation.statement, Admission, None)
                    device = (KeyHolder.DEVICE, admission.device)
                    if device in current:
                        raise ProofFailed(f"device {admission.device} is admitted twice")
                    current[device] = public_key_from_cose(admission.meter_key)
                    self._keys.append([_MeterKey(current[device], None)])
                    self._device_numbers[admission.device] = len(self._keys) - 1
                case RotateKey():
                    self._rotate(operation, current)
                case CorrectDemand() | Close():
                    pass  # Looked at with the interval that they belong to.
                case _:
                    raise ProofFailed(f"operation {leaf} proves nothing about this certificate")
        if broker not in current:
            raise ProofFailed(f"it does not show that a registrar registered broker {broker[1]}")
        self._sealed.check_signature(current[broker], self._trust.ledger)

    def _rotate(self, operation: RotateKey, current: dict[tuple[KeyHolder, str], PublicKey]) -> None:
        claimed = KeyRotation.from_payload(parse(operation.statement).payload)
        holder = (claimed.holder, claimed.name)
        old = current.get(holder)
        if old is None or old.key_id != claimed.old_key_id:
            raise ProofFailed(f"it holds a change of a key of {claimed.name} that does not belong to it")
        rotation = self._opened(operation.statement, KeyRotation, Signer(claimed.name, old))
        current[holder] = public_key_from_cose(rotation.new_key)
        if claimed.holder is KeyHolder.DEVICE:
            keys = self._keys[self._device_numbers[claimed.name]]
            keys[-1] = _MeterKey(old, rotation.from_s)
            keys.append(_MeterKey(current[holder], None))

    def _opened(self, statement: bytes, kind: type[M], holder: Signer | None) -> M:
        """A statement of a registrar, or of the holder of a key."""

        def signer(key_id: bytes) -> Signer | None:
            return holder if holder is not None and holder.key.key_id == key_id else self._trust.registrars.get(key_id)

        message = open_envelope(statement, self._trust.ledger, signer).message
        if not isinstance(message, kind):
            raise MalformedMessage("certificate.operations", f"a {kind.TYPE.name.lower()}")
        return message

    def _checked_checkpoint(self, known: Checkpoint | None) -> tuple[Checkpoint, str]:
        checkpoint, _ = verify_checkpoint(self._certificate.checkpoint, self._trust)
        validator = verify_signed_root(self._certificate.root, checkpoint.root, self._trust)
        if known is not None:
            if checkpoint.height < known.height:
                raise ProofFailed(
                    f"its checkpoint is stale: height {checkpoint.height}, and the ledger was at {known.height}"
                    " already; have the broker issue it anew"
                )
            if checkpoint.tree_size == known.tree_size and checkpoint.root != known.root:
                raise ProofFailed(
                    f"its checkpoint and the known one contradict each other: both have {known.tree_size} operations;"
                    " the ledger has two histories"
                )
        return checkpoint, validator

    def _check_root(self, checkpoint: Checkpoint) -> None:
        leaves = sorted(self._leaves)
        for (one, _), (other, _) in pairwise(leaves):
            if one == other:
                raise ProofFailed(f"operation {one} of the ledger is listed twice")
        raw = self._certificate.hashes
        if len(raw) % HASH_BYTES:
            raise ProofFailed(f"its proof is cut off: {len(raw)} bytes are no whole hashes")
        hashes = [raw[at : at + HASH_BYTES] for at in range(0, len(raw), HASH_BYTES)]
        if root_from_multiproof(leaves, checkpoint.tree_size, hashes) != checkpoint.root:
            raise ProofFailed(
                f"its operations and hashes do not lead to the root of the checkpoint of height {checkpoint.height}:"
                " an operation, its place, or the proof is not what the ledger has"
            )

    # --- What was made and used

    def _add_readings(self) -> Iterator[MeterSignature]:
        """Each reading is of an admitted device, within what that can make; its operation becomes a leaf."""
        certificate, ledger, interval_s = self._certificate, self._trust.ledger, self._interval_s
        for reading in certificate.issues:
            admission = self._contents.devices[reading.device].admission
            keys = self._keys[reading.device]
            start_s = reading.number * interval_s
            if reading.key >= len(keys):
                raise ProofFailed(f"it does not show key {reading.key} of {admission.device}")
            key, retired_from_s = keys[reading.key]
            if retired_from_s is not None and start_s >= retired_from_s:
                raise ProofFailed(f"{utc_text(start_s)}: {admission.device} had another key by then")
            if (
                start_s < admission.commissioned_s
                or reading.quality is Quality.MISSING
                or reading.energy_wh > limit_wh(admission, interval_s)
            ):
                raise ProofFailed(f"{utc_text(start_s)}: this is nothing that {admission.device} can have made")
            operation, signature = reading_evidence(reading, admission.device, key, ledger, interval_s)
            self._leaves.append((reading.leaf, leaf_hash(operation)))
            yield signature

    def _add_intervals(self) -> Iterator[MeterSignature]:
        """Each interval is this meter's by its pseudonym and demand; its deliveries become leaves."""
        certificate = self._certificate
        meter_key = public_key_from_cose(certificate.meter_key)
        days = dict(certificate.day_keys)
        single = dict(certificate.interval_keys)
        before_s = -1
        for interval in certificate.intervals:
            start_s = interval.number * self._interval_s
            if not max(certificate.from_s, before_s + 1) <= start_s <= certificate.to_s - self._interval_s:
                raise ProofFailed(
                    f"{utc_text(start_s)}: this interval is outside the period, listed twice, or out of its order"
                )
            before_s = start_s
            k_interval = single.get(start_s)
            if k_interval is None:
                k_day = days.get(day_of(start_s))
                if k_day is None:
                    raise ProofFailed(
                        f"{utc_text(start_s)}: it does not disclose the key by which this interval's pseudonym is known"
                    )
                k_interval = interval_key(k_day, start_s)
            if pseudonym(k_interval, meter_key.key_id) != interval.pseudonym:
                raise ProofFailed(
                    f"{utc_text(start_s)}: the deliveries are not of {certificate.meter}: their pseudonym is that of"
                    " another consumer or of another interval"
                )
            yield from self._add_interval(interval, start_s, meter_key, k_interval)
        unknown = set(self._contents.corrections) - {interval.pseudonym for interval in certificate.intervals}
        if unknown:
            raise ProofFailed("it holds the correction of a demand that is not in it")

    def _add_interval(
        self, interval: CertifiedInterval, start_s: int, meter_key: PublicKey, k_interval: bytes
    ) -> list[MeterSignature]:
        contents, ledger, meter = self._contents, self._trust.ledger, self._certificate.meter
        corrections = contents.corrections.get(interval.pseudonym, ())
        commitments, signatures = [], []
        for demand in interval.demands:
            raw, signature = demand_evidence(demand, meter, meter_key, ledger, start_s, self._interval_s)
            commitments.append(commitment(k_interval, raw))
            signatures.append(signature)
        if len(interval.demands) != len(corrections) + 1:
            raise ProofFailed(f"{utc_text(start_s)}: its demands are not one more than the corrections of them")
        for number, (_, operation) in enumerate(corrections, start=1):
            assert isinstance(operation, CorrectDemand)
            if (operation.start_s, operation.revision, operation.demanded_wh, operation.commitment) != (
                start_s,
                number,
                interval.demands[number].energy_wh,
                commitments[number],
            ):
                raise ProofFailed(f"{utc_text(start_s)}: a correction of the demand is not the one on the ledger")
        self._commitments = commitments
        areas = contents.genesis.areas
        for given in interval.deliveries:
            if given.area >= len(areas):
                raise ProofFailed(f"{utc_text(start_s)}: the ledger has no area {given.area}")
            current = sum([leaf < given.leaf for leaf, _ in corrections])
            assets = [contents.assets[item.issue] for item in given.slices]
            for item, asset in zip(given.slices, assets, strict=True):
                self._check_fits(item.issue, asset.start_s, start_s, given.window, areas[given.area])
            operation_bytes = delivery_evidence(
                given,
                assets,
                interval.pseudonym,
                start_s,
                self._interval_s,
                areas[given.area],
                interval.demands[current].energy_wh,
                commitments[current],
            )
            self._leaves.append((given.leaf, leaf_hash(operation_bytes)))
        return signatures

    def _check_fits(self, issue: int, made_s: int, start_s: int, window: Window, area: str) -> None:
        admission = self._contents.devices[self._certificate.issues[issue].device].admission
        if made_s != start_s and not same_window(window, made_s, start_s):
            raise ProofFailed(
                f"{utc_text(start_s)}: what {admission.device} made at {utc_text(made_s)} is outside the"
                f" {window.name.lower()} of the demand"
            )
        if admission.area != area:
            raise ProofFailed(
                f"{utc_text(start_s)}: {admission.device} feeds {admission.area}, the demand is in {area}"
            )

    def _check_amounts(self) -> int:
        """No Wh stands twice, nobody is given more than they used. Returns the Wh above what meters counted."""
        by_asset: dict[int, list[Line]] = {}
        given_wh: dict[int, int] = {}
        for line in self._contents.lines:
            by_asset.setdefault(line.issue, []).append(line)
            given_wh[line.start_s] = given_wh.get(line.start_s, 0) + line.to_wh - line.from_wh
        for interval, demanded_wh in zip(self._certificate.intervals, self._contents.demanded_wh, strict=True):
            start_s = interval.number * self._interval_s
            if given_wh.get(start_s, 0) > demanded_wh:
                raise ProofFailed(
                    f"{utc_text(start_s)}: {given_wh[start_s]} Wh are given for {demanded_wh} Wh of demand"
                )
        metered: dict[tuple[int, int], tuple[int, int]] = {}
        for reading in self._certificate.issues:
            made = (reading.device, reading.number)
            metered[made] = max(metered.get(made, (-1, 0)), (reading.revision, reading.energy_wh))
        for interval in self._certificate.intervals:
            for item in interval.withdrawn:
                reading = self._certificate.issues[item.issue]
                if metered[reading.device, reading.number][0] == 0:
                    raise ProofFailed(
                        f"{utc_text(interval.number * self._interval_s)}: Wh are said to be withdrawn, and no"
                        " correction of the reading is shown"
                    )
        used: dict[tuple[int, int], int] = {}
        for issue, lines in by_asset.items():
            if len(lines) > 1:
                lines.sort(key=lambda line: line.from_wh)
            for one, other in pairwise(lines):
                if other.from_wh < one.to_wh:
                    raise ProofFailed(
                        f"{utc_text(other.start_s)}: Wh {other.from_wh} to {one.to_wh} of"
                        f" {self._contents.assets[issue].device} are listed twice"
                    )
            reading = self._certificate.issues[issue]
            made = (reading.device, reading.number)
            used[made] = used.get(made, 0) + sum([line.to_wh - line.from_wh for line in lines])
        carried_wh = 0
        for made, used_wh in used.items():
            admission = self._contents.devices[made[0]].admission
            if used_wh > limit_wh(admission, self._interval_s):
                raise ProofFailed(
                    f"{used_wh} Wh are more than {admission.device} makes in an interval with {admission.capacity_w} W"
                )
            carried_wh += max(0, used_wh - metered[made][1])
        return carried_wh

    def _check_close(self) -> None:
        """The broker closed the last interval, and with it all before, so nothing of the period was still under way."""
        closing = self._certificate.closing
        closes = [index for index, (_, item) in enumerate(self._contents.operations) if isinstance(item, Close)]
        last = self._certificate.intervals[-1]
        start_s = last.number * self._interval_s
        if closes != [closing.operation]:
            raise ProofFailed("it does not hold exactly one close, that of its last interval")
        close = self._contents.operations[closing.operation].operation
        assert isinstance(close, Close)
        if close.start_s != start_s:
            raise ProofFailed(
                f"its checkpoint is stale: it does not include the close of the last interval, {utc_text(start_s)}"
            )
        for one in self._commitments:
            leaf = leaf_hash(last.pseudonym + one)
            if root_from_inclusion(leaf, closing.demand, close.demands, closing.path) == close.root:
                return
        raise ProofFailed(f"the demand of {utc_text(start_s)} is not among those that the shown close counts")


def _shares(signatures: Iterator[MeterSignature]) -> Iterator[list[MeterSignature]]:
    while share := list(islice(signatures, _SHARE)):
        yield share


def limit_wh(admission: Admission, interval_s: int) -> int:
    """What the ledger lets a device make in an interval (`broker.ledger.rules.generation`)."""
    return min(admission.capacity_w * interval_s * 11 // 36_000, MAX_INTEGER)
