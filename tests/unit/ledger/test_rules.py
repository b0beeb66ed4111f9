"""What the rules do with good batches, and that the books balance whatever comes."""

from calendar import monthrange
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
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
    deliver,
    end_mandate,
    issue,
    mandate,
    order,
    pseudonym,
    register,
    seal,
    sell,
    take,
)

from broker.ledger import state as rows
from broker.ledger.faults import Fault, LedgerInvariantBroken, RuleViolation
from broker.ledger.opening import charter_of, open_batch
from broker.ledger.operations import Operation, Transfer, Void, Window
from broker.ledger.rules import apply_batch
from broker.ledger.rules.delivery import _month_of
from broker.ledger.state import Held, Overlay, TotalRow
from broker.protocol.errors import BadSignature, MalformedMessage, UnknownKey
from broker.protocol.messages import Role
from broker.protocol.sources import Source

NEXT = T0 + INTERVAL_S


def held(world: World, device: str = "solar-1", start_s: int = T0) -> tuple[Held, ...]:
    return world.get(*rows.asset_key(asset(device, start_s))).held


def total(world: World, source: Source = Source.SOLAR, start_s: int = T0) -> TotalRow:
    found: TotalRow = world.get(rows.TOTAL, start_s, int(source))
    return found


def test_the_main_job_from_issue_to_close() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 1_000))
    assert held(world) == (Held(0, 1_000, "b1"),)
    assert world.get(rows.OWNED, "b1", T0, "solar-1", 0, 0) is not None
    assert world.get(rows.OWNED, "alice", T0, "solar-1", 0, 0) is None

    sealed = seal(order(), "b2")
    world.apply(sell("solar-1", 600, 1_000, sealed))
    world.apply(deliver(7, 300, ("solar-1", 600, 900)), by="b2")
    world.apply(deliver(1, 700, ("solar-1", 0, 600)), close())
    assert held(world) == (Held(900, 1_000, "b2"),)
    assert total(world) == TotalRow(1_000, 100, 900, 0, 0)
    assert world.get(rows.DEMAND, T0, pseudonym(1)).delivered_wh == 600
    assert world.get(rows.ORDER, "b2", b"o" * 16).used_wh == 400
    assert world.get(rows.CLOCK, "b1").time_s == NEXT
    assert world.get(rows.SLICE, T0, "solar-1", 0, 0, 600).broker == "b2"


def test_one_asset_over_ten_thousand_consumers_keeps_its_row_small() -> None:
    world = World.set_up()
    world.apply(admit("big", capacity_w=100_000), mandate("big"), issue("big", 10_000), take("big", 0, 10_000))
    for start in range(0, 10_000, 2_500):
        world.apply(*(deliver(i, 1, ("big", i, i + 1)) for i in range(start, start + 2_500)))
    assert held(world, "big") == ()
    assert total(world) == TotalRow(10_000, 0, 10_000, 0, 0)


def test_statements_said_twice_change_nothing() -> None:
    world = World.set_up()
    before = dict(world.state.written)
    world.apply(register("b1"), admit("solar-1"), mandate("solar-1"))
    changed = {key for key, row in world.state.written.items() if before.get(key) != row}
    assert {key[0] for key in changed} == {rows.APPLIED}


def test_a_mandate_passes_to_the_next_broker_at_its_end() -> None:
    world = World.set_up()
    world.apply(end_mandate("solar-1", NEXT), mandate("solar-1", broker="b2", from_s=NEXT))
    world.apply(issue("solar-1", 10), issue("solar-1", 20, NEXT))
    world.apply(take("solar-1", 0, 10))
    world.apply(take("solar-1", 0, 20, broker="b2", start_s=NEXT), by="b2")
    with pytest.raises(RuleViolation):
        world.apply(take("solar-1", 0, 20, start_s=NEXT))
    assert held(world) == (Held(0, 10, "b1"),), "what the broker owns by then stays"


def test_anyone_registered_as_a_broker_may_submit_a_reading() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), by="b2")
    assert held(world) == (Held(0, 1_000, "alice"),)


def test_readings_at_the_capacity_are_accepted() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 2_200))
    assert total(world).issued_wh == 2_200


def test_a_void_of_somebody_elses_order_changes_nothing() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 1_000), Void(b"o" * 16))
    world.apply(sell("solar-1", 0, 500, seal(order(), "b2")))
    assert held(world) == (Held(0, 500, "b2"), Held(500, 1_000, "b1"))


def test_slices_of_one_owner_are_joined_again() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 100))
    for start in (0, 20, 10):
        world.apply(take("solar-1", start, start + 10))
    assert held(world) == (Held(0, 30, "b1"), Held(30, 100, "alice"))


def test_late_clearing_after_the_own_close_is_accepted() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 100), take("solar-1", 0, 100), close())
    world.apply(deliver(1, 10, ("solar-1", 0, 10)), close(revision=1, demands=2, demanded_wh=110))
    assert world.get(rows.CLOSED, "b1", T0).revision == 1
    assert world.get(rows.CLOCK, "b1").time_s == NEXT


def test_an_order_for_an_interval_is_served_in_parts() -> None:
    world = World.set_up()
    sealed = seal(order(), "b2")
    world.apply(issue("solar-1", 1_000), take("solar-1", 0, 1_000), sell("solar-1", 0, 300, sealed))
    world.apply(sell("solar-1", 300, 500, sealed))
    assert world.get(rows.ORDER, "b2", b"o" * 16).used_wh == 500


def test_energy_goes_back_along_the_path_of_an_order_that_was_passed_on() -> None:
    """b3 asks b2, which passes that on to b1: two orders, two transfers, each signed by who receives."""
    world = World.set_up()
    world.apply(register("b3"), by="b3")
    world.apply(issue("solar-1", 300), take("solar-1", 0, 300))
    passed_on = seal(order(path=("b3", "b2", "b1"), parent=b"p" * 16), "b2")
    asked = seal(order(order_id=b"p" * 16, requester="b3", path=("b3", "b2")), "b3")
    with pytest.raises(RuleViolation) as caught:
        world.apply(sell("solar-1", 0, 300, asked, receiver="b3"))
    assert caught.value.code is Fault.ORDER_SUPPLIER, "b3 asked b2, and b1 cannot serve that past b2"
    world.apply(sell("solar-1", 0, 300, passed_on))
    world.apply(Transfer(asset("solar-1"), 0, 300, "b2", "b3", 130, asked), by="b2")
    assert held(world) == (Held(0, 300, "b3"),)


@pytest.mark.parametrize("path", [("b1",), ("b4", "b3", "b2", "b1")])
def test_an_order_names_two_brokers_or_three(path: tuple[str, ...]) -> None:
    world = World.set_up()
    world.apply(register("b3"), by="b3")
    world.apply(register("b4"), by="b4")
    world.apply(issue("solar-1", 300), take("solar-1", 0, 300))
    with pytest.raises(RuleViolation) as caught:
        world.apply(sell("solar-1", 0, 300, seal(order(path=path), "b2")))
    assert caught.value.code is Fault.ORDER_STATEMENT
    assert "path" in caught.value.reason


@pytest.mark.parametrize(
    ("window", "asset_start_s", "fits"),
    [
        (Window.INTERVAL, T0, True),
        (Window.INTERVAL, T0 - INTERVAL_S, False),
        (Window.DAY, T0 + 86_400 - INTERVAL_S, True),
        (Window.DAY, T0 + 86_400, False),
        (Window.DAY, T0 - INTERVAL_S, False),
        (Window.MONTH, T0 - 13 * 86_400, True),  # 1 November
        (Window.MONTH, T0 - 13 * 86_400 - INTERVAL_S, False),
        (Window.MONTH, T0 + 17 * 86_400 - INTERVAL_S, True),
        (Window.MONTH, T0 + 17 * 86_400, False),  # 1 December
    ],
)
def test_windows(window: Window, asset_start_s: int, fits: bool) -> None:
    world = World.set_up()
    world.apply(
        register("carol", Role.PROVIDER),
        admit("hydro-1", owner="carol", source=Source.HYDRO),
        mandate("hydro-1", owner="carol", from_s=0),
        issue("hydro-1", 10, asset_start_s),
        take("hydro-1", 0, 10, owner="carol", start_s=asset_start_s),
    )
    operation = deliver(1, 10, ("hydro-1", 0, 10), start_s=asset_start_s)
    operation = replace(operation, start_s=T0, end_s=NEXT, window=window)
    if fits:
        world.apply(operation)
    else:
        with pytest.raises(RuleViolation) as caught:
            world.apply(operation)
        assert caught.value.code is Fault.OUTSIDE_WINDOW


def test_months_agree_with_the_calendar() -> None:
    moment = datetime(1970, 1, 1, tzinfo=UTC)
    while moment.year < 2404:
        last = moment + timedelta(days=monthrange(moment.year, moment.month)[1], seconds=-1)
        expected = (moment.year, moment.month - 1)
        assert _month_of(int(moment.timestamp())) == _month_of(int(last.timestamp())) == expected
        moment = last + timedelta(seconds=1)
    assert _month_of(2**53) > (9_999, 0), "no time is too late for integer arithmetic"


def test_applied_ids_are_forgotten_once_the_batch_is_past() -> None:
    world = World.set_up()
    raw = batch(issue("solar-1", 10), not_after_s=NEXT)
    opened = world.apply_raw(raw)
    key = (rows.APPLIED, "b1", NEXT, opened.batch_id)
    assert world.state.get(key) is not None
    with pytest.raises(RuleViolation) as caught:
        world.apply_raw(raw)
    assert caught.value.code is Fault.ALREADY_APPLIED
    world.apply(close())
    assert world.state.get(key) is None
    with pytest.raises(RuleViolation) as caught:
        world.apply_raw(raw)
    assert caught.value.code is Fault.EXPIRED


def test_a_brokers_first_batch_carries_its_registration() -> None:
    world = World.set_up()
    with pytest.raises(UnknownKey):
        world.apply(Void(b"o" * 16), by="b3")
    with pytest.raises(UnknownKey):
        world.apply(register("b4"), by="b3")
    with pytest.raises(UnknownKey, match="not registered"):
        world.apply(register("b3", by="b3"), by="b3")
    with pytest.raises(UnknownKey):
        world.apply(admit("solar-9"), by="b3")
    world.apply(register("b3"), register("carol", Role.PROVIDER), by="b3")
    world.apply(Void(b"o" * 16), by="b3")


def test_a_provider_introduces_itself_and_submits_its_own_readings() -> None:
    world = World.set_up()
    world.apply(register("carol", Role.PROVIDER), admit("hydro-1", owner="carol", source=Source.HYDRO), by="carol")
    raw = batch(issue("hydro-1", 700), by="carol")
    opened = world.apply_raw(raw)
    assert held(world, "hydro-1") == (Held(0, 700, "carol"),)
    asked = order(source=Source.HYDRO, path=("b2", "carol"))
    world.apply(Transfer(asset("hydro-1"), 0, 300, "carol", "b2", 100, seal(asked, "b2")), by="carol")
    assert held(world, "hydro-1") == (Held(0, 300, "b2"), Held(300, 700, "carol"))
    world.apply(close())
    assert world.get(rows.APPLIED, "carol", T0 + 86_400, opened.batch_id) is not None, "it has no clock that moves"
    with pytest.raises(RuleViolation) as caught:
        world.apply_raw(raw)
    assert caught.value.code is Fault.ALREADY_APPLIED


def test_a_batch_is_checked_with_the_key_that_is_registered_when_it_is_applied() -> None:
    world = World.set_up()
    opened = open_batch(batch(Void(b"o" * 16)), world.state, CHARTER)
    with pytest.raises(RuleViolation) as caught:
        apply_batch(Overlay(world.state), CHARTER, replace(opened, key_id=b"other"))
    assert caught.value.code is Fault.NOT_REGISTERED


def test_forged_batches_are_not_of_anyone() -> None:
    world = World.set_up()
    raw = batch(Void(b"o" * 16))
    with pytest.raises(BadSignature):
        world.apply_raw(raw[:-1] + bytes((raw[-1] ^ 1,)))
    with pytest.raises(MalformedMessage, match="a batch"):
        world.apply_raw(seal(order(), "b2"))


def test_a_genesis_with_a_wrong_calendar_founds_nothing() -> None:
    with pytest.raises(ValueError, match="interval_s"):
        charter_of(replace(GENESIS, interval_s=1_000))


def test_books_that_do_not_balance_stop_the_ledger() -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 100))
    broken = total(world)._replace(issued_wh=99)
    world.state.put((rows.TOTAL, T0, int(Source.SOLAR)), broken)
    with pytest.raises(LedgerInvariantBroken):
        world.apply(issue("solar-1", 10, NEXT), admit("solar-2"), mandate("solar-2"), issue("solar-2", 10))


def test_the_state_hash_does_not_depend_on_block_borders() -> None:
    operations: list[Operation] = [issue("solar-1", 1_000), take("solar-1", 0, 1_000), deliver(1, 9, ("solar-1", 0, 9))]
    one, other = World.set_up(), World.set_up()
    for operation in operations:
        one.apply(operation)
    for operation in operations:
        other.step.finish_block(seal(other.step.block((b"x",)), "node"))
        other.apply(operation)
    assert one.step.state_hash == other.step.state_hash
    other.apply(Void(b"q" * 16))
    assert one.step.state_hash != other.step.state_hash


# Two brokers do whatever they like; the reference model is a set of single Wh.

DEVICES = {"solar-1": "alice", "wind-1": "alice", "south-1": "bob"}


class Market(RuleBasedStateMachine):
    """Random operations, good and bad, against a model in which every Wh is one entry of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.owner: dict[tuple[str, int], str] = {}
        self.delivered: dict[tuple[str, int], bytes] = {}
        self.demanded: dict[bytes, int] = {}
        self.orders = 0
        self.attempts = 0

    @initialize()
    def set_up(self) -> None:
        self.world = World.set_up()

    def attempt(self, operation: Operation, by: str) -> bool:
        # Another not-after each time, so that no two batches are the same.
        self.attempts += 1
        try:
            self.world.apply(operation, by=by, not_after_s=T0 + 86_400 + self.attempts)
        except RuleViolation:
            return False
        return True

    @rule(device=st.sampled_from(sorted(DEVICES)), energy_wh=st.integers(0, 60))
    def issues(self, device: str, energy_wh: int) -> None:
        known = any(owned == device for owned, _ in [*self.owner, *self.delivered])
        accepted = self.attempt(issue(device, energy_wh), "b1")
        assert accepted == (energy_wh > 0 and not known)
        if accepted:
            self.owner.update({(device, wh): DEVICES[device] for wh in range(energy_wh)})

    @rule(
        device=st.sampled_from(sorted(DEVICES)),
        start=st.integers(0, 60),
        length=st.integers(0, 30),
        sender=st.sampled_from(["alice", "bob", "b1", "b2"]),
        receiver=st.sampled_from(["alice", "b1", "b2"]),
        by=st.sampled_from(["b1", "b2"]),
        with_order=st.booleans(),
    )
    def transfers(
        self, device: str, start: int, length: int, sender: str, receiver: str, by: str, with_order: bool
    ) -> None:
        wanted = [(device, wh) for wh in range(start, start + length)]
        sealed = None
        if with_order:
            self.orders += 1
            source = Source.WIND if device == "wind-1" else Source.SOLAR
            asked = order(
                order_id=self.orders.to_bytes(16, "big"), requester=receiver, source=source, path=(receiver, by)
            )
            sealed = seal(asked, receiver)
        accepted = self.attempt(Transfer(asset(device), start, start + length, sender, receiver, 1, sealed), by)
        mine = sender == by or (sender == DEVICES[device] and by == "b1" and receiver == "b1")
        needs_order = receiver in ("b1", "b2") and receiver != by
        possible = (
            mine
            and length > 0
            and sender != receiver
            and with_order == needs_order
            and all(self.owner.get(wh) == sender for wh in wanted)
        )
        assert accepted == possible
        if accepted:
            self.owner.update(dict.fromkeys(wanted, receiver))

    @rule(
        consumer=st.integers(0, 3),
        demanded_wh=st.integers(0, 40),
        device=st.sampled_from(sorted(DEVICES)),
        start=st.integers(0, 60),
        length=st.integers(1, 30),
        area=st.sampled_from(["north", "south"]),
        by=st.sampled_from(["b1", "b2"]),
    )
    def delivers(
        self, consumer: int, demanded_wh: int, device: str, start: int, length: int, area: str, by: str
    ) -> None:
        # A consumer belongs to one broker, and most of the time says the same demand again.
        name = pseudonym(consumer * 2 + (by == "b2"))
        demanded_wh = self.demanded.get(name, demanded_wh)
        wanted = [(device, wh) for wh in range(start, start + length)]
        operation = replace(deliver(0, demanded_wh, (device, start, start + length), area=area), pseudonym=name)
        accepted = self.attempt(operation, by)
        got = sum(consumer == name for consumer in self.delivered.values())
        possible = (
            all(self.owner.get(wh) == by for wh in wanted)
            and (area == "south") == (device == "south-1")
            and got + length <= demanded_wh
        )
        assert accepted == possible
        if accepted:
            self.demanded[name] = demanded_wh
            for wh in wanted:
                del self.owner[wh]
                self.delivered[wh] = name

    @invariant()
    def ledger_and_model_agree(self) -> None:
        state = self.world.state.written
        owner = {
            (key[2], wh): slice_.owner
            for key, row in state.items()
            if key[0] == rows.ASSET
            for slice_ in row.held
            for wh in range(slice_.from_wh, slice_.to_wh)
        }
        delivered = {
            (key[2], wh): row.pseudonym
            for key, row in state.items()
            if key[0] == rows.SLICE
            for wh in range(key[5], row.to_wh)
        }
        assert owner == self.owner
        assert delivered == self.delivered
        index = {key[1:] for key, row in state.items() if key[0] == rows.OWNED and row is not None}
        assert index == {(name, T0, device, 0, 0) for (device, _), name in owner.items()}
        got: dict[bytes, int] = defaultdict(int)
        for name in delivered.values():
            got[name] += 1
        assert {key[2]: row.delivered_wh for key, row in state.items() if key[0] == rows.DEMAND} == got
        for key, row in state.items():
            if key[0] == rows.TOTAL:
                assert row.issued_wh == row.held_wh + row.delivered_wh + row.withdrawn_wh + row.expired_wh


TestMarket = Market.TestCase
TestMarket.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), max_size=12))
def test_deliveries_never_overlap(ranges: list[tuple[int, int]]) -> None:
    world = World.set_up()
    world.apply(issue("solar-1", 25), take("solar-1", 0, 25))
    taken: set[int] = set()
    for number, (start, length) in enumerate(ranges):
        wanted = set(range(start, start + length))
        operation = deliver(number, 100, ("solar-1", start, start + length))
        if wanted & taken or start + length > 25:
            with pytest.raises(RuleViolation):
                world.apply(operation)
        else:
            world.apply(operation)
            taken |= wanted
    assert total(world).delivered_wh == len(taken)
