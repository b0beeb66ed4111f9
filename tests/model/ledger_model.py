"""A second, deliberately naive account of the ledger's rules, to hold the real ones against.

It was written from the design and docs/ledger.md alone, without looking at `broker/ledger/rules*.py`, so that a
misunderstanding has to be made twice to go unnoticed. It knows no bytes and no signatures: a statement is a message
with the key that signed it. Every single Wh is an object of its own, in a list as long as the interval's energy;
whatever can be counted from those lists is counted anew each time. Slow is fine here, obvious is the aim.

`Model.judge(batch)` answers None (accepted, the model has moved on) or a `Refusal`: *all* faults of the operation at
fault. The real rules name the first that they come across, which must be one of these.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from broker.ledger.operations import AssetId, Close, Deliver, Void, Window
from broker.protocol.keys import PrivateKey, public_key_from_cose
from broker.protocol.messages import Carrier, Genesis, Message, MessageType, Quality, Role

DAY_S = 86_400
EXPIRY_DAYS = 31
MAX_VALIDATORS = 64


@dataclass(frozen=True, slots=True)
class Signed:
    """A message, the key that signed it, and the name that was put into the signature as its sender."""

    message: Message
    key: PrivateKey = field(repr=False)
    sender: str
    key_id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_id", self.key.public.key_id.hex()[:6])


@dataclass(frozen=True, slots=True)
class Say:
    """An operation that is nothing but one signed statement; `code` is its OperationCode in lower case."""

    code: str
    signed: Signed


@dataclass(frozen=True, slots=True)
class SayTogether:
    """A validator change, said by several registrars."""

    signed: tuple[Signed, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """A transfer, with the receiver's order not yet sealed."""

    asset: AssetId
    from_wh: int
    to_wh: int
    sender: str
    receiver: str
    price: int
    order: Signed | None


@dataclass(frozen=True, slots=True)
class DemandCorrection:
    """A correct_demand; `returned` are the ranges that go back to the broker."""

    pseudonym: bytes
    start_s: int
    revision: int
    demanded_wh: int
    commitment: bytes
    returned: tuple["Returned", ...]


class Part(NamedTuple):
    """A Wh range of an asset."""

    asset: AssetId
    from_wh: int
    to_wh: int


class Returned(NamedTuple):
    """The end of a delivered slice that begins at `slice_from_wh`."""

    asset: AssetId
    slice_from_wh: int
    from_wh: int
    to_wh: int


Said = Say | SayTogether | Move | Deliver | Close | Void | DemandCorrection


@dataclass(frozen=True, slots=True)
class SaidBatch:
    """A batch by `sender`, signed with `key`."""

    sender: str
    key: PrivateKey = field(repr=False)
    not_after_s: int
    operations: tuple[Said, ...]


Refusal = frozenset[tuple[int | None, str]]
"""All faults that a batch could be refused for, each with the operation at fault, None for the batch as a whole."""


class Key(NamedTuple):
    kind: MessageType
    """REGISTRATION for a party's key, ADMISSION for a meter's."""
    name: str
    cose_key: bytes
    from_s: int | None = None
    """Set once it is rotated: it serves only intervals before."""
    grace_until_s: int | None = None
    revoked: bool = False


class Wh(NamedTuple):
    """One watt-hour: which revision of the reading made it, and where it is."""

    revision: int
    where: str
    """held, delivered, withdrawn or expired"""
    owner: str = ""
    """while held"""
    delivery: int = 0
    """while delivered: which delivery from its asset it was, counted from 0"""
    broker: str = ""
    pseudonym: bytes = b""
    demand_start_s: int = 0
    line: int = 0


class Metered(NamedTuple):
    revision: int
    energy_wh: int


class Span(NamedTuple):
    broker: str
    from_s: int
    end_s: int | None

    def covers(self, start_s: int) -> bool:
        return self.from_s <= start_s and (self.end_s is None or start_s < self.end_s)


class DemandSeen(NamedTuple):
    broker: str
    revision: int
    demanded_wh: int
    commitment: bytes


class OrderSeen(NamedTuple):
    message: Message | None
    """None while it is only voided"""
    used_wh: int
    voided: bool


class ClosedSeen(NamedTuple):
    revision: int
    demands: int
    demanded_wh: int
    root: bytes
    lowered_wh: int


class Validator(NamedTuple):
    cose_key: bytes
    power: int


class Limits(NamedTuple):
    """The rules' limits, so that tests can make them small enough to be met."""

    held_slices: int
    expired_assets: int
    withdrawn_slices: int
    searched_deliveries: int
    returned_slices: int
    revision: int


@dataclass
class Model:
    """The ledger, as dictionaries of values that never change in place."""

    genesis: Genesis
    limits: Limits
    roles: dict[str, Role] = field(default_factory=dict)
    admissions: dict[str, Message] = field(default_factory=dict)
    keys: dict[bytes, Key] = field(default_factory=dict)
    current: dict[tuple[MessageType, str], bytes] = field(default_factory=dict)
    """(kind, name) → the COSE_Key that the holder signs with now"""
    spans: dict[str, tuple[Span, ...]] = field(default_factory=dict)
    wh: dict[tuple[str, int], tuple[Wh, ...]] = field(default_factory=dict)
    """(device, start_s) → every Wh ever issued there, numbered from 0 over all revisions"""
    metered: dict[tuple[str, int], Metered] = field(default_factory=dict)
    carry: dict[str, int] = field(default_factory=dict)
    deliveries: dict[tuple[str, int, int], int] = field(default_factory=dict)
    """(device, start_s, revision) → slices delivered from it so far"""
    keepers: dict[tuple[str, int, int], str | None] = field(default_factory=dict)
    """(device, start_s, revision) → the broker whose closes expire what the device's owner holds of it"""
    demands: dict[tuple[int, bytes], DemandSeen] = field(default_factory=dict)
    orders: dict[tuple[str, bytes], OrderSeen] = field(default_factory=dict)
    closed: dict[tuple[str, int], ClosedSeen] = field(default_factory=dict)
    clocks: dict[str, int] = field(default_factory=dict)
    validators: dict[str, Validator] = field(default_factory=dict)
    validator_changes: int = 0
    applied: frozenset[SaidBatch] = frozenset()

    def __post_init__(self) -> None:
        if not self.validators:
            self.validators = {named.name: Validator(named.key, 1) for named in self.genesis.validators}

    def copy(self) -> "Model":
        """A model that can go another way from here. Only the dictionaries are copied; what they hold never changes."""
        changes = {name: dict(value) for name, value in vars(self).items() if isinstance(value, dict)}
        return replace(self, **changes)

    # -- what follows from the lists ------------------------------------------------------------------------------

    def clock(self, broker: str | None) -> int:
        return self.clocks.get(broker or "", 0)

    def interval_s(self) -> int:
        return self.genesis.interval_s

    def is_interval(self, start_s: int, end_s: int) -> bool:
        return start_s % self.interval_s() == 0 and end_s == start_s + self.interval_s()

    def is_broker(self, name: str) -> bool:
        return self.roles.get(name) is Role.BROKER

    def device(self, name: str) -> Any:
        """The Admission of a device."""
        return self.admissions[name]

    def _owner(self, device: str) -> str:
        return str(self.device(device).owner)

    def most_wh(self, device: str) -> int:
        """What a device can make in an interval, with 10 % on top."""
        return int(self.device(device).capacity_w) * self.interval_s() * 11 // (3_600 * 10)

    def mandated(self, device: str, start_s: int) -> str | None:
        """The broker that is responsible for what the device made in that interval."""
        for span in self.spans.get(device, ()):
            if span.covers(start_s):
                return span.broker
        return None

    def late(self, device: str, start_s: int) -> bool:
        """True once the responsible broker's correction deadline for that interval has passed."""
        return self.after_deadline(self.mandated(device, start_s), start_s)

    def after_deadline(self, broker: str | None, start_s: int) -> bool:
        return self.clock(broker) >= start_s + self.interval_s() + self.genesis.correction_deadline_s

    def expired_to(self, broker: str) -> int:
        """Up to which start of an interval the broker's and its providers' assets are past use."""
        return self.clock(broker) - self.interval_s() - EXPIRY_DAYS * DAY_S - self.genesis.correction_deadline_s

    def all_wh(self) -> Iterator[tuple[str, int, int, Wh]]:
        """(device, start_s, number, Wh) of everything ever issued."""
        for (device, start_s), wh in self.wh.items():
            for number, one in enumerate(wh):
                yield device, start_s, number, one

    def delivered(self) -> Counter[tuple[int, bytes]]:
        """What each demand has got and still has."""
        return Counter(
            (one.demand_start_s, one.pseudonym) for wh in self.wh.values() for one in wh if one.where == "delivered"
        )

    def net(self, device: str, start_s: int) -> int:
        return sum(one.where != "withdrawn" for one in self.wh.get((device, start_s), ()))

    def held_slices(self, device: str, start_s: int, revision: int) -> int:
        """Into how many neighbouring pieces of one owner each the held Wh of an asset fall."""
        pieces, before = 0, None
        for one in self.wh[device, start_s]:
            owner = one.owner if one.revision == revision and one.where == "held" else None
            pieces += owner is not None and owner != before
            before = owner
        return pieces

    def too_shredded(self, device: str, start_s: int, revision: int) -> bool:
        return self.held_slices(device, start_s, revision) > self.limits.held_slices

    # -- keys -----------------------------------------------------------------------------------------------------

    def registrar(self, signed: Signed) -> str | None:
        """The registrar that signed this, if one did."""
        for named in self.genesis.registrars:
            if named.key == signed.key.public.cose_key and named.name == signed.sender:
                return named.name
        return None

    def holder(self, key: PrivateKey, kind: MessageType) -> Key | None:
        found = self.keys.get(key.public.key_id)
        return found if found is not None and found.kind is kind and not found.revoked else None

    def unsigned(self, signed: Signed, kind: MessageType, start_s: int, clock_of: str | None = None) -> Iterator[str]:
        """The faults of a signature under a statement about the interval at `start_s`.

        `clock_of` names the broker whose clock ends the grace of a meter's old key; a party's ends by its own.
        """
        key = self.holder(signed.key, kind)
        if key is None or key.name != signed.sender:
            yield "statement"
            return
        if key.from_s is not None:
            assert key.grace_until_s is not None
            judge = clock_of if kind is MessageType.ADMISSION else key.name
            if start_s >= key.from_s or self.clock(judge) >= key.grace_until_s:
                yield "key_retired"

    # -- batches --------------------------------------------------------------------------------------------------

    def judge(self, batch: SaidBatch) -> Refusal | None:
        """Apply a batch whole, or say why not and leave everything as it was."""
        after = self.copy()
        refusal = after._apply(batch)
        if refusal is None:
            vars(self).update(vars(after))
        return refusal

    def _apply(self, batch: SaidBatch) -> Refusal | None:
        faults = set(self._sender_faults(batch))
        if batch.not_after_s <= self.clock(batch.sender):
            faults.add("expired")
        if batch in self.applied:
            faults.add("already_applied")
        refusal = {(None, fault) for fault in faults}
        for index, operation in enumerate(batch.operations):
            found = set(self._do(operation, batch.sender))
            self._note_keepers()
            if index == 0 and _registers(operation):
                # Such a batch may introduce its sender, so the sender can also be judged after the registration.
                found |= faults
            elif faults:
                break
            refusal |= {(index, fault) for fault in found}
            if found:
                break
        self.applied |= {batch}
        return frozenset(refusal) or None

    def _sender_faults(self, batch: SaidBatch) -> Iterator[str]:
        """None if the sender's key serves, or if the batch begins with its registration."""
        key = self.keys.get(batch.key.public.key_id)
        if key is not None and key.kind is MessageType.REGISTRATION and not key.revoked:
            if key.name != batch.sender:
                yield "unsigned"
            # What is under way at a rotation still arrives. Without a market clock that time would never end.
            elif key.grace_until_s is not None and (
                not self.is_broker(key.name) or self.clock(key.name) >= key.grace_until_s
            ):
                yield "key_retired"
            return
        first = batch.operations[0]
        said: Any = first.signed.message if isinstance(first, Say) and first.code == "register" else None
        if (
            said is None
            or said.TYPE is not MessageType.REGISTRATION
            or self.registrar(first.signed) is None
            or said.key != batch.key.public.cose_key
            or said.party != batch.sender
        ):
            yield "unsigned"
        elif key is not None:
            yield "not_registered"

    def _do(self, operation: Said, by: str) -> Iterator[str]:
        """Carry one operation out, or yield its faults; after a fault this model is thrown away."""
        if isinstance(operation, Say):
            yield from self._say(operation.code, operation.signed)
        elif isinstance(operation, SayTogether):
            yield from self._set_validator(operation.signed)
        elif isinstance(operation, Move):
            yield from self._transfer(operation, by)
        elif isinstance(operation, Deliver):
            yield from self._deliver(operation, by)
        elif isinstance(operation, Close):
            yield from self._close(operation, by)
        elif isinstance(operation, Void):
            yield from self._void(operation, by)
        else:
            yield from self._correct_demand(operation, by)

    def _say(self, code: str, signed: Signed) -> Iterator[str]:
        said: Any = signed.message
        kind, rule = {
            "register": (MessageType.REGISTRATION, self._register),
            "admit": (MessageType.ADMISSION, self._admit),
            "mandate": (MessageType.MANDATE, self._mandate),
            "end_mandate": (MessageType.END_OF_MANDATE, self._end_mandate),
            "issue": (MessageType.READING, self._issue),
            "correct": (MessageType.READING, self._correct),
            "rotate_key": (MessageType.KEY_ROTATION, self._rotate),
            "revoke_key": (MessageType.KEY_REVOCATION, self._revoke),
        }[code]
        if said.TYPE is not kind:
            yield "statement"
            return
        yield from rule(signed, said)

    # -- parties, devices, mandates -------------------------------------------------------------------------------

    def _register(self, signed: Signed, said: Any) -> Iterator[str]:
        if self.registrar(signed) is None:
            yield "statement"
        theirs = self._was_key_of(MessageType.REGISTRATION, said.party, said.key)
        if theirs and self.roles[said.party] == said.role:
            return
        if said.party in {named.name for named in self.genesis.registrars}:
            yield "registrar_as_party"
        if said.key in {named.key for named in self.genesis.registrars}:
            yield "registrar_as_party"
        if said.party in self.roles:
            yield "name_taken"
        yield from self._new_key(MessageType.REGISTRATION, said.party, said.key)
        self.roles[said.party] = said.role

    def _was_key_of(self, kind: MessageType, name: str, cose_key: bytes) -> bool:
        return any((key.kind, key.name, key.cose_key) == (kind, name, cose_key) for key in self.keys.values())

    def _new_key(self, kind: MessageType, name: str, cose_key: bytes) -> Iterator[str]:
        key_id = public_key_from_cose(cose_key).key_id
        if key_id in self.keys:
            yield "key_taken"
        self.keys[key_id] = Key(kind, name, cose_key)
        self.current[kind, name] = cose_key

    def _admit(self, signed: Signed, said: Any) -> Iterator[str]:
        if self.registrar(signed) is None:
            yield "statement"
        known: Any = self.admissions.get(said.device)
        theirs = self._was_key_of(MessageType.ADMISSION, said.device, said.meter_key)
        if theirs and replace(known, meter_key=said.meter_key) == said:
            return
        if said.device in self.admissions:
            yield "device_taken"
        if said.owner not in self.roles:
            yield "unknown_owner"
        if said.area not in self.genesis.areas:
            yield "unknown_area"
        yield from self._new_key(MessageType.ADMISSION, said.device, said.meter_key)
        self.admissions[said.device] = said

    def _mandate(self, signed: Signed, said: Any) -> Iterator[str]:
        signature = set(self.unsigned(signed, MessageType.REGISTRATION, said.from_s))
        yield from signature - {"key_retired"}
        if said.device not in self.admissions:
            yield "unknown_device"
            yield "not_the_owner"
            return
        if said.owner != self.device(said.device).owner or signed.sender != said.owner:
            yield "not_the_owner"
        if not self.is_broker(said.broker):
            yield "mandate_broker"
        if said.from_s % self.interval_s() != 0:
            yield "mandate_boundary"
        spans = self.spans.get(said.device, ())
        if any((span.broker, span.from_s) == (said.broker, said.from_s) for span in spans):
            return
        yield from signature
        # A new mandate is open-ended, so everything before it must have ended by its beginning.
        if any(span.end_s is None or span.end_s > said.from_s for span in spans):
            yield "mandate_exclusive"
        self.spans[said.device] = (*spans, Span(said.broker, said.from_s, None))

    def _end_mandate(self, signed: Signed, said: Any) -> Iterator[str]:
        signature = set(self.unsigned(signed, MessageType.REGISTRATION, said.end_s))
        yield from signature - {"key_retired"}
        if said.device not in self.admissions:
            yield "unknown_device"
            yield "not_the_owner"
            return
        if said.owner != self.device(said.device).owner or signed.sender != said.owner:
            yield "not_the_owner"
        if said.end_s % self.interval_s() != 0:
            yield "mandate_boundary"
        spans = self.spans.get(said.device, ())
        if not spans:
            yield "no_mandate"
            return
        last = spans[-1]
        if any(span.end_s == said.end_s for span in spans):
            return
        yield from signature
        if last.end_s is not None:
            yield "mandate_ended"
        if said.end_s <= last.from_s:
            yield "no_mandate"
        if said.end_s < self.clock(last.broker):
            yield "mandate_past"
        self.spans[said.device] = (*spans[:-1], last._replace(end_s=said.end_s))

    # -- readings -------------------------------------------------------------------------------------------------

    def _reading(self, signed: Signed, said: Any) -> Iterator[str]:
        """What every reading must be, first or corrected."""
        mandated = self.mandated(said.meter, said.start_s)
        yield from self.unsigned(signed, MessageType.ADMISSION, said.start_s, mandated)
        if said.meter != signed.sender:
            yield "unknown_device"
        if said.meter not in self.admissions:
            yield "unknown_device"
            return
        if said.carrier is not Carrier.ELECTRICITY:
            yield "carrier"
        if not self.is_interval(said.start_s, said.end_s):
            yield "reading_interval"
        if said.quality is Quality.MISSING:
            yield "quality"
        if said.energy_wh > self.most_wh(said.meter):
            yield "above_capacity"
        if said.start_s < self.device(said.meter).commissioned_s:
            yield "not_commissioned"

    def _issue(self, signed: Signed, said: Any) -> Iterator[str]:
        yield from self._reading(signed, said)
        if said.meter not in self.admissions:
            return
        device, start_s, energy_wh = said.meter, said.start_s, said.energy_wh
        if said.revision != 0:
            yield "revision"
        if (device, start_s) in self.metered:
            yield "issued_before"
        carry = self.carry.get(device, 0)
        late = self.late(device, start_s)
        if energy_wh == 0 and (carry <= 0 or late):
            yield "nothing_to_issue"
        if late:
            net = 0
            self.carry[device] = carry + energy_wh
        else:
            wanted = energy_wh + carry
            net = min(max(wanted, 0), self.most_wh(device))
            self.carry[device] = wanted - net
        self.metered[device, start_s] = Metered(0, energy_wh)
        owner = self.device(device).owner
        if net:
            self.wh[device, start_s] = tuple(Wh(0, "held", owner) for _ in range(net))

    def _correct(self, signed: Signed, said: Any) -> Iterator[str]:
        yield from self._reading(signed, said)
        if said.meter not in self.admissions:
            return
        device, start_s = said.meter, said.start_s
        last = self.metered.get((device, start_s), Metered(0, 0))
        if said.revision != last.revision + 1:
            yield "correction_revision"
        if said.revision > self.limits.revision:
            yield "too_many_revisions"
        difference = said.energy_wh - last.energy_wh
        self.metered[device, start_s] = Metered(said.revision, said.energy_wh)
        carry = self.carry.get(device, 0)
        if self.late(device, start_s):
            self.carry[device] = carry + difference
            return
        net = self.net(device, start_s)
        wanted = net + difference
        target = min(max(wanted, 0), self.most_wh(device))
        wh = list(self.wh.get((device, start_s), ()))
        owner = self.device(device).owner
        if target > net:
            wh += [Wh(said.revision, "held", owner) for _ in range(target - net)]
        else:
            self._withdraw(device, start_s, wh, net - target)
        if wh:
            self.wh[device, start_s] = tuple(wh)
        self.carry[device] = carry + wanted - self.net(device, start_s)

    def _withdraw(self, device: str, start_s: int, wh: list[Wh], amount: int) -> None:
        """Take back up to `amount`: from the device's owner, then from others, then what was delivered last."""
        owner = self.device(device).owner
        order = []
        for number, one in enumerate(wh):
            if one.where == "held":
                order.append((0 if one.owner == owner else 1, -one.revision, 0, -number))
            elif one.where == "delivered":
                order.append((2, -one.revision, -one.delivery, -number))
        for *_, minus_number in sorted(order)[:amount]:
            number = -minus_number
            wh[number] = Wh(wh[number].revision, "withdrawn")

    # -- moving ---------------------------------------------------------------------------------------------------

    def _range(self, asset: AssetId, from_wh: int, to_wh: int, owner: str, by: str) -> Iterator[str]:
        """The faults of a range that `owner` must hold whole."""
        wh = self.wh.get((asset.device, asset.start_s), ())
        if not any(one.revision == asset.revision for one in wh):
            yield "unknown_asset"
            return
        if asset.start_s <= self.expired_to(by):
            yield "asset_expired"
        if from_wh >= to_wh:
            yield "empty_slice"
        # What lies outside the asset is held by nobody; the loop stops at its end, as the numbers may be huge.
        for number in range(from_wh, min(to_wh, len(wh) + 1)):
            if number >= len(wh) or wh[number][:3] != (asset.revision, "held", owner):
                yield "not_held"
                return

    def _put(self, asset: AssetId, from_wh: int, to_wh: int, one: Wh) -> None:
        wh = list(self.wh[asset.device, asset.start_s])
        wh[from_wh:to_wh] = [one] * (to_wh - from_wh)
        self.wh[asset.device, asset.start_s] = tuple(wh)

    def _transfer(self, move: Move, by: str) -> Iterator[str]:
        asset = move.asset
        faults = list(self._range(asset, move.from_wh, move.to_wh, move.sender, by))
        yield from faults
        if move.sender == move.receiver:
            yield "to_itself"
        if move.receiver not in self.roles:
            yield "unknown_receiver"
        under_mandate = by != move.sender
        if under_mandate:
            device = self.admissions.get(asset.device)
            if self.mandated(asset.device, asset.start_s) != by or device is None or device.owner != move.sender:
                yield "not_mandated"
            if move.receiver != by:
                yield "mandate_takes_only"
        needs_order = not under_mandate and self.is_broker(move.receiver)
        if move.order is None:
            if needs_order:
                yield "order_missing"
        elif not needs_order:
            yield "order_not_needed"
        else:
            yield from self._under_order(move, move.order)
        if faults:
            return
        self._put(asset, move.from_wh, move.to_wh, Wh(asset.revision, "held", move.receiver))
        if self.too_shredded(asset.device, asset.start_s, asset.revision):
            yield "too_many_slices"

    def _under_order(self, move: Move, signed: Signed) -> Iterator[str]:
        said: Any = signed.message
        if said.TYPE is not MessageType.ORDER:
            yield "order_statement"
            return
        for fault in self.unsigned(signed, MessageType.REGISTRATION, said.start_s):
            yield "order_statement" if fault == "statement" else fault
        if signed.sender != said.requester or said.requester != move.receiver:
            yield "order_requester"
        if said.path[-1] != move.sender:
            yield "order_supplier"
        if said.path[-2] != said.requester:
            yield "order_path"
        if len(said.path) > len(frozenset(said.path)):
            yield "order_loop"
        if bool(said.parent) is not (len(said.path) > 2):
            yield "order_parent"
        if not all(self.is_broker(name) for name in said.path[:-1]):
            yield "order_broker"
        device = self.admissions.get(move.asset.device)
        if device is None or said.source != self.device(move.asset.device).source:
            yield "order_source"
        if said.start_s != move.asset.start_s or not self.is_interval(said.start_s, said.end_s):
            yield "order_interval"
        if move.price > said.highest_price:
            yield "order_price"
        if said.not_after_s <= self.clock(said.requester):
            yield "order_expired"
        if (said.requester, said.start_s) in self.closed:
            yield "order_closed"
        seen = self.orders.get((said.requester, said.order_id), OrderSeen(None, 0, False))
        if seen.message is not None and seen.message != said:
            yield "order_content"
        if seen.voided:
            yield "order_void"
        used_wh = seen.used_wh + move.to_wh - move.from_wh
        if used_wh > said.energy_wh:
            yield "order_exceeded"
        self.orders[said.requester, said.order_id] = OrderSeen(said, used_wh, False)

    def _void(self, void: Void, by: str) -> Iterator[str]:
        if not self.is_broker(by):
            yield "not_a_broker"
        seen = self.orders.get((by, void.order_id), OrderSeen(None, 0, False))
        self.orders[by, void.order_id] = seen._replace(voided=True)

    # -- demands --------------------------------------------------------------------------------------------------

    def _deliver(self, deliver: Deliver, by: str) -> Iterator[str]:
        if not self.is_broker(by):
            yield "not_a_broker"
        if not self.is_interval(deliver.start_s, deliver.end_s):
            yield "demand_interval"
        if deliver.area not in self.genesis.areas:
            yield "demand_area"
        at = (deliver.start_s, deliver.pseudonym)
        seen = self.demands.setdefault(at, DemandSeen(by, 0, deliver.demanded_wh, deliver.commitment))
        if seen.broker != by:
            yield "demand_broker"
        if (seen.demanded_wh, seen.commitment) != (deliver.demanded_wh, deliver.commitment):
            yield "demand_changed"
        amount = sum(part.to_wh - part.from_wh for part in deliver.slices)
        if self.delivered()[at] + amount > seen.demanded_wh:
            yield "demand_exceeded"
        for part in deliver.slices:
            asset = part.asset
            faults = list(self._range(asset, part.from_wh, part.to_wh, by, by))
            yield from faults
            if not self._in_window(deliver, asset.start_s):
                yield "outside_window"
            if asset.device in self.admissions and self.device(asset.device).area != deliver.area:
                yield "outside_area"
            if faults:
                return
            revision = (asset.device, asset.start_s, asset.revision)
            number = self.deliveries.get(revision, 0)
            self.deliveries[revision] = number + 1
            given = Wh(asset.revision, "delivered", "", number, by, deliver.pseudonym, deliver.start_s, part.line)
            self._put(asset, part.from_wh, part.to_wh, given)
            if self.too_shredded(*revision):
                yield "too_many_slices"

    def _in_window(self, deliver: Deliver, start_s: int) -> bool:
        if deliver.window is Window.INTERVAL:
            return start_s == deliver.start_s
        if deliver.window is Window.DAY:
            return start_s // DAY_S == deliver.start_s // DAY_S
        return _month(start_s) == _month(deliver.start_s)

    def _correct_demand(self, correction: DemandCorrection, by: str) -> Iterator[str]:
        if not self.is_broker(by):
            yield "not_a_broker"
        at = (correction.start_s, correction.pseudonym)
        seen = self.demands.get(at)
        if seen is None:
            yield "unknown_demand"
            return
        if seen.broker != by:
            yield "demand_broker"
        if correction.revision != seen.revision + 1:
            yield "demand_revision"
        if self.after_deadline(by, correction.start_s):
            yield "demand_settled"
        excess = max(0, self.delivered()[at] - correction.demanded_wh)
        if sum(part.to_wh - part.from_wh for part in correction.returned) != excess:
            yield "returned_amount"
        for part in correction.returned:
            asset, revision = part.asset, (part.asset.device, part.asset.start_s, part.asset.revision)
            faults = list(self._tail(part, at))
            yield from faults
            if faults:
                return
            self._put(asset, part.from_wh, part.to_wh, Wh(asset.revision, "held", by))
            if self.held_slices(*revision) > self.limits.returned_slices:
                yield "too_many_returned"
        closed = self.closed.get((by, correction.start_s))
        if closed is not None:
            lowered_wh = closed.lowered_wh + max(0, seen.demanded_wh - correction.demanded_wh)
            self.closed[by, correction.start_s] = closed._replace(lowered_wh=lowered_wh)
        self.demands[at] = DemandSeen(seen.broker, correction.revision, correction.demanded_wh, correction.commitment)

    def _tail(self, part: Returned, at: tuple[int, bytes]) -> Iterator[str]:
        """The faults of a returned range, which must be the end of one delivered slice of that demand."""
        if part.from_wh >= part.to_wh:
            yield "empty_slice"
        wh = self.wh.get((part.asset.device, part.asset.start_s), ())
        if part.slice_from_wh >= len(wh) or wh[part.slice_from_wh].revision != part.asset.revision:
            yield "returned_slice"
            return
        first = wh[part.slice_from_wh]
        same = [number for number, one in enumerate(wh) if one == first]
        if first.where != "delivered" or (first.demand_start_s, first.pseudonym) != at:
            yield "returned_slice"
        if part.slice_from_wh != same[0] or part.to_wh != same[-1] + 1 or part.from_wh < part.slice_from_wh:
            yield "returned_slice"

    # -- closes ---------------------------------------------------------------------------------------------------

    def _close(self, close: Close, by: str) -> Iterator[str]:
        if not self.is_broker(by):
            yield "not_a_broker"
        if not self.is_interval(close.start_s, close.end_s):
            yield "close_interval"
        seen = self.closed.get((by, close.start_s))
        if close.revision != (0 if seen is None else seen.revision + 1):
            yield "close_revision"
        if seen is None:
            if close.start_s < self.clock(by):
                yield "close_order"
            self.clocks[by] = close.end_s
            self._expire(by)
        elif close.demands < seen.demands or close.demanded_wh < seen.demanded_wh - seen.lowered_wh:
            yield "close_lowered"
        self.closed[by, close.start_s] = ClosedSeen(close.revision, close.demands, close.demanded_wh, close.root, 0)

    def _expire(self, broker: str) -> None:
        """Whatever the broker, or an owner whose device is mandated to it, has held for too long is worth nothing."""
        oldest_s = self.expired_to(broker)
        due: set[tuple[int, str, int]] = set()
        for device, made_s, _, one in self.all_wh():
            if made_s <= oldest_s and self._expires_for(broker, device, made_s, one):
                due.add((made_s, device, one.revision))
        for made_s, device, revision in sorted(due)[: self.limits.expired_assets]:
            self.wh[device, made_s] = tuple(
                Wh(revision, "expired")
                if one.revision == revision and self._expires_for(broker, device, made_s, one)
                else one
                for one in self.wh[device, made_s]
            )

    def _expires_for(self, broker: str, device: str, made_s: int, one: Wh) -> bool:
        if one.where != "held":
            return False
        kept = one.owner == self._owner(device) and self.keepers.get((device, made_s, one.revision)) == broker
        return one.owner == broker or kept

    def _note_keepers(self) -> None:
        """Remember who was mandated when a provider came to hold something of what its own device made."""
        before, self.keepers = self.keepers, {}
        for (device, start_s), wh in self.wh.items():
            owner = self._owner(device)
            for revision in {one.revision for one in wh if one.where == "held" and one.owner == owner}:
                asset = (device, start_s, revision)
                keeper = None if self.is_broker(owner) else self.mandated(device, start_s)
                self.keepers[asset] = before.get(asset, keeper)

    # -- keys and validators --------------------------------------------------------------------------------------

    def _rotate(self, signed: Signed, said: Any) -> Iterator[str]:
        kind = self._kind(said)
        old = self.current.get((kind, said.name))
        if old is None:
            yield from ("rotation_holder", "rotation_of_old_key")
            return
        new_id = public_key_from_cose(said.new_key).key_id
        before = self.keys.get(said.old_key_id)
        if before is not None and (before.kind, before.name, before.from_s, before.grace_until_s) == (
            kind,
            said.name,
            said.from_s,
            said.grace_until_s,
        ):
            follows = self.keys.get(new_id)
            if follows is not None and (follows.kind, follows.name) == (kind, said.name):
                return  # said twice
        old_key = public_key_from_cose(old)
        current = self.keys[old_key.key_id]
        by_itself = signed.key.public.key_id == old_key.key_id and signed.sender == said.name and not current.revoked
        if self.registrar(signed) is None and not by_itself:
            yield from ("rotation_signer", "statement")
        if said.old_key_id != old_key.key_id:
            yield "rotation_of_old_key"
        if said.from_s % self.interval_s() != 0:
            yield "rotation_times"
        if said.grace_until_s < said.from_s:
            yield "rotation_times"
        if said.new_key in {named.key for named in self.genesis.registrars}:
            yield "key_taken"
        self.keys[old_key.key_id] = current._replace(from_s=said.from_s, grace_until_s=said.grace_until_s)
        yield from self._new_key(kind, said.name, said.new_key)

    def _kind(self, said: Any) -> MessageType:
        return MessageType.ADMISSION if said.holder == 1 else MessageType.REGISTRATION

    def _revoke(self, signed: Signed, said: Any) -> Iterator[str]:
        kind = self._kind(said)
        key = self.keys.get(said.key_id)
        if key is None or (key.kind, key.name) != (kind, said.name):
            yield "revocation_key"
            return
        current_id = public_key_from_cose(self.current[kind, said.name]).key_id
        signed_with = signed.key.public.key_id
        by_current = signed_with == current_id and not self.keys[current_id].revoked
        by_holder = signed.sender == said.name and (signed_with == said.key_id or by_current)
        if self.registrar(signed) is None and not by_holder:
            yield from ("revocation_signer", "statement")
        self.keys[said.key_id] = key._replace(revoked=True)

    def _set_validator(self, together: tuple[Signed, ...]) -> Iterator[str]:
        registrars = [self.registrar(signed) for signed in together]
        first: Any = together[0].message
        if None in registrars or any(signed.message.TYPE is not MessageType.VALIDATOR_CHANGE for signed in together):
            yield from ("validator_statements", "statement")
            return
        if any(signed.message != first for signed in together):
            yield "validator_statements"
        if 2 * len(set(registrars)) <= len(self.genesis.registrars):
            yield "validator_majority"
        if first.sequence != self.validator_changes + 1:
            yield "validator_sequence"
        before = self.validators.get(first.name)
        others = {name: each for name, each in self.validators.items() if name != first.name}
        if first.power and first.key in [each.cose_key for each in others.values()]:
            yield "validator_key_taken"
        if not first.power and before is None:
            yield "unknown_validator"
        if not first.power and not others:
            yield "last_validator"
        if first.power and len(others) >= MAX_VALIDATORS:
            yield "too_many_validators"
        total = sum(each.power for each in self.validators.values())
        if before is None or before.cose_key == first.key:
            moved = abs(first.power - (0 if before is None else before.power))
        else:
            moved = max(first.power, before.power)  # another key is another voter
        if len(self.validators) > 3 and 3 * moved >= total:
            yield "validator_third"
        self.validator_changes += 1
        self.validators = dict(others)
        if first.power:
            self.validators[first.name] = Validator(first.key, first.power)


def _registers(operation: Said) -> bool:
    return isinstance(operation, Say) and operation.code == "register"


def _month(time_s: int) -> tuple[int, int]:
    """(year, month) in UTC; the calendar repeats every 400 years, which takes it beyond the year 9999."""
    cycle, rest_s = divmod(time_s, 146_097 * DAY_S)
    moment = datetime.fromtimestamp(rest_s, UTC)
    return 400 * cycle + moment.year, moment.month
