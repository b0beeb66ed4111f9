"""Thinks up what parties may say next: valid operations, and operations that are wrong by a hair.

All decisions come from `Choices`, so hypothesis can shrink a run and a seed can repeat one. The author looks at the
model to find what would be valid now, and then, now and then, changes one thing: a Wh, a name, a key, a time.
"""

import random
from collections.abc import Sequence
from dataclasses import fields, replace
from enum import IntEnum
from typing import Any, Protocol, TypeVar

from support.ledger_world import INTERVAL_S, T0, key

from broker.ledger.operations import AssetId, Close, Deliver, DeliveredSlice, Void, Window, decode_operation
from broker.ledger.operations import encode_operation as encoded
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import PrivateKey, public_key_from_cose
from broker.protocol.messages import (
    Admission,
    Carrier,
    EndOfMandate,
    KeyRevocation,
    KeyRotation,
    Mandate,
    MessageType,
    Order,
    Quality,
    Reading,
    Registration,
    Role,
    ValidatorChange,
)
from broker.protocol.sources import Source
from model.ledger_model import (
    DemandCorrection,
    Model,
    Move,
    Part,
    Returned,
    Said,
    SaidBatch,
    Say,
    SayTogether,
    Signed,
    Wh,
)
from model.sealing import operation_of

REGISTRARS = ("reg-1", "reg-2", "reg-3")
BROKERS = ("b1", "b2", "b3")
PROVIDERS = ("p1", "p2")
NODES = ("node", "node-2", "node-3", "node-4", "node-5")
DEVICES = {
    # name: (owner, source, area, capacity_w, commissioned_s)
    "d1": ("p1", Source.SOLAR, "north", 20, 0),
    "d2": ("p1", Source.WIND, "north", 30, 0),
    "d3": ("p2", Source.SOLAR, "south", 20, 0),
    "d4": ("p2", Source.SOLAR, "north", 20, T0),
}
NAMES = (*BROKERS, *PROVIDERS, *DEVICES, *REGISTRARS, *NODES)
GENERATIONS = 4
"""Keys that a holder can have one after the other."""
PSEUDONYMS = tuple(number.to_bytes(16, "big") for number in range(4))
HASHES = (b"c" * 32, b"d" * 32)
ORDER_IDS = tuple(bytes([number]) * 16 for number in range(6))
MONTH_S = 33 * 86_400

_Item = TypeVar("_Item")


class Choices(Protocol):
    """Where decisions come from."""

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""


class SeededChoices:
    """Decisions by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


def key_of(name: str, generation: int = 0) -> PrivateKey:
    """The key of that name; later generations are what it rotates to."""
    return key(name if generation == 0 else f"{name}/{generation}")


ALL_KEYS = {
    each.public.cose_key: each
    for name in (*NAMES, "stranger")
    for each in (key_of(name, generation) for generation in range(GENERATIONS))
}

KINDS = (
    *("issue", "correct", "take", "deliver") * 8,
    *("sell", "correct_demand") * 5,
    *("close", "close_again", "hand_over") * 3,
    *("void", "register", "admit", "mandate", "end_mandate", "rotate", "validator"),
    "revoke",
)
"""What the author can say, the frequent ones more than once."""


class Author:
    """Makes batches that fit the model's present state, or nearly."""

    def __init__(self, choices: Choices, wrong_one_in: int = 4) -> None:
        self._choices = choices
        self._wrong_one_in = wrong_one_in
        self._orders: list[Signed] = []
        self._batches: list[SaidBatch] = []

    # -- decisions --------------------------------------------------------------------------------------------------

    def pick(self, items: Sequence[_Item]) -> _Item:
        return items[self._choices.number(0, len(items) - 1)]

    def one_in(self, count: int) -> bool:
        return self._choices.number(1, count) == 1

    # -- batches ----------------------------------------------------------------------------------------------------

    def batch(self, model: Model, kind: str | None = None) -> SaidBatch | None:
        """The next batch, None if nothing of this kind can be said now."""
        if self._batches and kind is None and self.one_in(20):
            return self.pick(self._batches)
        scratch = model.copy()
        said: list[Said] = []
        by: str | None = None
        for _ in range(1 if self.one_in(2) else self._choices.number(1, 4)):
            proposal = self._proposal(scratch, kind or self.pick(KINDS), by)
            if proposal is None:
                continue
            by, operation = proposal
            said.append(operation)
            # The next operation of this batch builds on this one, as far as it goes through.
            trial = scratch.copy()
            if not list(trial._do(operation, by)):
                scratch = trial
        if by is None:
            return None
        if self.one_in(self._wrong_one_in):
            at = self._choices.number(0, len(said) - 1)
            said[at] = self._wrong(model, said[at])
        clock = model.clock(by)
        not_after_s = clock + self.pick((1, 1, INTERVAL_S, 86_400, 2 * MONTH_S)) if clock else T0 + 7 * MONTH_S
        if self.one_in(40):
            not_after_s = max(0, clock + self.pick((0, -1)))
        batch = SaidBatch(by, self._signing_key(model, MessageType.REGISTRATION, by), not_after_s, tuple(said))
        if self.one_in(60):
            batch = replace(batch, sender=self.pick(NAMES))
        if self.one_in(40):
            batch = replace(batch, sender=(other := self.pick(BROKERS + PROVIDERS)), key=key_of(other))
        self._batches.append(batch)
        return batch

    def _proposal(self, model: Model, kind: str, by: str | None) -> tuple[str, Said] | None:
        """(submitter, operation), by the given submitter if there is one already."""
        proposal: tuple[str | None, Said] | None = getattr(self, f"_{kind}")(model, by)
        if proposal is None:
            return None
        submitter, said = proposal
        if submitter is None:
            submitter = by or self.pick(sorted(model.roles) or [BROKERS[0]])
        return None if by is not None and submitter != by else (submitter, said)

    def _signing_key(self, model: Model, kind: MessageType, name: str) -> PrivateKey:
        """The holder's current key, now and then one that it had or will have."""
        cose_key = model.current.get((kind, name))
        if cose_key is None or self.one_in(50):
            return key_of(name, self._choices.number(0, GENERATIONS - 1) if self.one_in(3) else 0)
        had = [each.cose_key for each in model.keys.values() if (each.kind, each.name) == (kind, name)]
        if len(had) > 1 and self.one_in(10):
            cose_key = self.pick(sorted(had))
        return ALL_KEYS[cose_key]

    def _by_party(self, model: Model, message: Any, name: str) -> Signed:
        return Signed(message, self._signing_key(model, MessageType.REGISTRATION, name), name)

    def _by_registrar(self, message: Any) -> Signed:
        name = self.pick(REGISTRARS)
        return Signed(message, key_of(name), name)

    # -- times and ranges ---------------------------------------------------------------------------------------------

    def _start(self, model: Model) -> int:
        """An interval near to where the brokers' clocks stand."""
        near = self.pick(sorted({T0, *model.clocks.values()}))
        return near + INTERVAL_S * self.pick((-2, -1, 0, 0, 0, 1))

    def _runs(self, model: Model, owner: str) -> list[Part]:
        """All that the owner holds, in ranges as long as they go."""
        parts = []
        for (device, start_s), wh in sorted(model.wh.items()):
            low = 0
            for high in range(1, len(wh) + 1):
                if high == len(wh) or wh[high] != wh[low]:
                    if wh[low].where == "held" and wh[low].owner == owner:
                        parts.append(Part(_asset(device, start_s, wh[low]), low, high))
                    low = high
        return parts

    def _some_of(self, part: Part, at_most: int | None = None) -> Part:
        """A part of it, often the whole."""
        if self.one_in(3) and at_most is None:
            return part
        low = self._choices.number(part.from_wh, part.to_wh - 1)
        high = part.to_wh if at_most is None else min(part.to_wh, low + max(1, at_most))
        return Part(part.asset, low, self._choices.number(low + 1, high))

    # -- the kinds ----------------------------------------------------------------------------------------------

    def _register(self, model: Model, by: str | None) -> Any:
        name = self.pick(BROKERS + PROVIDERS)
        said = Registration(name, Role.BROKER if name in BROKERS else Role.PROVIDER, key_of(name).public.cose_key)
        submitter = name if name not in model.roles and self.one_in(2) else None
        return submitter, Say("register", self._by_registrar(said))

    def _admit(self, model: Model, by: str | None) -> Any:
        name = self.pick(sorted(DEVICES))
        owner, source, area, capacity_w, commissioned_s = DEVICES[name]
        meter_key = key_of(name).public.cose_key
        said = Admission(
            name, owner, meter_key, source, Carrier.ELECTRICITY, capacity_w, area, "a roof", commissioned_s
        )
        return None, Say("admit", self._by_registrar(said))

    def _mandate(self, model: Model, by: str | None) -> Any:
        if not model.admissions:
            return None
        device = self.pick(sorted(model.admissions))
        owner = model.device(device).owner
        spans = model.spans.get(device, ())
        from_s = spans[-1].end_s if spans and spans[-1].end_s is not None else self._start(model)
        broker = self.pick(BROKERS)
        if spans and self.one_in(3):
            broker, from_s = spans[-1].broker, spans[-1].from_s
        return None, Say("mandate", self._by_party(model, Mandate(device, owner, broker, from_s), owner))

    def _end_mandate(self, model: Model, by: str | None) -> Any:
        if not model.spans:
            return None
        device = self.pick(sorted(model.spans))
        owner = model.device(device).owner
        last = model.spans[device][-1]
        end_s = max(model.clock(last.broker), last.from_s) + INTERVAL_S * self.pick((-1, 0, 1, 1, 2))
        if last.end_s is not None and self.one_in(3):
            end_s = last.end_s
        return None, Say("end_mandate", self._by_party(model, EndOfMandate(device, owner, end_s), owner))

    def _reading(self, model: Model, device: str, start_s: int, revision: int) -> Signed:
        most_wh = model.most_wh(device)
        energy_wh = self._choices.number(0, most_wh) if self.one_in(2) else self.pick((0, 1, most_wh - 1, most_wh))
        quality = Quality.MEASURED if self.one_in(3) else self.pick((Quality.INTERPOLATED, Quality.ESTIMATED))
        said = Reading(device, start_s, start_s + INTERVAL_S, revision, energy_wh, quality, Carrier.ELECTRICITY)
        return Signed(said, self._signing_key(model, MessageType.ADMISSION, device), device)

    def _issue(self, model: Model, by: str | None) -> Any:
        if not model.admissions:
            return None
        device, start_s = self.pick(sorted(model.admissions)), self._start(model)
        if (device, start_s) in model.metered and not self.one_in(8):
            return None
        return None, Say("issue", self._reading(model, device, start_s, 0))

    def _correct(self, model: Model, by: str | None) -> Any:
        if model.metered and not self.one_in(8):
            given = {at for at, wh in model.wh.items() if any(one.where == "delivered" for one in wh)}
            device, start_s = self.pick(sorted(given if given and self.one_in(2) else model.metered))
            revision = model.metered[device, start_s].revision + 1
        elif model.admissions:
            device, start_s, revision = self.pick(sorted(model.admissions)), self._start(model), 1
        else:
            return None
        return None, Say("correct", self._reading(model, device, start_s, revision))

    def _take(self, model: Model, by: str | None) -> Any:
        ready = []
        for device in sorted(model.admissions):
            owner = model.device(device).owner
            for part in self._runs(model, owner):
                broker = model.mandated(part.asset.device, part.asset.start_s)
                if part.asset.device == device and broker is not None and by in (None, broker):
                    ready.append((broker, owner, part))
        if not ready:
            return None
        broker, owner, whole = self.pick(ready)
        part = self._some_of(whole)
        return broker, Move(part.asset, part.from_wh, part.to_wh, owner, broker, self.pick((0, 100)), None)

    def _sell(self, model: Model, by: str | None) -> Any:
        ready = [(name, part) for name in sorted(model.roles) for part in self._runs(model, name) if by in (None, name)]
        brokers = [name for name in sorted(model.roles) if model.is_broker(name)]
        if not ready or not brokers:
            return None
        seller, whole = self.pick(ready)
        part = self._some_of(whole)
        order = self._order(model, seller, part, self.pick(brokers))
        buyer = order.sender
        return seller, Move(part.asset, part.from_wh, part.to_wh, seller, buyer, self.pick((0, 100, 150)), order)

    def _order(self, model: Model, seller: str, part: Part, buyer: str) -> Signed:
        """An order that this range could serve: one already used, or another one."""
        source = Source(model.device(part.asset.device).source)
        start_s = part.asset.start_s
        fitting = [
            signed
            for signed in self._orders
            for said in [signed.message]
            if isinstance(said, Order) and (said.source, said.start_s, said.path[-1]) == (source, start_s, seller)
        ]
        if fitting and not self.one_in(3):
            return self.pick(fitting)
        path = self._path(model, buyer, seller)
        energy_wh = part.to_wh - part.from_wh + self._choices.number(0, 6)
        not_after_s = start_s + INTERVAL_S * self.pick((1, 2, 3)) + 600
        order_id = self.pick(ORDER_IDS)
        # Now and then one without the parent that it needs, or with one that it cannot have.
        parent = self.pick(ORDER_IDS) if (len(path) == 3) is not self.one_in(15) else None
        end_s = start_s + INTERVAL_S
        said = Order(order_id, buyer, source, start_s, end_s, energy_wh, 150, not_after_s, path, parent)
        signed = self._by_party(model, said, buyer)
        self._orders.append(signed)
        return signed

    def _path(self, model: Model, buyer: str, seller: str) -> tuple[str, ...]:
        """What the buyer asks the seller for itself, or for somebody before it."""
        if not self.one_in(4):
            return (buyer, seller)
        fitting = [name for name in BROKERS if model.is_broker(name) and name not in (buyer, seller)]
        if fitting and not self.one_in(3):
            return (self.pick(fitting), buyer, seller)
        other = self.pick(BROKERS + PROVIDERS)
        return (other, buyer, seller) if not self.one_in(3) else (buyer, other, seller)

    def _hand_over(self, model: Model, by: str | None) -> Any:
        """Without an order, to whoever it may be."""
        ready = [(name, part) for name in sorted(model.roles) for part in self._runs(model, name) if by in (None, name)]
        if not ready:
            return None
        seller, whole = self.pick(ready)
        part = self._some_of(whole)
        receiver = self.pick(PROVIDERS if not self.one_in(4) else NAMES)
        return seller, Move(part.asset, part.from_wh, part.to_wh, seller, receiver, 0, None)

    def _deliver(self, model: Model, by: str | None) -> Any:
        brokers = [name for name in sorted(model.roles) if model.is_broker(name) and by in (None, name)]
        holding = [name for name in brokers if self._runs(model, name)]
        if not brokers:
            return None
        broker = self.pick(holding or brokers)
        runs = self._runs(model, broker)
        window = self.pick(tuple(Window))
        own = [at for at, seen in sorted(model.demands.items()) if seen.broker == broker]
        if own and not self.one_in(3):
            at = self.pick(own)
            seen = model.demands[at]
            start_s, pseudonym, commitment = *at, seen.commitment
            demanded_wh, room = seen.demanded_wh, seen.demanded_wh - model.delivered()[at]
        else:
            start_s = self.pick(runs).asset.start_s if runs and not self.one_in(4) else self._start(model)
            pseudonym, commitment = self.pick(PSEUDONYMS), self.pick(HASHES)
            demanded_wh = room = self._choices.number(0, 25)
        area = self.pick(("north", "north", "north", "south"))
        if not self.one_in(10):
            runs = [
                run
                for run in runs
                if model.device(run.asset.device).area == area
                and (run.asset.start_s == start_s or window is not Window.INTERVAL)
            ]
        slices: list[DeliveredSlice] = []
        for _ in range(self._choices.number(0, 3)):
            if runs and (room > 0 or self.one_in(20)):
                run = runs.pop(self._choices.number(0, len(runs) - 1))
                part = self._some_of(run, room)
                room -= part.to_wh - part.from_wh
                slices.append(DeliveredSlice(*part, self.pick((0, 0, 1, 255))))
        end_s = start_s + INTERVAL_S
        return broker, Deliver(pseudonym, start_s, end_s, window, area, demanded_wh, commitment, tuple(slices))

    def _correct_demand(self, model: Model, by: str | None) -> Any:
        own = [at for at, seen in sorted(model.demands.items()) if by in (None, seen.broker)]
        if not own:
            return None
        given = model.delivered()
        served = [at for at in own if given[at]]
        at = self.pick(served if served and not self.one_in(4) else own)
        seen = model.demands[at]
        demanded_wh = self._choices.number(0, seen.demanded_wh + 5)
        excess = given[at] - demanded_wh
        returned = []
        trial = model.copy()
        while excess > 0:
            tail = self.pick(self._delivered(trial, at))
            take_wh = self._choices.number(1, min(excess, tail.to_wh - tail.from_wh))
            part = Part(tail.asset, tail.to_wh - take_wh, tail.to_wh)
            trial._put(*part, Wh(part.asset.revision, "held", seen.broker))
            returned.append(Returned(tail.asset, tail.from_wh, part.from_wh, part.to_wh))
            excess -= take_wh
        return seen.broker, DemandCorrection(
            at[1], at[0], seen.revision + 1, demanded_wh, self.pick(HASHES), tuple(returned)
        )

    def _delivered(self, model: Model, at: tuple[int, bytes]) -> list[Part]:
        """The slices that a demand has."""
        parts = []
        for (device, start_s), wh in sorted(model.wh.items()):
            low = 0
            for high in range(1, len(wh) + 1):
                if high == len(wh) or wh[high] != wh[low]:
                    if wh[low].where == "delivered" and (wh[low].demand_start_s, wh[low].pseudonym) == at:
                        parts.append(Part(_asset(device, start_s, wh[low]), low, high))
                    low = high
        return parts

    def _close(self, model: Model, by: str | None) -> Any:
        brokers = [name for name in sorted(model.roles) if model.is_broker(name) and by in (None, name)]
        if not brokers:
            return None
        broker = self.pick(brokers)
        start_s = model.clock(broker) or T0
        if self.one_in(8):
            start_s += self.pick((1, 2, 47, 48, 49)) * INTERVAL_S
        if self.one_in(30):
            start_s += MONTH_S - INTERVAL_S * self.pick((0, 1, 2))
        return broker, Close(
            start_s, start_s + INTERVAL_S, 0, self.pick((0, 3)), self._choices.number(0, 60), self.pick(HASHES)
        )

    def _close_again(self, model: Model, by: str | None) -> Any:
        own = [at for at in sorted(model.closed) if by in (None, at[0])]
        if not own:
            return None
        broker, start_s = self.pick(own)
        seen = model.closed[broker, start_s]
        lowest_wh = seen.demanded_wh - seen.lowered_wh
        demanded_wh = max(0, lowest_wh + self.pick((-1, 0, 0, 1, seen.lowered_wh)))
        demands = max(0, seen.demands + self.pick((0, 0, 1, -1)) if self.one_in(3) else seen.demands)
        return broker, Close(start_s, start_s + INTERVAL_S, seen.revision + 1, demands, demanded_wh, self.pick(HASHES))

    def _void(self, model: Model, by: str | None) -> Any:
        brokers = [name for name in sorted(model.roles) if model.is_broker(name) and by in (None, name)]
        if not brokers or not self.one_in(2):
            return None
        return self.pick(brokers), Void(self.pick(ORDER_IDS))

    def _holder(self, model: Model) -> tuple[int, str, MessageType] | None:
        if not model.current:
            return None
        lost = [at for at, cose_key in sorted(model.current.items()) if self._is_revoked(model, cose_key)]
        kind, name = self.pick(lost if lost and not self.one_in(3) else sorted(model.current))
        return (1 if kind is MessageType.ADMISSION else 0), name, kind

    def _is_revoked(self, model: Model, cose_key: bytes) -> bool:
        return model.keys[public_key_from_cose(cose_key).key_id].revoked

    def _rotate(self, model: Model, by: str | None) -> Any:
        found = self._holder(model)
        if found is None:
            return None
        holder, name, kind = found
        had = [key_of(name, number) for number in range(GENERATIONS)]
        free = [each for each in had if each.public.key_id not in model.keys]
        new = self.pick(free) if free and not self.one_in(10) else self.pick(had)
        old = ALL_KEYS[model.current[kind, name]]
        from_s = self._start(model)
        grace_until_s = from_s + INTERVAL_S * self.pick((0, 1, 2, 48))
        said = KeyRotation(holder, name, old.public.key_id, new.public.cose_key, from_s, grace_until_s)
        by_registrar = self._is_revoked(model, old.public.cose_key) or self.one_in(3)
        return None, Say("rotate_key", self._by_registrar(said) if by_registrar else Signed(said, old, name))

    def _revoke(self, model: Model, by: str | None) -> Any:
        found = self._holder(model)
        if found is None:
            return None
        holder, name, kind = found
        # A world in which everybody's key is revoked says nothing more.
        if name in BROKERS and not self.one_in(6):
            return None
        had = sorted(each.cose_key for each in model.keys.values() if (each.kind, each.name) == (kind, name))
        key_id = public_key_from_cose(self.pick(had)).key_id
        said = KeyRevocation(holder, name, key_id)
        if self.one_in(3):
            return None, Say("revoke_key", self._by_registrar(said))
        return None, Say("revoke_key", Signed(said, ALL_KEYS[self.pick(had)], name))

    def _validator(self, model: Model, by: str | None) -> Any:
        name = self.pick(NODES)
        seen = model.validators.get(name)
        said = ValidatorChange(
            name,
            seen.cose_key if seen is not None and not self.one_in(8) else key_of(name).public.cose_key,
            self.pick((0, 1, 1, 2, 3, 10)),
            model.validator_changes + 1,
        )
        count = self.pick((2, 2, 3, 3, 1))
        return None, SayTogether(tuple(Signed(said, key_of(each), each) for each in REGISTRARS[:count]))

    # -- wrong by a hair ---------------------------------------------------------------------------------------------

    def _wrong(self, model: Model, said: Said) -> Said:
        """The same with one thing changed; as it was, if the change could not even be written down."""
        changed = self._changed(model, said)
        try:
            decode_operation(encoded(operation_of(changed)))
            for signed in _statements(changed):
                type(signed.message).from_payload(signed.message.to_payload())
        except (MalformedMessage, ValueError, TypeError, OverflowError):
            return said
        return changed

    def _changed(self, model: Model, value: Any) -> Any:
        if isinstance(value, Signed):
            return self._changed_statement(model, value)
        if isinstance(value, IntEnum):
            return self.pick(tuple(type(value)))
        if type(value) is int:
            return max(0, value + self.pick((-1, 1, -1, 1, INTERVAL_S, -INTERVAL_S, 7, 86_400, -86_400, 2**40)))
        if type(value) is str:
            return value if value in _CODES else self.pick((*NAMES, "nobody", "north", "south", "east"))
        if type(value) is bytes:
            return self._other_bytes(value)
        if value is None:
            return value
        if isinstance(value, tuple):
            return self._changed_tuple(model, value)
        names = [field.name for field in fields(value)]
        name = self.pick(names)
        if name == "order" and self._orders and self.one_in(2):
            return replace(value, order=self.pick(self._orders) if value.order is None else None)
        return replace(value, **{name: self._changed(model, getattr(value, name))})

    def _changed_statement(self, model: Model, signed: Signed) -> Signed:
        what = self._choices.number(1, 6)
        if what == 1:
            return replace(signed, sender=self.pick(NAMES))
        if what == 2:
            return replace(signed, key=self.pick(list(ALL_KEYS.values())))
        if what == 3:
            other = self.pick(NAMES)
            return replace(signed, sender=other, key=key_of(other))
        if what == 4 and self.one_in(4) and self._orders:
            return replace(signed, message=self.pick(self._orders).message)
        return replace(signed, message=self._changed(model, signed.message))

    def _changed_tuple(self, model: Model, value: Any) -> Any:
        if hasattr(value, "_fields"):
            at = self._choices.number(0, len(value) - 1)
            return type(value)(*value[:at], self._changed(model, value[at]), *value[at + 1 :])
        if not value:
            return value
        at = self._choices.number(0, len(value) - 1)
        what = self._choices.number(1, 5)
        if what == 1:
            return value[:at] + value[at + 1 :]
        if what == 2:
            return (*value, value[at])
        return (*value[:at], self._changed(model, value[at]), *value[at + 1 :])

    def _other_bytes(self, value: bytes) -> bytes:
        if value in ALL_KEYS:
            return self.pick(list(ALL_KEYS))
        pools = (PSEUDONYMS, HASHES, ORDER_IDS, tuple(each.public.key_id for each in ALL_KEYS.values()))
        for pool in pools:
            if value in pool:
                return self.pick(pool)
        return bytes(len(value))


_CODES = ("register", "admit", "mandate", "end_mandate", "issue", "correct", "rotate_key", "revoke_key")


def _asset(device: str, start_s: int, one: Wh) -> AssetId:
    return AssetId(device, Carrier.ELECTRICITY, start_s, one.revision)


def _statements(said: Said) -> tuple[Signed, ...]:
    if isinstance(said, Say):
        return (said.signed,)
    if isinstance(said, SayTogether):
        return said.signed
    return (said.order,) if isinstance(said, Move) and said.order is not None else ()
