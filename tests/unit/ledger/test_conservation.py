"""Whatever two brokers, their meters and consumers do: no Wh comes from nowhere, and none is lost.

A random run is checked after every batch against sums made from the rows and from what the meters said; at its end the
same operations, in other batches, must give the same rows.
"""

from collections import Counter, defaultdict
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.ledger_world import (
    INTERVAL_S,
    T0,
    World,
    asset,
    close,
    correct,
    genesis,
    issue,
    order,
    pseudonym,
    seal,
)

from broker.ledger import state as rows
from broker.ledger.faults import RuleViolation
from broker.ledger.operations import (
    AssetId,
    CorrectDemand,
    Deliver,
    DeliveredSlice,
    Operation,
    ReturnedSlice,
    Transfer,
    Window,
)
from broker.ledger.state import AssetRow
from broker.protocol.messages import Carrier

FOUNDED = genesis(correction_deadline_s=2 * INTERVAL_S)
"""The deadline is so short that many corrections are late."""
LATER = 2**40
DEVICES = ("solar-1", "wind-1", "south-1")
STARTS = tuple(T0 + number * INTERVAL_S for number in range(4))
EXPIRY_S = 31 * 86_400 + 2 * INTERVAL_S

devices = st.sampled_from(DEVICES)
starts = st.sampled_from(STARTS)
brokers = st.sampled_from(["b1", "b2"])
energies = st.one_of(st.integers(0, 60), st.sampled_from([0, 2_150, 2_200]))


class Ledger(RuleBasedStateMachine):
    """Every rule tries one operation, which may be refused; the invariants hold either way."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.metered: dict[tuple[str, int], int] = {}
        self.revisions: dict[tuple[str, int], int] = {}
        self.accepted: list[tuple[str, Operation]] = []
        self.orders = 0

    @initialize(taken_wh=st.integers(0, 50))
    def set_up(self, taken_wh: int) -> None:
        """b1 begins with stock of the first two intervals, so that there is something to trade and to correct."""
        self.world = World.set_up(FOUNDED)
        for device in DEVICES:
            for start_s in STARTS[:2]:
                self.issues(device, start_s, 60)
                owner = "bob" if device == "south-1" else "alice"
                self.attempt(Transfer(asset(device, start_s), 0, taken_wh, owner, "b1", 1, None))

    def attempt(self, operation: Operation, by: str = "b1") -> bool:
        try:
            self.world.apply(operation, by=by, not_after_s=LATER + len(self.accepted))
        except RuleViolation:
            return False
        self.accepted.append((by, operation))
        return True

    def some_held(self, data: st.DataObject, *owners: str) -> tuple[AssetId, Any] | None:
        found = [
            (AssetId(key[2], Carrier(key[3]), key[1], key[4]), held)
            for key, row in self.world.state.written.items()
            if key[0] == rows.ASSET and row is not None
            for held in row.held
            if held.owner in owners
        ]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(device=devices, start_s=starts, energy_wh=energies)
    def issues(self, device: str, start_s: int, energy_wh: int) -> None:
        if self.attempt(issue(device, energy_wh, start_s)):
            assert (device, start_s) not in self.metered
            self.metered[device, start_s] = energy_wh
            self.revisions[device, start_s] = 0

    @rule(device=devices, start_s=starts, energy_wh=energies)
    def corrects(self, device: str, start_s: int, energy_wh: int) -> None:
        revision = self.revisions.get((device, start_s), 0) + 1
        assert self.attempt(correct(device, energy_wh, revision, start_s), by="b2")
        self.metered[device, start_s] = energy_wh
        self.revisions[device, start_s] = revision

    @rule(data=st.data(), receiver=st.sampled_from(["alice", "bob", "b1", "b2"]), by=brokers)
    def transfers(self, data: st.DataObject, receiver: str, by: str) -> None:
        chosen = self.some_held(data, "alice", "bob", "b1", "b2")
        if chosen is None:
            return
        what, held = chosen
        low = data.draw(st.integers(held.from_wh, held.to_wh - 1))
        high = data.draw(st.integers(low + 1, held.to_wh))
        self.orders += 1
        source = self.world.get(*rows.asset_key(what)).source
        asked = order(
            order_id=self.orders.to_bytes(16, "big"),
            requester=receiver,
            source=source,
            start_s=what.start_s,
            end_s=what.start_s + INTERVAL_S,
            energy_wh=high - low,
            not_after_s=LATER,
            path=(receiver, by),
        )
        sealed = seal(asked, receiver) if receiver in ("b1", "b2") and receiver != by else None
        self.attempt(Transfer(what, low, high, held.owner, receiver, 1, sealed), by)

    @rule(data=st.data())
    def takes(self, data: st.DataObject) -> None:
        chosen = self.some_held(data, "alice", "bob")
        if chosen is not None:
            what, held = chosen
            self.attempt(Transfer(what, held.from_wh, held.to_wh, held.owner, "b1", 1, None))

    @rule(data=st.data(), consumer=st.integers(0, 3), demanded_wh=st.integers(20, 80))
    def delivers(self, data: st.DataObject, consumer: int, demanded_wh: int) -> None:
        chosen = self.some_held(data, "b1", "b2")
        if chosen is None:
            return
        what, held = chosen
        by = held.owner
        name = pseudonym(10 * consumer + (by == "b2"))
        known = self.world.get(rows.DEMAND, what.start_s, name)
        if known is not None:
            demanded_wh = known.demanded_wh
        low = data.draw(st.integers(held.from_wh, held.to_wh - 1))
        high = data.draw(st.integers(low + 1, min(held.to_wh, low + 20)))
        area = "south" if what.device == "south-1" else "north"
        slices = (DeliveredSlice(what, low, high, 0),)
        end_s = what.start_s + INTERVAL_S
        self.attempt(Deliver(name, what.start_s, end_s, Window.INTERVAL, area, demanded_wh, b"c" * 32, slices), by)

    @rule(data=st.data())
    def delivers_all_of_a_slice(self, data: st.DataObject) -> None:
        chosen = self.some_held(data, "b1", "b2")
        if chosen is None:
            return
        what, held = chosen
        self.orders += 1
        wanted_wh = held.to_wh - held.from_wh
        operation = Deliver(
            pseudonym(1_000 + self.orders),
            what.start_s,
            what.start_s + INTERVAL_S,
            Window.INTERVAL,
            "south" if what.device == "south-1" else "north",
            wanted_wh,
            b"c" * 32,
            (DeliveredSlice(what, held.from_wh, held.to_wh, 0),),
        )
        self.attempt(operation, held.owner)

    @rule(data=st.data(), demanded_wh=st.integers(0, 80))
    def corrects_a_demand(self, data: st.DataObject, demanded_wh: int) -> None:
        state = self.world.state.written
        known = [key for key, row in state.items() if key[0] == rows.DEMAND and row is not None]
        if not known:
            return
        key = data.draw(st.sampled_from(known))
        demand = state[key]
        excess_wh = max(demand.delivered_wh - demanded_wh, 0)  # type: ignore[union-attr]
        returned = []
        for slice_key, row in state.items():
            if slice_key[0] != rows.SLICE or row is None or (row.demand_start_s, row.pseudonym) != key[1:]:  # type: ignore[union-attr]
                continue
            from_wh, to_wh = slice_key[5], row.to_wh  # type: ignore[union-attr]
            back_wh = min(excess_wh, to_wh - from_wh)
            excess_wh -= back_wh
            if back_wh:
                named = AssetId(slice_key[2], Carrier(slice_key[3]), slice_key[1], slice_key[4])
                returned.append(ReturnedSlice(named, from_wh, to_wh - back_wh, to_wh))
        operation = CorrectDemand(key[2], key[1], demand.revision + 1, demanded_wh, b"c" * 32, tuple(returned))  # type: ignore[union-attr]
        broker: str = demand.broker  # type: ignore[union-attr]
        clock = self.world.get(rows.CLOCK, broker)
        in_time = clock is None or clock.time_s < key[1] + INTERVAL_S + FOUNDED.correction_deadline_s
        assert self.attempt(operation, broker) == in_time

    @precondition(lambda self: len(self.accepted) % 3 == 0)
    @rule(by=brokers, intervals=st.sampled_from([0, 1, 2]))
    def closes(self, by: str, intervals: int) -> None:
        clock = self.world.get(rows.CLOCK, by)
        start_s = (T0 if clock is None else clock.time_s) + intervals * INTERVAL_S
        assert self.attempt(close(start_s), by)

    @precondition(lambda self: len(self.accepted) > 30)
    @rule(by=brokers, interval=st.integers(0, 3))
    def comes_back_after_months(self, by: str, interval: int) -> None:
        self.attempt(close(STARTS[interval] + EXPIRY_S), by)

    @invariant()
    def what_was_metered_is_issued_withdrawn_or_carried(self) -> None:
        sums: Counter[str] = Counter()
        for key, row in self.world.state.written.items():
            if key[0] == rows.ASSET and row is not None:
                sums[key[2]] += row.issued_wh - row.withdrawn_wh  # type: ignore[union-attr]
            elif key[0] == rows.CARRY and row is not None:
                sums[key[1]] += row.energy_wh  # type: ignore[union-attr]
        metered: Counter[str] = Counter()
        for (device, _), energy_wh in self.metered.items():
            metered[device] += energy_wh
        assert {device: metered[device] for device in DEVICES} == {device: sums[device] for device in DEVICES}

    @invariant()
    def every_wh_of_an_asset_is_somewhere_and_only_there(self) -> None:
        ranges: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        delivered: Counter[Any] = Counter()
        given: Counter[Any] = Counter()
        for key, row in self.world.state.written.items():
            if key[0] == rows.SLICE and row is not None:
                ranges[key[1:5]].append((key[5], row.to_wh))  # type: ignore[union-attr]
                delivered[key[1:5]] += row.to_wh - key[5]  # type: ignore[union-attr]
                given[row.demand_start_s, row.pseudonym] += row.to_wh - key[5]  # type: ignore[union-attr]
        of_interval: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        totals: dict[Any, Counter[str]] = defaultdict(Counter)
        owned = set()
        for key, row in self.world.state.written.items():
            if key[0] != rows.ASSET or row is None:
                continue
            assert isinstance(row, AssetRow)
            held = [(item.from_wh, item.to_wh) for item in row.held]
            held_wh = sum(high - low for low, high in held)
            assert row.issued_wh == held_wh + row.delivered_wh + row.withdrawn_wh + row.expired_wh
            assert row.delivered_wh == delivered[key[1:]]
            assert row.deliveries >= len(ranges[key[1:]])
            of_interval[key[1:4]] += held + ranges[key[1:]]
            owned |= {(item.owner, *key[1:]) for item in row.held}
            total = totals[key[1], row.source]
            total.update(issued_wh=row.issued_wh, held_wh=held_wh, delivered_wh=row.delivered_wh)
            total.update(withdrawn_wh=row.withdrawn_wh, expired_wh=row.expired_wh)
        for spans in of_interval.values():
            end = 0
            for low, high in sorted(spans):
                assert end <= low < high, "the ranges of an interval are disjoint over its revisions"
                end = high
        index = {key[1:] for key, row in self.world.state.written.items() if key[0] == rows.OWNED and row is not None}
        assert index == owned
        mandated = {
            key[1:] for key, row in self.world.state.written.items() if key[0] == rows.MANDATED and row is not None
        }
        assert mandated == {("b1", *key[1:]) for key in owned if key[0] == ("bob" if key[2] == "south-1" else "alice")}
        for key, row in self.world.state.written.items():
            if key[0] == rows.TOTAL and row is not None:
                assert row._asdict() == {name: totals[key[1:]][name] for name in row._fields}
            elif key[0] == rows.DEMAND and row is not None:
                assert row.delivered_wh == given[key[1:]] <= row.demanded_wh  # type: ignore[union-attr]

    @invariant()
    def a_metered_row_says_what_its_assets_say(self) -> None:
        for (device, start_s), energy_wh in self.metered.items():
            row = self.world.get(rows.METERED, start_s, device, 0)
            found = [self.world.get(*rows.asset_key(asset(device, start_s, revision))) for revision in range(64)]
            assets = [item for item in found if item is not None]
            issued_wh = sum(item.issued_wh for item in assets)
            net_wh = issued_wh - sum(item.withdrawn_wh for item in assets)
            if row is None:
                assert (self.revisions[device, start_s], energy_wh) == (0, net_wh)
            else:
                assert tuple(row) == (self.revisions[device, start_s], energy_wh, issued_wh, net_wh)

    def teardown(self) -> None:
        """The same operations, as few batches as can be, must come to the same rows."""
        other = World.set_up(FOUNDED)
        waiting: list[Operation] = []
        for number, (by, operation) in enumerate(self.accepted):
            waiting.append(operation)
            if number + 1 == len(self.accepted) or self.accepted[number + 1][0] != by:
                other.apply(*waiting, by=by, not_after_s=LATER)
                waiting = []
        assert _lasting(other) == _lasting(self.world)


def _lasting(world: World) -> dict[Any, Any]:
    return {key: row for key, row in world.state.written.items() if key[0] != rows.APPLIED and row is not None}


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=settings().max_examples // 2, stateful_step_count=50, deadline=None)
