"""A small ledger world for tests: a registrar, brokers, providers, devices with keys, and batches made in a line.

Keys come from names, so every run signs the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519

from broker.ledger.chain import Step, first_head
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.opening import Charter, OpenedBatch, charter_of, open_batch
from broker.ledger.operations import (
    Admit,
    AssetId,
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    DeliveredSlice,
    EndMandate,
    Issue,
    MandateOp,
    Operation,
    Register,
    ReturnedSlice,
    RevokeKey,
    RotateKey,
    SetValidator,
    Transfer,
    Window,
    encode_operation,
)
from broker.ledger.state import Key, Overlay
from broker.protocol import envelope, keys
from broker.protocol.keys import PrivateKey
from broker.protocol.messages import (
    Admission,
    Batch,
    Carrier,
    EndOfMandate,
    Genesis,
    KeyHolder,
    KeyRevocation,
    KeyRotation,
    Mandate,
    Message,
    NamedKey,
    Order,
    Quality,
    Reading,
    Registration,
    Role,
    ValidatorChange,
)
from broker.protocol.sources import Source

LEDGER = "test-ledger"
INTERVAL_S = 1_800
T0 = 1_700_000_000 - 1_700_000_000 % 86_400  # a UTC midnight, 2023-11-14
CAPACITY_W = 4_000
COMMITMENT = b"c" * 32
ROOT = b"r" * 32


@cache
def key(name: str) -> PrivateKey:
    """The Ed25519 key of that name."""
    return keys._private(ed25519.Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()))


def genesis(**changes: Any) -> Genesis:
    values: dict[str, Any] = {
        "ledger": LEDGER,
        "interval_s": INTERVAL_S,
        "gate_1_s": 300,
        "gate_2_s": 600,
        "correction_deadline_s": 86_400 * 30,
        "currency": "EUR",
        "areas": ("north", "south"),
        "registrars": (NamedKey("registrar", key("registrar").public.cose_key),),
        "validators": (NamedKey("node", key("node").public.cose_key),),
        "simulated": True,
    }
    return Genesis(**(values | changes))


GENESIS = genesis()
CHARTER: Charter = charter_of(GENESIS)


def seal(message: Message, sender: str, ledger: str = LEDGER, with_key: str | None = None) -> bytes:
    return envelope.seal(message, key(with_key or sender), ledger, sender)


def register(party: str, role: Role = Role.BROKER, by: str = "registrar", party_key: str | None = None) -> Register:
    return Register(seal(Registration(party, role, key(party_key or party).public.cose_key), by))


def admit(
    device: str,
    owner: str = "alice",
    source: Source = Source.SOLAR,
    area: str = "north",
    capacity_w: int = CAPACITY_W,
    by: str = "registrar",
    meter_key: str | None = None,
    commissioned_s: int = 0,
) -> Admit:
    meter = key(meter_key or device).public.cose_key
    place = "a roof"
    said = Admission(device, owner, meter, source, Carrier.ELECTRICITY, capacity_w, area, place, commissioned_s)
    return Admit(seal(said, by))


def mandate(
    device: str, owner: str = "alice", broker: str = "b1", from_s: int = T0, by: str | None = None
) -> MandateOp:
    return MandateOp(seal(Mandate(device, owner, broker, from_s), by or owner))


def end_mandate(device: str, end_s: int, owner: str = "alice", by: str | None = None) -> EndMandate:
    return EndMandate(seal(EndOfMandate(device, owner, end_s), by or owner))


def reading(device: str, energy_wh: int, start_s: int = T0, **changes: Any) -> Reading:
    values = {
        "meter": device,
        "start_s": start_s,
        "end_s": start_s + INTERVAL_S,
        "revision": 0,
        "energy_wh": energy_wh,
        "quality": Quality.MEASURED,
        "carrier": Carrier.ELECTRICITY,
    }
    return Reading(**(values | changes))


def issue(device: str, energy_wh: int, start_s: int = T0, by: str | None = None, **changes: Any) -> Issue:
    return Issue(seal(reading(device, energy_wh, start_s, **changes), by or device))


def correct(
    device: str, energy_wh: int, revision: int = 1, start_s: int = T0, with_key: str | None = None, **changes: Any
) -> Correct:
    said = reading(device, energy_wh, start_s, revision=revision, **changes)
    return Correct(seal(said, device, with_key=with_key))


def asset(device: str, start_s: int = T0, revision: int = 0) -> AssetId:
    return AssetId(device, Carrier.ELECTRICITY, start_s, revision)


def take(
    device: str, from_wh: int, to_wh: int, owner: str = "alice", broker: str = "b1", start_s: int = T0
) -> Transfer:
    """The mandated broker takes ownership."""
    return Transfer(asset(device, start_s), from_wh, to_wh, owner, broker, 100, None)


def order(**changes: Any) -> Order:
    """b2 asks b1 for solar of the first interval."""
    values: dict[str, Any] = {
        "order_id": b"o" * 16,
        "requester": "b2",
        "source": Source.SOLAR,
        "start_s": T0,
        "end_s": T0 + INTERVAL_S,
        "energy_wh": 500,
        "highest_price": 150,
        "not_after_s": T0 + INTERVAL_S + 600,
        "path": ("b2", "b1"),
    }
    return Order(**(values | changes))


def sell(
    device: str, from_wh: int, to_wh: int, sealed_order: bytes | None, receiver: str = "b2", price: int = 120
) -> Transfer:
    return Transfer(asset(device), from_wh, to_wh, "b1", receiver, price, sealed_order)


def pseudonym(number: int) -> bytes:
    return number.to_bytes(16, "big")


def deliver(number: int, demanded_wh: int, *slices: tuple[str, int, int], start_s: int = T0, **changes: Any) -> Deliver:
    """To the consumer with that number, slices as (device, from, to) of the same interval."""
    values: dict[str, Any] = {
        "pseudonym": pseudonym(number),
        "start_s": start_s,
        "end_s": start_s + INTERVAL_S,
        "window": Window.INTERVAL,
        "area": "north",
        "demanded_wh": demanded_wh,
        "commitment": COMMITMENT,
        "slices": tuple(DeliveredSlice(asset(device, start_s), low, high, 0) for device, low, high in slices),
    }
    return Deliver(**(values | changes))


def close(start_s: int = T0, **changes: Any) -> Close:
    values: dict[str, Any] = {
        "start_s": start_s,
        "end_s": start_s + INTERVAL_S,
        "revision": 0,
        "demands": 1,
        "demanded_wh": 100,
        "root": ROOT,
    }
    return Close(**(values | changes))


def correct_demand(
    number: int,
    demanded_wh: int,
    *returned: tuple[str, int, int, int],
    revision: int = 1,
    start_s: int = T0,
    commitment: bytes = COMMITMENT,
) -> CorrectDemand:
    """`returned` as (device, begin of the slice, from, to) of the same interval."""
    slices = tuple(ReturnedSlice(asset(device, start_s), *item) for device, *item in returned)
    return CorrectDemand(pseudonym(number), start_s, revision, demanded_wh, commitment, slices)


def rotate(
    name: str,
    new_key: str,
    old_key: str | None = None,
    by: str | None = None,
    with_key: str | None = None,
    **changes: Any,
) -> RotateKey:
    """The key `old_key` of a party (or a device: `holder`) gives way to `new_key` from the first interval on."""
    values: dict[str, Any] = {
        "holder": KeyHolder.PARTY,
        "name": name,
        "old_key_id": key(old_key or name).public.key_id,
        "new_key": key(new_key).public.cose_key,
        "from_s": T0 + INTERVAL_S,
        "grace_until_s": T0 + 2 * INTERVAL_S,
    }
    return RotateKey(seal(KeyRotation(**(values | changes)), by or name, with_key=with_key or by or old_key or name))


def revoke(
    name: str,
    revoked: str | None = None,
    by: str | None = None,
    with_key: str | None = None,
    holder: KeyHolder = KeyHolder.PARTY,
) -> RevokeKey:
    said = KeyRevocation(holder, name, key(revoked or name).public.key_id)
    return RevokeKey(seal(said, by or name, with_key=with_key or by or revoked or name))


def set_validator(
    name: str, power: int, sequence: int = 1, by: tuple[str, ...] = ("registrar",), validator_key: str | None = None
) -> SetValidator:
    change = ValidatorChange(name, key(validator_key or name).public.cose_key, power, sequence)
    return SetValidator(tuple(seal(change, registrar) for registrar in by))


def batch(*operations: Operation, by: str = "b1", not_after_s: int = T0 + 86_400, with_key: str | None = None) -> bytes:
    """A sealed batch."""
    encoded = tuple(encode_operation(operation) for operation in operations)
    return seal(Batch(not_after_s, encoded), by, with_key=with_key)


SET_UP: tuple[bytes, ...] = (
    batch(
        register("b1"),
        register("alice", Role.PROVIDER),
        register("bob", Role.PROVIDER),
        admit("solar-1"),
        admit("wind-1", source=Source.WIND),
        admit("south-1", owner="bob", area="south"),
        mandate("solar-1"),
        mandate("wind-1"),
        mandate("south-1", owner="bob"),
    ),
    batch(register("b2"), by="b2"),
)
"""b1 and b2 are brokers, each registered by its own first batch; b1 holds mandates for three devices."""


class Nothing:
    """A state without rows."""

    def get(self, key: Key) -> Any:
        return None

    def scan(self, prefix: Key, low: int, high: int) -> Any:
        return iter(())


@dataclass
class World:
    """Rules over a state in memory."""

    step: Step = field(default_factory=lambda: Step(Nothing(), CHARTER, first_head(GENESIS)))
    charter: Charter = CHARTER

    @classmethod
    def founded_on(cls, founded: Genesis) -> "World":
        """An empty ledger with another genesis."""
        charter = charter_of(founded)
        return cls(Step(Nothing(), charter, first_head(founded)), charter)

    @classmethod
    def set_up(cls, founded: Genesis = GENESIS) -> "World":
        world = cls.founded_on(founded)
        for raw in SET_UP:
            world.apply_raw(raw)
        return world

    @property
    def state(self) -> Overlay:
        return self.step.state

    def apply_raw(self, raw: bytes) -> OpenedBatch:
        opened = open_batch(raw, self.step.state, self.charter)
        self.step.apply(opened)
        return opened

    def apply(
        self, *operations: Operation, by: str = "b1", not_after_s: int = T0 + 86_400, with_key: str | None = None
    ) -> OpenedBatch:
        """Apply one batch; raises what the rules raise."""
        return self.apply_raw(batch(*operations, by=by, not_after_s=not_after_s, with_key=with_key))

    def get(self, *key: Any) -> Any:
        return self.step.state.get(key)


def found(path: Path, set_up: bool = True) -> EmbeddedLedger:
    """An embedded ledger in that directory, with the parties of SET_UP."""
    ledger = EmbeddedLedger(path, GENESIS, "node", key("node"))
    if set_up and ledger.height == 0:
        for raw in SET_UP:
            assert ledger.submit(raw) is None
            ledger.commit()
    return ledger


def counting_bytes() -> Callable[[int], bytes]:
    """Request ids that differ, the same in every run."""
    count = 0

    def following(length: int) -> bytes:
        nonlocal count
        count += 1
        return count.to_bytes(length, "big")

    return following
