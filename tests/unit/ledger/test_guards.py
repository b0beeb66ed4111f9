"""One case for every guard of the ledger: the smallest batch that only this guard refuses.

Each fault is raised by exactly one guard, so deleting a guard makes its case fail; `test_every_guard_is_needed` deletes
them one by one and looks.
"""

import ast
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pkgutil import iter_modules

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.ledger_world import (
    CHARTER,
    GENESIS,
    INTERVAL_S,
    T0,
    World,
    admit,
    asset,
    batch,
    close,
    correct,
    correct_demand,
    deliver,
    end_mandate,
    genesis,
    issue,
    key,
    mandate,
    order,
    reading,
    register,
    revoke,
    rotate,
    seal,
    sell,
    set_validator,
    take,
)

from broker.ledger import rules
from broker.ledger.faults import Fault, LedgerInvariantBroken, RuleViolation
from broker.ledger.limits import MAX_HELD_SLICES, MAX_REVISION
from broker.ledger.opening import RefusedBatch, open_batch
from broker.ledger.operations import Issue, Operation, Register, RotateKey, SetValidator, Transfer, Void, Window
from broker.ledger.rules import delivery, generation
from broker.ledger.state import DEVICE, Overlay
from broker.protocol import keys
from broker.protocol.messages import MAX_VALIDATORS, Batch, Carrier, KeyHolder, NamedKey, Quality, Role, ValidatorChange
from broker.protocol.sources import Source

NEXT = T0 + INTERVAL_S


def with_stock() -> World:
    """b1 owns 1000 Wh solar of the first interval."""
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 1_000))
    return world


def sealed_order(**changes: object) -> bytes:
    return seal(order(**changes), "b2")


@dataclass(frozen=True)
class Case:
    """`world` after `before` refuses `operations` at `index` with `fault`."""

    fault: Fault
    operations: tuple[Operation, ...]
    before: tuple[tuple[str, tuple[Operation, ...]], ...] = ()
    world: Callable[[], World] = with_stock
    by: str = "b1"
    not_after_s: int = T0 + 86_400
    index: int | None = 0
    with_key: str | None = None
    limits: tuple[tuple[types.ModuleType, str, int], ...] = ()


def b1(*operations: Operation) -> tuple[str, tuple[Operation, ...]]:
    return ("b1", operations)


def b2(*operations: Operation) -> tuple[str, tuple[Operation, ...]]:
    return ("b2", operations)


def shredded() -> tuple[Operation, ...]:
    """Leaves MAX_HELD_SLICES + 1 pieces of the asset with b1."""
    return tuple(deliver(i, 1, ("solar-1", 2 * i + 1, 2 * i + 2)) for i in range(MAX_HELD_SLICES))


def rotated(name: str, holder: KeyHolder = KeyHolder.PARTY, **times: int) -> RotateKey:
    """The key of that name gives way to the key "new" after the first interval, with one interval of grace."""
    return rotate(name, "new", holder=holder, **times)


def rotated_away(name: str) -> RotateKey:
    """The same from the first interval on, so that the old key serves for nothing in it."""
    return rotate(name, "new", from_s=T0)


FOUNDED_BY_THREE = genesis(
    registrars=tuple(NamedKey(name, key(name).public.cose_key) for name in ("registrar", "second", "third")),
    validators=tuple(NamedKey(name, key(name).public.cose_key) for name in ("n1", "n2", "n3", "n4")),
)
TWO = ("registrar", "second")


def three_registrars() -> World:
    """Three registrars, and the four validators n1 to n4 of power 1."""
    return World.set_up(FOUNDED_BY_THREE)


def most_validators() -> World:
    names = [f"n{number}" for number in range(MAX_VALIDATORS)]
    return World.set_up(genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in names)))


def two_contents() -> SetValidator:
    one, other = (set_validator("n5", 1, by=(name,), validator_key=name) for name in TWO)
    return SetValidator(one.statements + other.statements)


def with_p256_key() -> SetValidator:
    point = keys._private(ec.derive_private_key(7, ec.SECP256R1()))
    return SetValidator((seal(ValidatorChange("n5", point.public.cose_key, 1, 1), "registrar"),))


EXPIRED_S = T0 + INTERVAL_S + 31 * 86_400 + GENESIS.correction_deadline_s
"""The end of the first interval whose close expires what was made in the first one is one interval later."""
AFTER_ALL = 2**40
PARKED = (
    b1(Transfer(asset("solar-1"), 0, 10, "b1", "bob", 1, None)),
    b1(close(EXPIRED_S - EXPIRED_S % INTERVAL_S)),
    (
        "bob",
        (
            Transfer(
                asset("solar-1"),
                0,
                10,
                "bob",
                "b1",
                1,
                seal(order(requester="b1", path=("b1", "bob"), not_after_s=AFTER_ALL), "b1"),
            ),
        ),
    ),
)
"""b1 gave away what a close would have expired, and has it back."""
DELIVERED = b1(deliver(1, 10, ("solar-1", 0, 4), ("solar-1", 4, 8)))
THIRTY_DAYS_LATER = T0 + GENESIS.correction_deadline_s

CASES = [
    Case(
        Fault.NOT_REGISTERED,
        (register("b3"), Void(b"o" * 16)),
        before=(("b3", (register("b3"),)), b1(revoke("b3"))),
        by="b3",
    ),
    Case(Fault.NOT_A_BROKER, (deliver(1, 10),), by="alice"),
    Case(Fault.NOT_A_BROKER, (Void(b"o" * 16),), by="alice"),
    Case(Fault.NOT_A_BROKER, (correct_demand(1, 5),), before=(b1(deliver(1, 10)),), by="alice"),
    Case(Fault.KEY_RETIRED, (issue("solar-1", 10, NEXT),), before=(b1(rotated("solar-1", KeyHolder.DEVICE)),)),
    Case(
        Fault.KEY_RETIRED,
        (issue("wind-1", 10),),
        before=(b1(rotated("wind-1", KeyHolder.DEVICE)), b1(close(NEXT))),
    ),
    Case(
        Fault.KEY_RETIRED,
        (correct("solar-1", 10),),
        before=(b1(rotate("solar-1", "new", holder=KeyHolder.DEVICE, from_s=T0)),),
    ),
    Case(Fault.KEY_RETIRED, (sell("solar-1", 0, 10, sealed_order()),), before=(b2(rotated_away("b2")),)),
    Case(
        Fault.KEY_RETIRED,
        (admit("solar-2"), mandate("solar-2")),
        before=(b1(rotated_away("alice")),),
        index=1,
    ),
    Case(Fault.KEY_RETIRED, (end_mandate("solar-1", NEXT),), before=(b1(rotated("alice")),)),
    Case(Fault.KEY_RETIRED, (Void(b"o" * 16),), before=(b1(rotated("b1")), b1(close(NEXT))), index=None),
    Case(Fault.KEY_RETIRED, (register("alice", Role.PROVIDER),), before=(b1(rotated("alice")),), by="alice"),
    Case(
        Fault.KEY_RETIRED,
        (register("bob", Role.PROVIDER), register("carol")),
        before=(b1(rotated("alice")),),
        by="alice",
    ),
    Case(Fault.ROTATION_OF_OLD_KEY, (rotate("nobody", "new", by="registrar"),)),
    Case(Fault.ROTATION_OF_OLD_KEY, (rotate("alice", "new", holder=KeyHolder.DEVICE),)),
    Case(Fault.ROTATION_OF_OLD_KEY, (rotate("alice", "newer"),), before=(b1(rotated("alice")),)),
    Case(Fault.ROTATION_OF_OLD_KEY, (rotate("alice", "newer", old_key="unknown", by="registrar"),)),
    Case(Fault.ROTATION_SIGNER, (rotate("alice", "new", by="bob"),)),
    Case(Fault.ROTATION_TIMES, (rotated("alice", from_s=T0 + 1),)),
    Case(Fault.ROTATION_TIMES, (rotated("alice", grace_until_s=T0),)),
    Case(Fault.KEY_TAKEN, (rotate("alice", "bob"),)),
    Case(Fault.KEY_TAKEN, (rotate("alice", "alice"),)),
    Case(Fault.REVOCATION_KEY, (revoke("alice", revoked="bob", by="alice"),)),
    Case(Fault.REVOCATION_KEY, (revoke("alice", revoked="unknown", by="alice"),)),
    Case(Fault.REVOCATION_KEY, (revoke("alice", holder=KeyHolder.DEVICE),)),
    Case(Fault.REVOCATION_SIGNER, (revoke("alice", by="bob"),)),
    Case(
        Fault.REVOCATION_SIGNER,
        (revoke("alice", revoked="new", with_key="alice"),),
        before=(b1(rotated("alice")),),
    ),
    Case(
        Fault.REVOCATION_SIGNER,
        (revoke("alice", with_key="new"),),
        before=(b1(rotated("alice")), b1(revoke("alice", revoked="new"))),
    ),
    Case(Fault.VALIDATOR_STATEMENTS, (two_contents(),), world=three_registrars),
    Case(Fault.VALIDATOR_MAJORITY, (set_validator("n5", 1),), world=three_registrars),
    Case(Fault.VALIDATOR_MAJORITY, (set_validator("n5", 1, by=("second",) * 3),), world=three_registrars),
    Case(Fault.VALIDATOR_SEQUENCE, (set_validator("n5", 1, 2, by=TWO),), world=three_registrars),
    Case(
        Fault.VALIDATOR_SEQUENCE,
        (set_validator("n5", 1, by=TWO),),
        before=(b1(set_validator("n5", 1, by=TWO)),),
        world=three_registrars,
        not_after_s=AFTER_ALL,
    ),
    Case(Fault.VALIDATOR_KEY, (with_p256_key(),)),
    Case(Fault.VALIDATOR_KEY_TAKEN, (set_validator("n5", 1, by=TWO, validator_key="n1"),), world=three_registrars),
    Case(Fault.UNKNOWN_VALIDATOR, (set_validator("n5", 0, by=TWO),), world=three_registrars),
    Case(Fault.LAST_VALIDATOR, (set_validator("node", 0),)),
    Case(Fault.TOO_MANY_VALIDATORS, (set_validator("another", 1),), world=most_validators),
    Case(Fault.VALIDATOR_THIRD, (set_validator("n5", 2, by=TWO),), world=three_registrars),
    Case(Fault.VALIDATOR_THIRD, (set_validator("n1", 3, by=TWO, validator_key="n5"),), world=three_registrars),
    Case(
        Fault.VALIDATOR_THIRD,
        (set_validator("n1", 2, 2, by=TWO, validator_key="n5"),),
        before=(b1(set_validator("n1", 2, by=TWO)),),
        world=three_registrars,
    ),
    Case(Fault.NOT_COMMISSIONED, (admit("solar-2", commissioned_s=T0 + 1), issue("solar-2", 10)), index=1),
    Case(Fault.CORRECTION_REVISION, (correct("solar-1", 10, 2),)),
    Case(Fault.CORRECTION_REVISION, (correct("solar-1", 10, 0),)),
    Case(Fault.CORRECTION_REVISION, (correct("solar-1", 10),), before=(b1(correct("solar-1", 10)),), by="b2"),
    Case(Fault.CORRECTION_REVISION, (correct("wind-1", 10, 2),)),
    Case(
        Fault.TOO_MANY_REVISIONS,
        (correct("wind-1", 10, MAX_REVISION + 1),),
        before=(b1(*(correct("wind-1", 10, revision) for revision in range(1, MAX_REVISION + 1))),),
    ),
    Case(
        Fault.TOO_MUCH_SEARCHED,
        (correct("solar-1", 1),),
        before=(DELIVERED,),
        limits=((generation, "MAX_SEARCHED_BY_BATCH", 1),),
    ),
    Case(Fault.ASSET_EXPIRED, (deliver(1, 10, ("solar-1", 0, 10)),), before=PARKED, not_after_s=AFTER_ALL),
    Case(
        Fault.ASSET_EXPIRED,
        (take("solar-1", 0, 10, owner="b1", broker="bob"),),
        before=PARKED,
        not_after_s=AFTER_ALL,
    ),
    Case(Fault.UNKNOWN_DEMAND, (correct_demand(1, 5),)),
    Case(Fault.DEMAND_BROKER, (correct_demand(1, 12),), before=(b1(deliver(1, 10)),), by="b2"),
    Case(Fault.DEMAND_REVISION, (correct_demand(1, 5, revision=2),), before=(b1(deliver(1, 10)),)),
    Case(
        Fault.DEMAND_REVISION,
        (correct_demand(1, 5),),
        before=(b1(deliver(1, 10)), b1(correct_demand(1, 5))),
        not_after_s=AFTER_ALL,
    ),
    Case(
        Fault.DEMAND_SETTLED,
        (correct_demand(1, 5),),
        before=(b1(deliver(1, 10)), b1(close(THIRTY_DAYS_LATER))),
        not_after_s=AFTER_ALL,
    ),
    Case(Fault.RETURNED_AMOUNT, (correct_demand(1, 5),), before=(DELIVERED,)),
    Case(Fault.RETURNED_AMOUNT, (correct_demand(1, 5, ("solar-1", 4, 4, 8)),), before=(DELIVERED,)),
    Case(Fault.RETURNED_AMOUNT, (correct_demand(1, 9, ("solar-1", 4, 7, 8)),), before=(DELIVERED,)),
    Case(Fault.RETURNED_SLICE, (correct_demand(1, 6, ("solar-1", 4, 4, 6)),), before=(DELIVERED,)),
    Case(Fault.RETURNED_SLICE, (correct_demand(1, 6, ("solar-1", 5, 6, 8)),), before=(DELIVERED,)),
    Case(Fault.RETURNED_SLICE, (correct_demand(1, 2, ("solar-1", 4, 2, 8)),), before=(DELIVERED,)),
    Case(Fault.RETURNED_SLICE, (correct_demand(1, 8, ("solar-1", 4, 8, 8)),), before=(DELIVERED,)),
    Case(
        Fault.RETURNED_SLICE,
        (correct_demand(2, 6, ("solar-1", 4, 6, 8)),),
        before=(DELIVERED, b1(deliver(2, 8, ("solar-1", 8, 16)))),
    ),
    Case(
        Fault.TOO_MANY_RETURNED,
        (correct_demand(1, 7, ("solar-1", 0, 3, 4)),),
        before=(DELIVERED,),
        limits=((delivery, "MAX_RETURNED_SLICES", 1),),
    ),
    Case(Fault.NOT_A_BROKER, (close(),), by="alice"),
    Case(Fault.EXPIRED, (register("carol"),), before=(b1(close()),), not_after_s=NEXT, index=None),
    Case(Fault.ALREADY_APPLIED, (register("b1"),), before=(b1(register("b1")),), index=None),
    Case(Fault.STATEMENT, (register("carol", by="alice"),)),
    Case(Fault.REGISTRAR_AS_PARTY, (register("registrar", party_key="another"),)),
    Case(Fault.REGISTRAR_AS_PARTY, (register("carol", party_key="registrar"),)),
    Case(Fault.NAME_TAKEN, (register("alice", Role.PROVIDER, party_key="another"),)),
    Case(Fault.NAME_TAKEN, (register("alice", Role.BROKER),)),
    Case(Fault.KEY_TAKEN, (register("carol", party_key="alice"),)),
    Case(Fault.KEY_TAKEN, (admit("solar-2", meter_key="solar-1"),)),
    Case(Fault.DEVICE_TAKEN, (admit("solar-1", capacity_w=5_000),)),
    Case(Fault.DEVICE_TAKEN, (admit("solar-1", meter_key="another"),)),
    Case(Fault.UNKNOWN_OWNER, (admit("solar-2", owner="carol"),)),
    Case(Fault.UNKNOWN_AREA, (admit("solar-2", area="east"),)),
    Case(Fault.NOT_THE_OWNER, (mandate("solar-1", owner="bob", from_s=NEXT),)),
    Case(Fault.NOT_THE_OWNER, (mandate("solar-9"),)),
    Case(Fault.NOT_THE_OWNER, (mandate("solar-1", owner="alice", by="bob"),)),
    Case(Fault.NOT_THE_OWNER, (end_mandate("solar-1", NEXT, owner="bob"),)),
    Case(Fault.MANDATE_BROKER, (admit("solar-2"), mandate("solar-2", broker="bob")), index=1),
    Case(Fault.MANDATE_BROKER, (admit("solar-2"), mandate("solar-2", broker="nobody")), index=1),
    Case(Fault.MANDATE_BOUNDARY, (admit("solar-2"), mandate("solar-2", from_s=T0 + 1)), index=1),
    Case(Fault.MANDATE_BOUNDARY, (end_mandate("solar-1", NEXT + 1),)),
    Case(Fault.MANDATE_EXCLUSIVE, (mandate("solar-1", broker="b2", from_s=NEXT),)),
    Case(
        Fault.MANDATE_EXCLUSIVE,
        (end_mandate("solar-1", NEXT + INTERVAL_S), mandate("solar-1", broker="b2", from_s=NEXT)),
        index=1,
    ),
    Case(Fault.NO_MANDATE, (admit("solar-2"), end_mandate("solar-2", NEXT)), index=1),
    Case(Fault.NO_MANDATE, (end_mandate("solar-1", T0),)),
    Case(Fault.MANDATE_ENDED, (end_mandate("solar-1", NEXT), end_mandate("solar-1", NEXT + INTERVAL_S)), index=1),
    Case(Fault.MANDATE_PAST, (end_mandate("solar-1", NEXT),), before=(b1(close(NEXT)),)),
    Case(Fault.UNKNOWN_DEVICE, (Issue(seal(reading("wind-1", 10), "solar-1")),)),
    Case(Fault.READING_INTERVAL, (issue("wind-1", 10, T0 + 60),)),
    Case(Fault.READING_INTERVAL, (issue("wind-1", 10, T0, end_s=T0 + 2 * INTERVAL_S),)),
    Case(Fault.REVISION, (issue("wind-1", 10, revision=1),)),
    Case(Fault.QUALITY, (issue("wind-1", 10, quality=Quality.MISSING),)),
    Case(Fault.NOTHING_TO_ISSUE, (issue("wind-1", 0),)),
    Case(Fault.ABOVE_CAPACITY, (issue("wind-1", 2_201),)),
    Case(Fault.ISSUED_BEFORE, (issue("solar-1", 1_000),)),
    Case(Fault.ISSUED_BEFORE, (issue("solar-1", 999),), by="b2"),
    Case(Fault.UNKNOWN_ASSET, (take("solar-1", 0, 1, start_s=NEXT),)),
    Case(Fault.UNKNOWN_ASSET, (deliver(1, 10, ("wind-1", 0, 1)),)),
    Case(Fault.UNKNOWN_RECEIVER, (issue("wind-1", 10), take("wind-1", 0, 10, broker="nobody")), index=1),
    Case(Fault.UNKNOWN_RECEIVER, (take("solar-1", 0, 10, owner="b1", broker="nobody"),)),
    Case(Fault.TO_ITSELF, (take("solar-1", 0, 10, owner="b1"),)),
    Case(Fault.NOT_MANDATED, (issue("wind-1", 10), take("wind-1", 0, 10, broker="b2")), by="b2", index=1),
    Case(Fault.NOT_MANDATED, (Transfer(asset("solar-1"), 0, 10, "b1", "b2", 1, None),), by="b2"),
    Case(
        Fault.NOT_MANDATED,
        (end_mandate("wind-1", NEXT), issue("wind-1", 10, NEXT), take("wind-1", 0, 10, start_s=NEXT)),
        index=2,
    ),
    Case(Fault.MANDATE_TAKES_ONLY, (issue("wind-1", 10), take("wind-1", 0, 10, broker="bob")), index=1),
    Case(Fault.EMPTY_SLICE, (take("solar-1", 5, 5, owner="b1", broker="alice"),)),
    Case(Fault.EMPTY_SLICE, (deliver(1, 10, ("solar-1", 7, 5)),)),
    Case(Fault.NOT_HELD, (deliver(1, 10, ("solar-1", 0, 6), ("solar-1", 5, 8)),)),
    Case(Fault.NOT_HELD, (deliver(1, 10, ("solar-1", 0, 5)),), by="b2"),
    Case(Fault.NOT_HELD, (deliver(1, 10, ("solar-1", 995, 1_001)),)),
    Case(Fault.NOT_HELD, (deliver(2, 10, ("solar-1", 4, 6)),), before=(b1(deliver(1, 10, ("solar-1", 0, 5))),)),
    Case(Fault.NOT_HELD, (sell("solar-1", 0, 5, sealed_order()),), before=(b1(deliver(1, 10, ("solar-1", 0, 5))),)),
    Case(Fault.TOO_MANY_SLICES, shredded(), index=MAX_HELD_SLICES - 1),
    Case(Fault.ORDER_MISSING, (sell("solar-1", 0, 10, None),)),
    Case(Fault.ORDER_NOT_NEEDED, (replace(take("solar-1", 0, 10, owner="b1", broker="bob"), order=sealed_order()),)),
    Case(Fault.ORDER_STATEMENT, (sell("solar-1", 0, 10, seal(order(), "b2", with_key="b1")),)),
    Case(Fault.ORDER_STATEMENT, (sell("solar-1", 0, 10, seal(order(), "b2", ledger="other-ledger")),)),
    Case(Fault.ORDER_STATEMENT, (sell("solar-1", 0, 10, b"no order"),)),
    Case(Fault.ORDER_REQUESTER, (sell("solar-1", 0, 10, seal(order(), "b1")),)),
    Case(Fault.ORDER_REQUESTER, (sell("solar-1", 0, 10, sealed_order(requester="b3")),)),
    Case(Fault.ORDER_SUPPLIER, (sell("solar-1", 0, 10, sealed_order(path=("b2", "b3"))),)),
    Case(Fault.ORDER_PATH, (sell("solar-1", 0, 10, sealed_order(path=("b2", "b3", "b1"), parent=b"p" * 16)),)),
    Case(Fault.ORDER_LOOP, (sell("solar-1", 0, 10, sealed_order(path=("b1", "b2", "b1"), parent=b"p" * 16)),)),
    Case(Fault.ORDER_LOOP, (sell("solar-1", 0, 10, sealed_order(path=("b2", "b2", "b1"), parent=b"p" * 16)),)),
    Case(Fault.ORDER_PARENT, (sell("solar-1", 0, 10, sealed_order(parent=b"p" * 16)),)),
    Case(
        Fault.ORDER_PARENT,
        (sell("solar-1", 0, 10, sealed_order(path=("b3", "b2", "b1"))),),
        before=(("b3", (register("b3"),)),),
    ),
    Case(Fault.ORDER_BROKER, (sell("solar-1", 0, 10, sealed_order(path=("alice", "b2", "b1"), parent=b"p" * 16)),)),
    Case(Fault.ORDER_BROKER, (sell("solar-1", 0, 10, sealed_order(path=("b3", "b2", "b1"), parent=b"p" * 16)),)),
    Case(Fault.ORDER_SOURCE, (sell("solar-1", 0, 10, sealed_order(source=Source.WIND)),)),
    Case(Fault.ORDER_INTERVAL, (sell("solar-1", 0, 10, sealed_order(start_s=NEXT, end_s=NEXT + INTERVAL_S)),)),
    Case(Fault.ORDER_INTERVAL, (sell("solar-1", 0, 10, sealed_order(end_s=NEXT + INTERVAL_S)),)),
    Case(Fault.ORDER_PRICE, (sell("solar-1", 0, 10, sealed_order(), price=151),)),
    Case(Fault.ORDER_CLOSED, (sell("solar-1", 0, 10, sealed_order(not_after_s=T0 + 86_400)),), before=(b2(close()),)),
    Case(Fault.ORDER_EXPIRED, (sell("solar-1", 0, 10, sealed_order()),), before=(b2(close(NEXT)),)),
    Case(
        Fault.ORDER_CONTENT,
        (sell("solar-1", 10, 20, sealed_order(energy_wh=501)),),
        before=(b1(sell("solar-1", 0, 10, sealed_order())),),
    ),
    Case(Fault.ORDER_VOID, (sell("solar-1", 0, 10, sealed_order()),), before=(b2(Void(b"o" * 16)),)),
    Case(
        Fault.ORDER_VOID,
        (sell("solar-1", 10, 20, sealed_order()),),
        before=(b1(sell("solar-1", 0, 10, sealed_order())), b2(Void(b"o" * 16))),
    ),
    Case(Fault.ORDER_EXCEEDED, (sell("solar-1", 0, 501, sealed_order()),)),
    Case(
        Fault.ORDER_EXCEEDED,
        (sell("solar-1", 0, 400, sealed_order()), sell("solar-1", 400, 501, sealed_order())),
        index=1,
    ),
    Case(Fault.DEMAND_INTERVAL, (deliver(1, 10, end_s=T0 + 900),)),
    Case(Fault.DEMAND_INTERVAL, (deliver(1, 10, start_s=T0 + 1, end_s=NEXT + 1),)),
    Case(Fault.DEMAND_AREA, (deliver(1, 10, area="east"),)),
    Case(Fault.DEMAND_BROKER, (deliver(1, 10),), before=(b1(deliver(1, 10)),), by="b2"),
    Case(Fault.DEMAND_CHANGED, (deliver(1, 11),), before=(b1(deliver(1, 10)),)),
    Case(Fault.DEMAND_CHANGED, (deliver(1, 10, commitment=b"d" * 32),), before=(b1(deliver(1, 10)),)),
    Case(Fault.OUTSIDE_WINDOW, (replace(deliver(1, 10, ("solar-1", 0, 5)), start_s=NEXT, end_s=NEXT + INTERVAL_S),)),
    Case(
        Fault.OUTSIDE_WINDOW,
        (replace(deliver(1, 10, ("solar-1", 0, 5)), start_s=T0 - INTERVAL_S, end_s=T0, window=Window.DAY),),
    ),
    Case(Fault.OUTSIDE_AREA, (deliver(1, 10, ("solar-1", 0, 5), area="south"),)),
    Case(Fault.DEMAND_EXCEEDED, (deliver(1, 10, ("solar-1", 0, 5), ("solar-1", 5, 11)),)),
    Case(Fault.DEMAND_EXCEEDED, (deliver(1, 10, ("solar-1", 8, 11)),), before=(b1(deliver(1, 10, ("solar-1", 0, 8))),)),
    Case(Fault.CLOSE_INTERVAL, (close(end_s=T0 + 900),)),
    Case(Fault.CLOSE_REVISION, (close(revision=1),)),
    Case(Fault.CLOSE_REVISION, (close(),), before=(b1(close()),), not_after_s=T0 + 2 * 86_400),
    Case(Fault.CLOSE_REVISION, (close(revision=2),), before=(b1(close()),)),
    Case(Fault.CLOSE_ORDER, (close(),), before=(b1(close(NEXT)),)),
    Case(Fault.CLOSE_LOWERED, (close(revision=1, demands=0),), before=(b1(close()),)),
    Case(Fault.CLOSE_LOWERED, (close(revision=1, demanded_wh=99),), before=(b1(close()),)),
]


def refusal_of(case: Case) -> RuleViolation | None:
    world = case.world()
    for by, operations in case.before:
        world.apply(*operations, by=by)
    before = dict(world.state.written)
    state_hash = world.step.state_hash
    try:
        world.apply(*case.operations, by=case.by, not_after_s=case.not_after_s, with_key=case.with_key)
    except RuleViolation as violation:
        assert world.state.written == before, "a refused batch changes nothing"
        assert world.step.state_hash == state_hash
        return violation
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.fault))
def test_guard_refuses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in case.limits:
        monkeypatch.setattr(*limit)
    violation = refusal_of(case)
    assert violation is not None, "was accepted"
    assert (violation.code, violation.operation_index) == (case.fault, case.index), violation.reason


def test_malformed_operation_is_refused_with_its_index() -> None:
    world = with_stock()
    raw = seal(Batch(NEXT, (b"\x82\x09\x81\x50" + b"v" * 16, b"\x82\x09\x81\x4fshort")), "b1")
    with pytest.raises(RefusedBatch) as caught:
        open_batch(raw, world.state, CHARTER)
    assert caught.value.violation.code is Fault.MALFORMED
    assert caught.value.violation.operation_index == 1
    assert caught.value.sender == "b1"


def test_a_carrier_that_the_device_is_not_admitted_for_is_refused() -> None:
    # There is one carrier yet, so the admission is changed in the state.
    world = World.set_up()
    overlay = Overlay(world.state)
    device = world.get(DEVICE, "wind-1")
    overlay.put((DEVICE, "wind-1"), device._replace(carrier=Carrier.ELECTRICITY + 1))
    with pytest.raises(RuleViolation) as caught:
        rules.apply_batch(overlay, CHARTER, open_batch(batch(issue("wind-1", 10)), overlay, CHARTER))
    assert caught.value.code is Fault.CARRIER


def test_every_fault_has_a_case() -> None:
    covered = {case.fault for case in CASES} | {Fault.MALFORMED, Fault.CARRIER}
    assert covered == set(Fault)


class _Without(ast.NodeTransformer):
    """Deletes the `if` or `except` whose body raises `fault`."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.deleted = 0

    def _raises(self, statements: list[ast.stmt]) -> bool:
        return any(
            isinstance(node, ast.Attribute) and node.attr == self.fault.name
            for statement in statements
            if isinstance(statement, ast.Raise | ast.Expr)
            for node in ast.walk(statement)
        )

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        if not self._raises(node.body):
            return node
        self.deleted += 1
        return node.orelse or ast.Pass()


GUARDS = sorted(
    {case.fault for case in CASES} - {Fault.STATEMENT, Fault.ORDER_STATEMENT, Fault.NOT_HELD, Fault.UNKNOWN_ASSET}
)
"""All guards that are an `if`. The other four are the end of a search or of a signature check: without them there is
nothing to go on with."""

MODULES = [import_module(f"{rules.__name__}.{found.name}") for found in iter_modules(rules.__path__)] + [rules]


def without_guard(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of the rules with that guard deleted takes the place of the real one."""
    deleted = 0
    for module in MODULES:
        without = _Without(fault)
        mutated = ast.fix_missing_locations(without.visit(ast.parse(inspect.getsource(module))))
        deleted += without.deleted
        if not without.deleted:
            continue
        scratch = types.ModuleType("mutated")
        exec(compile(mutated, f"mutated {module.__name__}", "exec"), scratch.__dict__)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            # Other modules hold the same function object, so its code is changed in place.
            if function.__module__ == module.__name__:
                monkeypatch.setattr(function, "__code__", getattr(scratch, name).__code__)
    assert deleted == 1, "each fault is raised by exactly one guard"


@pytest.mark.parametrize("fault", GUARDS, ids=str)
def test_every_guard_is_needed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its guard deleted, no case is refused for that fault any more, and at least one gets through."""
    without_guard(fault, monkeypatch)
    went_through = 0
    for case in (case for case in CASES if case.fault is fault):
        for limit in case.limits:
            monkeypatch.setattr(*limit)
        try:
            violation = refusal_of(case)
        except (AttributeError, IndexError, KeyError, TypeError, LedgerInvariantBroken):
            # The guard was all that kept the rule from working on something that is not there.
            went_through += 1
            continue
        assert violation is None or violation.code is not fault
        went_through += violation is None
    assert went_through, "no case needs this guard: each is refused by another one too"


def test_a_registrar_is_believed_only_for_registrations() -> None:
    world = with_stock()
    with pytest.raises(RuleViolation) as caught:
        world.apply(Register(admit("solar-2").statement))
    assert caught.value.code is Fault.STATEMENT
