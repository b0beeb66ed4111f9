"""Sourcing: every state against every event, whom a plan asks, and how orders are shared out."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.market.sourcing import (
    Grant,
    IllegalTransition,
    NeighbourOffer,
    OpenOrder,
    PlannedOrder,
    RequesterEvent,
    RequesterState,
    SupplierEvent,
    SupplierState,
    grants,
    next_requester_state,
    next_resend_s,
    next_supplier_state,
    order_id_for,
    plan_orders,
    supplier_answer,
)
from broker.protocol.messages import ORDER_ID_BYTES, AnswerStatus
from broker.protocol.sources import Source, SourceGroup

LIMITS = dict.fromkeys(Source, 10)
SOLAR, WIND, HYDRO, COAL = Source.SOLAR, Source.WIND, Source.HYDRO, Source.COAL

# Written out once more by hand; "-" is illegal. Columns in the order of the events.
REQUESTER = {
    # SENT_AGAIN, ANSWERED_PASSED_ON, ANSWERED_DONE, ANSWERED_REFUSED, PART_SEEN, ALL_SEEN, END_SEEN
    "ASKED": "ASKED PASSED_ON COMING REFUSED COMING SEEN VOID",
    "PASSED_ON": "PASSED_ON PASSED_ON COMING REFUSED PASSED_ON SEEN VOID",
    "COMING": "COMING PASSED_ON COMING SEEN COMING SEEN VOID",
    "REFUSED": "- REFUSED REFUSED REFUSED SEEN SEEN VOID",
    "SEEN": "- SEEN SEEN SEEN SEEN SEEN SEEN",
    "VOID": "- VOID VOID VOID - - VOID",
}
SUPPLIER = {
    # RECEIVED_AGAIN, GRANTED, ASKED_OTHERS, DECLINED, BATCH_COMMITTED, BATCH_REFUSED, END_SEEN
    "RECEIVED": "RECEIVED SUBMITTED PASSED_ON REFUSED - - DEAD",
    "PASSED_ON": "PASSED_ON SUBMITTED - REFUSED COMMITTED - DEAD",
    "REFUSED": "REFUSED - - - - - REFUSED",
    "SUBMITTED": "SUBMITTED - - - COMMITTED DEAD DEAD",
    "COMMITTED": "COMMITTED - - - COMMITTED - COMMITTED",
    "DEAD": "DEAD - - - - DEAD DEAD",
}


@pytest.mark.parametrize("event", RequesterEvent)
@pytest.mark.parametrize("state", RequesterState)
def test_every_requester_state_against_every_event(state: RequesterState, event: RequesterEvent) -> None:
    expected = REQUESTER[state.name].split()[list(RequesterEvent).index(event)]
    if expected == "-":
        with pytest.raises(IllegalTransition, match=event.name.lower()) as caught:
            next_requester_state(state, event)
        assert (caught.value.state, caught.value.event) == (state, event)
    else:
        assert next_requester_state(state, event) is RequesterState[expected]


@pytest.mark.parametrize("event", SupplierEvent)
@pytest.mark.parametrize("state", SupplierState)
def test_every_supplier_state_against_every_event(state: SupplierState, event: SupplierEvent) -> None:
    expected = SUPPLIER[state.name].split()[list(SupplierEvent).index(event)]
    if expected == "-":
        with pytest.raises(IllegalTransition, match=event.name.lower()) as caught:
            next_supplier_state(state, event)
        assert (caught.value.state, caught.value.event) == (state, event)
    else:
        assert next_supplier_state(state, event) is SupplierState[expected]


@pytest.mark.parametrize("state", RequesterState)
@pytest.mark.parametrize(
    "event", [RequesterEvent.ANSWERED_PASSED_ON, RequesterEvent.ANSWERED_DONE, RequesterEvent.ANSWERED_REFUSED]
)
def test_no_answer_of_a_peer_can_be_illegal(state: RequesterState, event: RequesterEvent) -> None:
    next_requester_state(state, event)


@pytest.mark.parametrize("state", SupplierState)
@pytest.mark.parametrize("event", [SupplierEvent.RECEIVED_AGAIN, SupplierEvent.END_SEEN])
def test_nothing_that_a_peer_sends_or_puts_on_the_ledger_can_be_illegal(
    state: SupplierState, event: SupplierEvent
) -> None:
    next_supplier_state(state, event)


def test_an_order_that_comes_again_gets_the_same_answer_in_the_same_state() -> None:
    for state in SupplierState:
        assert next_supplier_state(state, SupplierEvent.RECEIVED_AGAIN) is state
    assert {state.name: supplier_answer(state) for state in SupplierState} == {
        "RECEIVED": None,
        "PASSED_ON": AnswerStatus.PASSED_ON,
        "REFUSED": AnswerStatus.REFUSED,
        "SUBMITTED": None,
        "COMMITTED": AnswerStatus.DONE,
        "DEAD": AnswerStatus.REFUSED,
    }


def test_an_order_id_is_the_same_after_a_restart_and_differs_in_every_part() -> None:
    named = ("west", SOLAR, 1_800, 0, "east")
    assert order_id_for(*named).hex() == "859a81325705c76093c3f210c0feccd8"
    others = {
        order_id_for("south", SOLAR, 1_800, 0, "east"),
        order_id_for("west", WIND, 1_800, 0, "east"),
        order_id_for("west", SOLAR, 3_600, 0, "east"),
        order_id_for("west", SOLAR, 1_800, 1, "east"),
        order_id_for("west", SOLAR, 1_800, 0, "north"),
        order_id_for("west", SOLAR, 1_800, 0, "east", b"parent"),
        order_id_for(*named),
    }
    assert len(others) == 7
    assert {len(order_id) for order_id in others} == {ORDER_ID_BYTES}


def test_resends_back_off_to_half_a_minute() -> None:
    assert [next_resend_s(attempts, 0) for attempts in range(1, 9)] == [1, 2, 4, 8, 15, 30, 30, 30]


def test_a_resend_comes_up_to_half_its_wait_earlier() -> None:
    waits = [next_resend_s(3, jitter) for jitter in range(256)]
    assert waits == sorted(waits, reverse=True)
    assert 2 < waits[-1] < waits[0] == 4
    assert len(set(waits)) == 256


def offer(neighbour: str, source: Source, energy_wh: int, price: int = 5) -> NeighbourOffer:
    return NeighbourOffer(neighbour, source, energy_wh, price)


def order(neighbour: str, source: Source, energy_wh: int) -> PlannedOrder:
    return PlannedOrder(neighbour, source, energy_wh, 10)


@pytest.mark.parametrize(
    ("shortages", "groups", "neighbours", "offers", "expected"),
    [
        pytest.param({}, {}, ["east"], [], [], id="nothing short, nothing asked"),
        pytest.param({WIND: 50}, {}, [], [], [], id="no neighbour, nobody to ask"),
        pytest.param({WIND: 0}, {}, ["east"], [], [], id="a shortage of nothing is none"),
        pytest.param(
            {WIND: 50}, {}, ["east"], [], [order("east", WIND, 50)], id="a neighbour that announced nothing is asked"
        ),
        pytest.param(
            {WIND: 50}, {}, ["east"], [offer("east", WIND, 20)], [order("east", WIND, 50)], id="a hint is only a hint"
        ),
        pytest.param(
            {WIND: 50},
            {},
            ["east", "south"],
            [offer("east", WIND, 30), offer("south", WIND, 40)],
            [order("east", WIND, 10), order("south", WIND, 40)],
            id="of two at one price, who announced most comes first",
        ),
        pytest.param(
            {WIND: 50},
            {},
            ["east", "south"],
            [offer("east", WIND, 30, 4), offer("south", WIND, 40)],
            [order("east", WIND, 30), order("south", WIND, 20)],
            id="the cheapest comes first",
        ),
        pytest.param(
            {WIND: 90},
            {},
            ["east", "south"],
            [offer("east", WIND, 30), offer("south", WIND, 40)],
            [order("east", WIND, 30), order("south", WIND, 60)],
            id="what nobody announced is asked of who announced most",
        ),
        pytest.param(
            {WIND: 50}, {}, ["south", "east"], [], [order("east", WIND, 50)], id="without hints the first name is asked"
        ),
        pytest.param({WIND: 50}, {}, ["east"], [offer("east", WIND, 90, 11)], [], id="too dear is left alone"),
        pytest.param(
            {WIND: 50},
            {},
            ["east"],
            [offer("stranger", WIND, 90)],
            [order("east", WIND, 50)],
            id="who is no neighbour is not asked",
        ),
        pytest.param(
            {},
            {SourceGroup.RENEWABLE: 50},
            ["east"],
            [offer("east", WIND, 30), offer("east", HYDRO, 40), offer("east", COAL, 900)],
            [order("east", WIND, 10), order("east", HYDRO, 40)],
            id="a group takes, at one price, the member that is announced most",
        ),
        pytest.param(
            {WIND: 30},
            {SourceGroup.ANY: 20},
            ["east"],
            [offer("east", WIND, 35), offer("east", COAL, 10)],
            [order("east", WIND, 35), order("east", COAL, 15)],
            id="single sources come first, and one order holds both",
        ),
        pytest.param(
            {}, {SourceGroup.FOSSIL: 9}, ["east"], [], [order("east", Source.OIL, 9)], id="a group without any hint"
        ),
    ],
)
def test_whom_a_plan_asks(
    shortages: dict[Source, int],
    groups: dict[SourceGroup, int],
    neighbours: list[str],
    offers: list[NeighbourOffer],
    expected: list[PlannedOrder],
) -> None:
    assert plan_orders(shortages, groups, neighbours, offers, LIMITS) == tuple(expected)


def test_of_two_alike_the_one_that_gave_more_before_is_asked() -> None:
    offers = [offer("east", WIND, 50), offer("south", WIND, 50)]
    trust = {"east": 400_000, "south": 500_000}
    assert plan_orders({WIND: 50}, {}, ["east", "south"], offers, LIMITS, (), trust) == (order("south", WIND, 50),)
    assert plan_orders({WIND: 50}, {}, ["east", "south"], [], LIMITS, (), trust) == (order("south", WIND, 50),)


def test_where_nothing_is_announced_whoever_forecast_most_is_asked() -> None:
    trust = {"east": 400_000, "south": 500_000}
    expected_wh = {("east", WIND): 100}
    planned = plan_orders({WIND: 50}, {}, ["east", "south"], [], LIMITS, (), trust, (), expected_wh)
    assert planned == (order("east", WIND, 50),)
    # What is announced counts more than what was expected.
    offers = [NeighbourOffer("south", WIND, 50, 1)]
    planned = plan_orders({WIND: 50}, {}, ["east", "south"], offers, LIMITS, (), trust, (), expected_wh)
    assert planned == (order("south", WIND, 50),)


def test_what_nobody_has_is_asked_of_who_knows_somebody() -> None:
    through = [offer("south", WIND, 90)]
    own = [offer("east", WIND, 20)]
    plan = plan_orders({WIND: 50}, {}, ["east", "south"], own, LIMITS, through=through)
    assert plan == (order("east", WIND, 20), order("south", WIND, 30))
    fossil = plan_orders({}, {SourceGroup.FOSSIL: 9}, ["east"], [], LIMITS, through=[offer("east", COAL, 20)])
    assert fossil == (order("east", COAL, 9),)


def test_a_source_that_nobody_pays_for_is_not_asked_for() -> None:
    assert plan_orders({WIND: 50}, {}, ["east"], [], {SOLAR: 10}) == ()


def test_who_has_answered_is_not_asked_for_the_same_source_again() -> None:
    asked = {("east", WIND)}
    assert plan_orders({WIND: 50}, {}, ["east"], [], LIMITS, asked) == ()
    assert plan_orders({WIND: 50}, {}, ["east", "south"], [], LIMITS, asked) == (order("south", WIND, 50),)
    assert plan_orders({SOLAR: 50}, {}, ["east"], [], LIMITS, asked) == (order("east", SOLAR, 50),)
    fossil = {SourceGroup.FOSSIL: 9}
    assert plan_orders({}, fossil, ["east"], [], LIMITS, {("east", Source.OIL)}) == (order("east", COAL, 9),)


NEIGHBOURS = ("east", "north", "south")
OFFERS = st.lists(
    st.builds(NeighbourOffer, st.sampled_from(NEIGHBOURS), st.sampled_from(Source), st.integers(0, 90), st.just(1)),
    unique_by=lambda one: (one.neighbour, one.source),
)


@given(
    st.dictionaries(st.sampled_from(Source), st.integers(0, 100)),
    st.dictionaries(st.sampled_from(SourceGroup), st.integers(0, 100)),
    st.lists(st.sampled_from(NEIGHBOURS), unique=True, min_size=1),
    OFFERS,
)
def test_every_short_wh_is_asked_of_exactly_one_neighbour(
    shortages: dict[Source, int],
    groups: dict[SourceGroup, int],
    neighbours: list[str],
    offers: list[NeighbourOffer],
) -> None:
    plan = plan_orders(shortages, groups, neighbours, offers, LIMITS)
    assert sum(one.energy_wh for one in plan) == sum(shortages.values()) + sum(groups.values())
    assert all(one.energy_wh > 0 and one.neighbour in neighbours for one in plan)
    assert max(Counter((one.neighbour, one.source) for one in plan).values(), default=1) == 1
    for source, short_wh in shortages.items():
        assert sum(one.energy_wh for one in plan if one.source is source) >= short_wh
    assert plan == plan_orders(shortages, groups, neighbours[::-1], offers[::-1], LIMITS)


def asks(name: int, requester: str, energy_wh: int, source: Source = WIND, highest_price: int = 10) -> OpenOrder:
    return OpenOrder(bytes([name]) * ORDER_ID_BYTES, requester, source, energy_wh, highest_price)


def amounts(granted: tuple[Grant, ...]) -> list[int]:
    return [grant.energy_wh for grant in granted]


def test_orders_are_shared_out_in_proportion() -> None:
    orders = [asks(1, "west", 300), asks(2, "south", 100)]
    assert amounts(grants(orders, {WIND: {5: 200}})) == [150, 50]
    assert amounts(grants(orders, {WIND: {5: 900}})) == [300, 100]


def test_the_odd_wh_goes_by_requester_name_then_order_id() -> None:
    orders = [asks(9, "west", 10), asks(2, "south", 10), asks(1, "west", 10)]
    assert amounts(grants(orders, {WIND: {5: 10}})) == [3, 4, 3]
    assert amounts(grants(orders, {WIND: {5: 11}})) == [3, 4, 4]


def test_an_order_that_gets_nothing_gets_a_reason() -> None:
    orders = [asks(1, "west", 10, SOLAR), asks(2, "west", 10, WIND, 4), asks(3, "a", 9), asks(4, "b", 1)]
    first, second, third, fourth = grants(orders, {WIND: {5: 1}})
    assert first == Grant(orders[0].order_id, (), "no solar left in this interval")
    assert second.reason == "wind costs 5 µ/kWh here, above the order's highest price 4"
    assert third == Grant(orders[2].order_id, ((5, 1),))
    assert fourth == Grant(orders[3].order_id, (), "no wind left after sharing out among 2 orders")


def test_nobody_gets_energy_above_their_limit_and_lower_limits_get_the_cheaper() -> None:
    low, high = asks(1, "west", 60, highest_price=5), asks(2, "south", 60, highest_price=9)
    granted = grants([high, low], {WIND: {7: 30, 5: 70}})
    assert [grant.parts for grant in granted] == [((5, 23), (7, 30)), ((5, 47),)]
    # With enough for all, nobody is given the dear while there is cheaper.
    assert grants([high], {WIND: {7: 30, 5: 70}})[0].parts == ((5, 60),)


ORDERS = st.lists(
    st.builds(
        asks,
        st.integers(0, 255),
        st.sampled_from(["west", "south", "north"]),
        st.integers(1, 100),
        st.sampled_from([WIND, SOLAR]),
        st.sampled_from([4, 10]),
    ),
    unique_by=lambda one: one.order_id,
)


OFFERED = st.dictionaries(st.sampled_from([WIND, SOLAR]), st.dictionaries(st.integers(3, 11), st.integers(0, 100)))


@given(ORDERS, OFFERED)
def test_grants_never_exceed_stock_order_or_limit_and_leave_nothing_that_is_wanted(
    orders: list[OpenOrder], offered: dict[Source, dict[int, int]]
) -> None:
    result = grants(orders, offered)
    assert [grant.order_id for grant in result] == [one.order_id for one in orders]
    given: Counter[tuple[Source, int]] = Counter()
    for one, grant in zip(orders, result, strict=True):
        assert 0 <= grant.energy_wh <= one.energy_wh
        assert (grant.reason is None) == (grant.energy_wh > 0)
        for price, energy_wh in grant.parts:
            assert energy_wh > 0
            assert price <= one.highest_price
            given[one.source, price] += energy_wh
    for (source, price), energy_wh in given.items():
        assert energy_wh <= offered[source][price]
    for one, grant in zip(orders, result, strict=True):
        if grant.energy_wh < one.energy_wh:
            for price, energy_wh in offered.get(one.source, {}).items():
                assert price > one.highest_price or given[one.source, price] == energy_wh


@given(ORDERS, OFFERED, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_grant(
    orders: list[OpenOrder], offered: dict[Source, dict[int, int]], shuffler: Random
) -> None:
    shuffled = list(orders)
    shuffler.shuffle(shuffled)
    by_id = {grant.order_id: grant for grant in grants(shuffled, offered)}
    assert [by_id[one.order_id] for one in orders] == list(grants(orders, offered))
