"""Says the same to the model and to the real rules, and stops where they part.

`Pair` steps both together over a state in memory. `assert_blocks_do_not_matter` gives the bytes of a finished run to an
embedded engine that commits at other moments: however batches fall into blocks, the state hash must be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.ledger_world import T0, Nothing, genesis, key

from broker.ledger import inspect
from broker.ledger.chain import Step, first_head
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.faults import RuleViolation
from broker.ledger.opening import RefusedBatch, charter_of, open_batch
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Admission, Carrier, Mandate, NamedKey, Registration, Role
from model import compare
from model.author import ALL_KEYS, BROKERS, DEVICES, NODES, REGISTRARS, Author, Choices
from model.ledger_model import Limits, Model, Said, SaidBatch, Say, Signed
from model.sealing import sealed_batch

GENESIS = genesis(
    correction_deadline_s=86_400,
    registrars=tuple(NamedKey(name, key(name).public.cose_key) for name in REGISTRARS),
    validators=tuple(NamedKey(name, key(name).public.cose_key) for name in NODES[:4]),
)
LIMITS = Limits(
    held_slices=256,
    expired_assets=4_096,
    withdrawn_slices=1_024,
    searched_deliveries=16_384,
    returned_slices=4_096,
    revision=63,
)


@dataclass
class Pair:
    """The model and the real rules, which have heard the same so far."""

    limits: Limits = LIMITS
    raws: list[bytes] = field(default_factory=list)
    """Every batch that was said, accepted or not."""
    faults: dict[str, int] = field(default_factory=dict)
    """How often the real rules have answered what; "" is acceptance."""

    def __post_init__(self) -> None:
        self.model = Model(GENESIS, self.limits)
        self.charter = charter_of(GENESIS)
        self.step = Step(Nothing(), self.charter, first_head(GENESIS))

    def say(self, batch: SaidBatch) -> bool:
        """True if both accept. Raises AssertionError where they disagree."""
        raw = sealed_batch(batch)
        self.raws.append(raw)
        before = self.step.state_hash
        real = self._real_answer(raw)
        expected = self.model.judge(batch)
        fault = "" if real is None else real[1]
        self.faults[fault] = self.faults.get(fault, 0) + 1
        agreed = real is None if expected is None else real in expected
        assert agreed, f"the rules say {real}, the model says {expected}, of {batch}"
        assert (self.step.state_hash == before) == (real is not None)
        if real is None:
            compare.assert_same(self.step.state.written, self.model)
        return real is None

    def _real_answer(self, raw: bytes) -> tuple[int | None, str] | None:
        try:
            self.step.apply(open_batch(raw, self.step.state, self.charter))
        except RuleViolation as violation:
            return violation.operation_index, str(violation.code)
        except RefusedBatch as refused:
            return refused.violation.operation_index, str(refused.violation.code)
        except ProtocolError:
            return None, "unsigned"
        return None


def found(pair: Pair) -> None:
    """Two brokers, two providers and three devices with mandates, so that a talk soon comes to its point."""
    operations: list[Said] = [registered("b1"), registered("p1"), registered("p2"), registered("b2")]
    for device, broker in (("d1", "b1"), ("d2", "b1"), ("d3", "b2")):
        owner, source, area, capacity_w, commissioned_s = DEVICES[device]
        admission = Admission(
            device,
            owner,
            key(device).public.cose_key,
            source,
            Carrier.ELECTRICITY,
            capacity_w,
            area,
            "a roof",
            commissioned_s,
        )
        operations.append(Say("admit", Signed(admission, key("reg-1"), "reg-1")))
        operations.append(Say("mandate", Signed(Mandate(device, owner, broker, T0), key(owner), owner)))
    assert pair.say(SaidBatch("b1", key("b1"), T0, tuple(operations)))


def registered(party: str) -> Say:
    """A registrar's word that this broker or provider exists."""
    role = Role.BROKER if party in BROKERS else Role.PROVIDER
    return Say("register", Signed(Registration(party, role, key(party).public.cose_key), key("reg-1"), "reg-1"))


def talk(author: Author, pair: Pair, batches: int) -> None:
    """Let the author say so many batches; some find nothing to say."""
    for _ in range(batches):
        batch = author.batch(pair.model)
        if batch is not None:
            pair.say(batch)


def assert_blocks_do_not_matter(raws: Sequence[bytes], state_hash: bytes, choices: Choices, folder: Path) -> None:
    """An embedded ledger that commits now and then ends with the same state hash."""
    ledger = EmbeddedLedger(folder, GENESIS, NODES[0], key(NODES[0]))
    try:
        for raw in raws:
            try:
                ledger.submit(raw)
            except ProtocolError:
                # Keys that wait for their commit are not known yet; whoever sent this sends it again.
                ledger.commit()
                _submit_or_ignore(ledger, raw)
            if choices.number(1, 4) == 1:
                ledger.commit()
                ledger = _with_a_validator(ledger, folder)
        ledger.commit()
        assert ledger.head.state_hash == state_hash
    finally:
        ledger.close()


def _with_a_validator(ledger: EmbeddedLedger, folder: Path) -> EmbeddedLedger:
    """The same ledger, run by one who is a validator now: who has gone may seal no more blocks."""
    keys_of = {row.name: row.cose_key for row in inspect.validators(folder)}
    name = next(name for name, cose_key in keys_of.items() if cose_key in ALL_KEYS)
    ledger.close()
    return EmbeddedLedger(folder, GENESIS, name, ALL_KEYS[keys_of[name]])


def _submit_or_ignore(ledger: EmbeddedLedger, raw: bytes) -> Any:
    try:
        return ledger.submit(raw)
    except ProtocolError:
        return None
