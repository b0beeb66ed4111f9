"""A ledger of any size around one consumer, for certificates: their operations are real, all others are not there.

A proof of scattered leaves asks only for hashes of subtrees in which none of them is. Here such a hash is made from the
borders of its subtree, so a tree of billions of operations costs nothing, and its root is what a verifier finds.
"""

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from broker.certificates.build import Found, build_certificate
from broker.certificates.codes import DEFAULT_FACTORS, DEFAULT_FACTORS_SOURCE
from broker.certificates.document import Certificate, Factor, seal_certificate
from broker.ledger.chain import genesis_hash
from broker.ledger.merkle import leaf_hash, multiproof, root_from_multiproof, root_of
from broker.ledger.operations import (
    AssetId,
    Close,
    Deliver,
    DeliveredSlice,
    Operation,
    Window,
    encode_operation,
)
from broker.ledger.proofs import ProvenOperation
from broker.ledger.receipts import SignedHead, sign_head
from broker.ledger.trust import Trust, issuer_of, read_trust, trust_of
from broker.protocol.messages import Carrier, Checkpoint, Demand, Genesis, Quality
from broker.protocol.sources import Source
from broker.service.pseudonyms import commitment, day_key, day_of, interval_key, pseudonym
from support.ledger_world import INTERVAL_S, LEDGER, T0, admit, genesis, issue, key, register, seal

SECRET: Final = b"s" * 32
METER: Final = "house"
BROKER: Final = "b1"
HEIGHT: Final = 1_000
FACTORS: Final = tuple(Factor(int(number), mg) for number, mg in sorted(DEFAULT_FACTORS.items()))


def trust_in(founded: Genesis) -> Trust:
    """The trust file of a ledger of the test world, read."""
    return read_trust(json.dumps(trust_of(founded)))


def key_of(start_s: int, secret: bytes = SECRET) -> bytes:
    """k_interval of the consumer."""
    return interval_key(day_key(secret, day_of(start_s)), start_s)


def name_of(start_s: int, secret: bytes = SECRET, meter: str = METER) -> bytes:
    """The consumer's pseudonym in an interval."""
    return pseudonym(key_of(start_s, secret), key(meter).public.key_id)


def demand_of(start_s: int, energy_wh: int, revision: int = 0, meter: str = METER) -> bytes:
    """The meter's sealed demand."""
    message = Demand(meter, start_s, start_s + INTERVAL_S, revision, energy_wh, Quality.MEASURED, Carrier.ELECTRICITY)
    return seal(message, meter)


@dataclass
class CertificateWorld:
    """Operations of one consumer at their places in a tree of `size`; `certificate` is made from what was put there."""

    size: int = 10_000
    founded: Genesis = field(default_factory=genesis)
    statements: list[ProvenOperation] = field(default_factory=list)
    readings: list[ProvenOperation] = field(default_factory=list)
    deliveries: list[ProvenOperation] = field(default_factory=list)
    demands: dict[int, list[bytes]] = field(default_factory=dict)
    close: ProvenOperation | None = None
    close_leaves: list[bytes] = field(default_factory=list)
    ends: dict[tuple[AssetId, int], int] = field(default_factory=dict)
    settled_s: int = T0 + INTERVAL_S

    @property
    def trust(self) -> Trust:
        return trust_in(self.founded)

    def state(self, leaf: int, operation: Operation) -> None:
        """A statement of a registrar, or a rotation of a key, stands at this place."""
        self.statements.append(ProvenOperation(leaf, encode_operation(operation)))

    def read(self, leaf: int, operation: Operation) -> None:
        """An Issue or Correct stands at this place."""
        self.readings.append(ProvenOperation(leaf, encode_operation(operation)))

    def demand(self, start_s: int, energy_wh: int, revision: int = 0) -> bytes:
        """The consumer's meter demands. Returns the commitment."""
        raw = demand_of(start_s, energy_wh, revision)
        self.demands.setdefault(start_s, []).append(raw)
        return commitment(key_of(start_s), raw)

    def deliver(
        self,
        leaf: int,
        start_s: int,
        demanded_wh: int,
        committed: bytes,
        *slices: tuple[AssetId, int, int],
        window: Window = Window.INTERVAL,
        area: str = "north",
        meter: str = METER,
    ) -> None:
        """A Deliver to the consumer, or to that with another meter, stands at this place."""
        items = tuple(DeliveredSlice(asset, low, high, 0) for asset, low, high in slices)
        self.ends |= {(asset, low): high for asset, low, high in slices}
        operation = Deliver(
            name_of(start_s, meter=meter), start_s, start_s + INTERVAL_S, window, area, demanded_wh, committed, items
        )
        self.deliveries.append(ProvenOperation(leaf, encode_operation(operation)))

    def closes(self, leaf: int, start_s: int, demanded_wh: int, committed: bytes, others: int = 4) -> None:
        """The broker's Close of an interval with this demand and those of others stands at this place."""
        self.close_leaves = [leaf_hash(b"another" + bytes([number])) for number in range(others)]
        self.close_leaves.insert(others // 2, leaf_hash(name_of(start_s) + committed))
        close = Close(start_s, start_s + INTERVAL_S, 0, others + 1, demanded_wh + others, root_of(self.close_leaves))
        self.close = ProvenOperation(leaf, encode_operation(close))

    def hash_of(self, low: int, high: int) -> bytes:
        """Of a subtree without any operation of ours."""
        return sha256(b"others" + low.to_bytes(8, "big") + high.to_bytes(8, "big")).digest()

    def signed_head(self) -> SignedHead:
        """The head of the tree that has all these operations, signed by its validator."""
        assert self.close is not None
        proven = [*self.statements, *self.readings, *self.deliveries, self.close]
        leaves = [(leaf, leaf_hash(raw)) for leaf, raw in sorted(proven)]
        hashes = multiproof([leaf for leaf, _ in leaves], self.size, self.hash_of)
        root = root_from_multiproof(leaves, self.size, hashes)
        assert root is not None
        head = Checkpoint(HEIGHT, b"b" * 32, self.size, root, b"h" * 32)
        issuer = issuer_of(self.founded.ledger, genesis_hash(self.founded))
        return sign_head(head, key("node"), LEDGER, "node", issuer)

    def certificate(self, from_s: int = T0, to_s: int = T0 + INTERVAL_S) -> Certificate:
        """The true certificate of the consumer."""
        assert self.close is not None
        found = Found(
            self.founded,
            BROKER,
            METER,
            key(METER).public,
            SECRET,
            from_s,
            to_s,
            self.signed_head(),
            self.settled_s,
            self.statements,
            self.readings,
            self.deliveries,
            self.demands,
            self.close,
            self.close_leaves,
            lambda asset, from_wh, _: self.ends.get((asset, from_wh)),
            lambda indices: multiproof(indices, self.size, self.hash_of),
        )
        return build_certificate(found, to_s, FACTORS, DEFAULT_FACTORS_SOURCE)

    def seal(self, certificate: Certificate, by: str = BROKER) -> bytes:
        """The certificate as the broker, or another key, signs it."""
        return seal_certificate(certificate, key(by), self.founded.ledger)


def one_interval() -> CertificateWorld:
    """300 Wh of demand, 200 Wh of them from a solar and 60 Wh from a wind device, the rest unmatched."""
    world = CertificateWorld()
    solar, wind = (AssetId(name, Carrier.ELECTRICITY, T0, 0) for name in ("solar-1", "wind-1"))
    world.state(0, register(BROKER))
    world.state(1, admit("solar-1"))
    world.state(2, admit("wind-1", source=Source.WIND))
    world.read(100, issue("solar-1", 900))
    world.read(101, issue("wind-1", 500))
    committed = world.demand(T0, 300)
    world.deliver(500, T0, 300, committed, (solar, 100, 300), (wind, 0, 60))
    world.closes(9_000, T0, 300, committed)
    return world
