"""Arrangements for the day ahead: who wishes what of whom, what is promised, and what a promise is worth."""

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.market.arrangements import (
    Arranged,
    plan_wishes,
    read_rows,
    rows_of,
    share_out,
    shortages_of,
    surpluses_of,
)
from broker.market.forecast import COARSE_WH
from broker.market.mix import apportion
from broker.market.sourcing import NeighbourOffer, OpenOrder, PlannedOrder, grants, plan_orders
from broker.protocol.envelope import seal
from broker.protocol.keys import generate_private_key
from broker.protocol.limits import MAX_BROKER_MESSAGE_BYTES, MAX_INTEGER, MAX_NAME_CHARACTERS
from broker.protocol.messages import (
    MAX_ARRANGED_NEIGHBOURS,
    MAX_ARRANGED_ROWS,
    MAX_INTERVALS_OF_DAY,
    ORDER_ID_BYTES,
    DayAmount,
    Forecast,
    NeighbourAmounts,
    Promises,
    SourceOutlook,
    Wishes,
)
from broker.protocol.sources import Source, SourceGroup

SOLAR, WIND, HYDRO = Source.SOLAR, Source.WIND, Source.HYDRO
DAY_S = 86_400
DAY = 20_000 * DAY_S
NAMES = ("east", "north", "south")
TRUSTED = dict.fromkeys(NAMES, 1_000_000)

# Wishes


def test_a_forecast_says_what_to_wish_and_what_can_be_promised() -> None:
    forecast = Forecast(
        "west", DAY, DAY + DAY_S, (SourceOutlook(WIND, 2, 300, 0), SourceOutlook(SOLAR, 3, 0, 400)), (700,) * 48
    )
    assert shortages_of(forecast) == {(WIND, 2): 300}
    assert surpluses_of(forecast, DAY, 1_800) == {(SOLAR, 3): 400}
    # Of another day, or of intervals that the ledger does not have, it says nothing.
    assert surpluses_of(forecast, DAY - DAY_S, 1_800) == {}
    assert surpluses_of(forecast, DAY, 3_600) == {}


@pytest.mark.parametrize(
    ("short_wh", "left_wh", "trust_ppm", "expected"),
    [
        pytest.param({}, {"east": 900}, TRUSTED, {}, id="nothing short, nothing wished"),
        pytest.param({(WIND, 7): 500}, {}, TRUSTED, {}, id="nobody has any"),
        pytest.param({(WIND, 7): 500}, {"east": 300}, TRUSTED, {"east": 300}, id="no more than there is"),
        pytest.param(
            {(WIND, 7): 500}, {"east": 300, "south": 400}, TRUSTED, {"south": 400, "east": 100}, id="the largest first"
        ),
        pytest.param(
            {(WIND, 7): 500},
            {"east": 500, "south": 600},
            {"east": 1_000_000, "south": 800_000},
            {"east": 500},
            id="what is announced counts by how far it is trusted",
        ),
        pytest.param({(WIND, 7): 500}, {"south": 500, "east": 500}, TRUSTED, {"east": 500}, id="ties go by name"),
        pytest.param(
            {(WIND, 7): 500},
            {"west": 900, "east": 100},
            TRUSTED,
            {"east": 100},
            id="who may not be asked is not wished of",
        ),
        pytest.param({(WIND, 7): 99}, {"east": 900}, TRUSTED, {}, id="less than a step is not wished"),
        pytest.param({(WIND, 7): 250}, {"east": 190}, TRUSTED, {"east": 100}, id="whole steps only"),
    ],
)
def test_of_whom_a_broker_wishes_what_it_will_lack(
    short_wh: dict[tuple[Source, int], int],
    left_wh: dict[str, int],
    trust_ppm: dict[str, int],
    expected: dict[str, int],
) -> None:
    surplus = {name: {(WIND, 7): energy_wh, (WIND, 8): 10_000} for name, energy_wh in left_wh.items()}
    wishes = plan_wishes(short_wh, surplus, trust_ppm)
    assert wishes == {(name, WIND, 7): energy_wh for name, energy_wh in expected.items()}


PLACES = st.tuples(st.sampled_from([SOLAR, WIND]), st.integers(0, 3))
ENERGIES = st.dictionaries(PLACES, st.integers(0, 1_000))


@given(ENERGIES, st.dictionaries(st.sampled_from(NAMES), ENERGIES))
def test_every_short_wh_is_wished_of_one_neighbour_at_most_and_none_beyond_its_surplus(
    short_wh: dict[tuple[Source, int], int], left_wh: dict[str, dict[tuple[Source, int], int]]
) -> None:
    wishes = plan_wishes(short_wh, left_wh, TRUSTED)
    wished: Counter[tuple[Source, int]] = Counter()
    for (name, source, index), energy_wh in wishes.items():
        assert energy_wh % COARSE_WH == 0
        assert 0 < energy_wh <= left_wh[name][source, index]
        wished[source, index] += energy_wh
    for place, energy_wh in short_wh.items():
        there_wh = sum([places.get(place, 0) // COARSE_WH * COARSE_WH for places in left_wh.values()])
        assert wished[place] == min(energy_wh // COARSE_WH * COARSE_WH, there_wh)
    backwards = {name: dict(reversed(left_wh[name].items())) for name in reversed(left_wh)}
    assert plan_wishes(dict(reversed(short_wh.items())), backwards, TRUSTED) == wishes


# Promises


def test_a_surplus_is_promised_in_proportion_to_the_wishes() -> None:
    wishes = {("east", WIND, 7): 600, ("south", WIND, 7): 200, ("south", WIND, 8): 300, ("south", SOLAR, 7): 100}
    surplus = {(WIND, 7): 400, (WIND, 8): 900}
    assert share_out(wishes, surplus, dict.fromkeys(NAMES, MAX_INTEGER)) == {
        ("east", WIND, 7): 300,
        ("south", WIND, 7): 100,
        ("south", WIND, 8): 300,
    }


def test_who_is_not_served_is_promised_nothing_and_the_others_have_all_of_it() -> None:
    wishes = {("east", WIND, 7): 600, ("south", WIND, 7): 600}
    assert share_out(wishes, {(WIND, 7): 400}, {"south": MAX_INTEGER}) == {("south", WIND, 7): 400}


def test_what_a_neighbour_may_have_of_an_interval_limits_all_its_sources_together() -> None:
    wishes = {("east", WIND, 7): 600, ("east", SOLAR, 7): 200, ("east", WIND, 8): 300}
    surplus = dict.fromkeys([(WIND, 7), (SOLAR, 7), (WIND, 8)], 1_000)
    assert share_out(wishes, surplus, {"east": 400}) == {
        ("east", WIND, 7): 300,
        ("east", SOLAR, 7): 100,
        ("east", WIND, 8): 300,
    }
    assert share_out(wishes, surplus, {"east": 0}) == {}


ARRANGED = st.dictionaries(
    st.tuples(st.sampled_from((*NAMES, "west")), st.sampled_from([SOLAR, WIND]), st.integers(0, 2)),
    st.integers(1, 1_000),
)


@given(ARRANGED, ENERGIES, st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1_500)), st.randoms())
def test_promises_never_exceed_wish_surplus_or_limit_and_the_order_of_arrival_changes_nothing(
    wishes: Arranged, left_wh: dict[tuple[Source, int], int], most_wh: dict[str, int], shuffler: Random
) -> None:
    promises = share_out(wishes, left_wh, most_wh)
    at_place: Counter[tuple[Source, int]] = Counter()
    of_interval: Counter[tuple[str, int]] = Counter()
    for (requester, source, index), energy_wh in promises.items():
        assert 0 < energy_wh <= wishes[requester, source, index]
        at_place[source, index] += energy_wh
        of_interval[requester, index] += energy_wh
    assert all(energy_wh <= left_wh.get(place, 0) for place, energy_wh in at_place.items())
    assert all(energy_wh <= most_wh[requester] for (requester, _), energy_wh in of_interval.items())
    shuffled = list(wishes.items())
    shuffler.shuffle(shuffled)
    assert share_out(dict(shuffled), left_wh, most_wh) == promises


# Messages


@given(ARRANGED)
def test_what_is_arranged_comes_out_of_a_message_as_it_went_in(arranged: Arranged) -> None:
    rows = rows_of(arranged)
    assert read_rows(rows) == arranged
    assert rows == rows_of(dict(reversed(arranged.items())))


def test_of_more_than_a_message_holds_the_largest_are_kept() -> None:
    everything: Arranged = {
        (name, source, index): 100 + 100 * (index % 2)
        for name in ("east", "north", "south", "west")
        for source in Source
        for index in range(MAX_INTERVALS_OF_DAY)
    }
    kept = read_rows(rows_of(everything))
    assert len(kept) == MAX_ARRANGED_ROWS < len(everything)
    large = {key for key, energy_wh in everything.items() if energy_wh == 200}
    assert large < set(kept)
    # Of equal ones the earliest intervals.
    last = max(index for _, _, index in set(kept) - large)
    assert all(key in kept for key in everything if key[2] < last)
    many: Arranged = {(f"b{number}", WIND, 0): 100 + number for number in range(MAX_ARRANGED_NEIGHBOURS + 1)}
    assert set(many) - set(read_rows(rows_of(many))) == {("b0", WIND, 0)}


@pytest.mark.parametrize("message_class", [Wishes, Promises])
def test_the_largest_message_fits_its_limit(message_class: type[Wishes] | type[Promises]) -> None:
    names = [f"{number:0{MAX_NAME_CHARACTERS}}" for number in range(MAX_ARRANGED_NEIGHBOURS)]
    arranged: Arranged = {
        (name, source, 24 + index): MAX_INTEGER for index in range(6) for name in names for source in (SOLAR, WIND)
    }
    assert len(arranged) == MAX_ARRANGED_ROWS
    message = message_class("e" * MAX_NAME_CHARACTERS, DAY, DAY + DAY_S, rows_of(arranged))
    raw = seal(message, generate_private_key(), "l" * MAX_NAME_CHARACTERS, message.broker)
    assert 57_000 < len(raw) <= MAX_BROKER_MESSAGE_BYTES


def test_of_two_amounts_for_the_same_the_last_counts() -> None:
    amounts = (DayAmount(WIND, 7, 100), DayAmount(WIND, 7, 200))
    assert read_rows([NeighbourAmounts("east", amounts)]) == {("east", WIND, 7): 200}


# What a promise is worth where orders are shared out


def asks(name: int, requester: str, energy_wh: int, highest_price: int = 10, *, passes_on: bool = False) -> OpenOrder:
    return OpenOrder(bytes([name]) * ORDER_ID_BYTES, requester, WIND, energy_wh, highest_price, passes_on)


def amounts_of(orders: list[OpenOrder], there_wh: int, promised_wh: dict[str, int]) -> list[int]:
    promised = {(requester, WIND): energy_wh for requester, energy_wh in promised_wh.items()}
    return [grant.energy_wh for grant in grants(orders, {WIND: {5: there_wh}}, promised)]


def test_what_was_promised_is_served_before_all_share_the_rest() -> None:
    orders = [asks(1, "west", 600), asks(2, "south", 600)]
    assert amounts_of(orders, 700, {}) == [350, 350]
    assert amounts_of(orders, 700, {"west": 600}) == [600, 100]
    assert amounts_of(orders, 700, {"west": 200}) == [400, 300]
    # Of other sources it says nothing, and nobody gets more than was ordered.
    assert [one.energy_wh for one in grants(orders, {WIND: {5: 700}}, {("west", SOLAR): 600})] == [350, 350]
    assert amounts_of(orders, 700, {"west": 10_000}) == [600, 100]


def test_too_little_for_all_promises_is_shared_in_proportion_to_them() -> None:
    orders = [asks(1, "west", 900), asks(2, "south", 900), asks(3, "north", 900)]
    assert amounts_of(orders, 300, {"west": 400, "south": 200}) == [200, 100, 0]


def test_several_orders_of_one_requester_share_its_promise() -> None:
    orders = [asks(1, "west", 300), asks(2, "west", 100), asks(3, "south", 400)]
    assert amounts_of(orders, 200, {"west": 200}) == [150, 50, 0]


def test_a_promise_is_not_for_what_others_ordered_of_its_holder() -> None:
    orders = [asks(1, "west", 400, passes_on=True), asks(2, "south", 400)]
    assert amounts_of(orders, 400, {"west": 400}) == [200, 200]


def test_a_promise_buys_nothing_above_the_highest_price() -> None:
    cheap, dear = asks(1, "west", 300, 4), asks(2, "south", 300, 9)
    granted = grants([cheap, dear], {WIND: {3: 100, 8: 100}}, {("west", WIND): 300})
    assert [one.parts for one in granted] == [((3, 100),), ((8, 100),)]


ORDERS = st.lists(
    st.builds(
        asks,
        st.integers(0, 255),
        st.sampled_from(NAMES),
        st.integers(1, 100),
        st.sampled_from([4, 7, 10]),
        passes_on=st.booleans(),
    ),
    unique_by=lambda one: one.order_id,
)
PRICED = st.dictionaries(st.integers(3, 11), st.integers(0, 150))
PROMISED = st.dictionaries(st.tuples(st.sampled_from(NAMES), st.just(WIND)), st.integers(0, 200))


@given(ORDERS, PRICED, PROMISED, st.randoms())
def test_promises_move_wh_between_orders_and_lose_none(
    orders: list[OpenOrder], wh_at: dict[int, int], promised_wh: dict[tuple[str, Source], int], shuffler: Random
) -> None:
    result = grants(orders, {WIND: wh_at}, promised_wh)
    given: Counter[int] = Counter()
    for one, grant in zip(orders, result, strict=True):
        assert grant.order_id == one.order_id
        assert 0 <= grant.energy_wh <= one.energy_wh
        assert (grant.reason is None) == (grant.energy_wh > 0)
        for price, energy_wh in grant.parts:
            assert energy_wh > 0
            assert price <= one.highest_price
            given[price] += energy_wh
    assert all(energy_wh <= wh_at[price] for price, energy_wh in given.items())
    plain = grants(orders, {WIND: wh_at})
    assert sum(one.energy_wh for one in result) == sum(one.energy_wh for one in plain)
    shuffled = list(orders)
    shuffler.shuffle(shuffled)
    by_id = {grant.order_id: grant for grant in grants(shuffled, {WIND: wh_at}, promised_wh)}
    assert [by_id[one.order_id] for one in orders] == list(result)


@given(ORDERS, st.integers(0, 600), PROMISED)
def test_promises_are_kept_as_far_as_there_is_energy(
    orders: list[OpenOrder], there_wh: int, promised_wh: dict[tuple[str, Source], int]
) -> None:
    orders = [replace(one, highest_price=10) for one in orders]
    ordered_wh: Counter[str] = Counter()
    for one in orders:
        ordered_wh[one.requester] += 0 if one.passes_on else one.energy_wh
    firm_wh = [min(promised_wh.get((name, WIND), 0), ordered_wh[name]) for name in NAMES]
    got_wh: Counter[str] = Counter()
    for one, grant in zip(orders, grants(orders, {WIND: {5: there_wh}}, promised_wh), strict=True):
        got_wh[one.requester] += grant.energy_wh
    if sum(firm_wh) <= there_wh:
        assert all(got_wh[name] >= energy_wh for name, energy_wh in zip(NAMES, firm_wh, strict=True))
    else:
        exact = apportion(there_wh, firm_wh)
        # Several orders of one requester have their Wh rounded one by one.
        tolerance_wh = len(orders) if len(orders) > len({one.requester for one in orders}) else 0
        assert sum(got_wh.values()) == there_wh
        assert all(abs(got_wh[name] - energy_wh) <= tolerance_wh for name, energy_wh in zip(NAMES, exact, strict=True))


def test_without_promises_grants_are_to_the_byte_what_they_were_before_there_were_any() -> None:
    """The digest is that of the grants of the version before."""
    generator = Random(5)
    digest = sha256()
    for _ in range(300):
        orders = [
            OpenOrder(
                generator.randbytes(16),
                generator.choice(["east", "north", "south"]),
                generator.choice([SOLAR, WIND]),
                generator.randrange(1, 500),
                generator.randrange(3, 12),
            )
            for _ in range(generator.randrange(8))
        ]
        offered = {
            source: {price: generator.randrange(300) for price in generator.sample(range(2, 13), 3)}
            for source in (SOLAR, WIND)
        }
        granted = grants(orders, offered)
        assert grants(orders, offered, {}) == granted
        digest.update(repr([(one.order_id, one.parts, one.reason) for one in granted]).encode())
    assert digest.hexdigest() == "35b4c3220fe6c5d6c67d9cbf4e2fd1ebeb6ec3f9dbe330ed98c9a5b7a3fd4501"


# Whom to ask

LIMITS = dict.fromkeys(Source, 10)


def planned(
    short_wh: int,
    offers: list[NeighbourOffer],
    promised_wh: dict[tuple[str, Source], int],
    groups: dict[SourceGroup, int] | None = None,
) -> dict[tuple[str, Source], int]:
    orders: tuple[PlannedOrder, ...] = plan_orders(
        {WIND: short_wh}, groups or {}, list(NAMES), offers, LIMITS, promised_wh=promised_wh
    )
    return {(order.neighbour, order.source): order.energy_wh for order in orders}


def test_at_one_price_the_neighbour_that_promised_is_asked_first_up_to_that() -> None:
    offers = [NeighbourOffer("east", WIND, 900, 5), NeighbourOffer("south", WIND, 400, 5)]
    assert planned(500, offers, {}) == {("east", WIND): 500}
    assert planned(500, offers, {("south", WIND): 300}) == {("south", WIND): 300, ("east", WIND): 200}
    # What it does not announce is not there, and who is cheaper comes first.
    assert planned(500, offers, {("south", WIND): 600}) == {("south", WIND): 400, ("east", WIND): 100}
    cheaper = [NeighbourOffer("east", WIND, 900, 4), NeighbourOffer("south", WIND, 400, 5)]
    assert planned(500, cheaper, {("south", WIND): 300}) == {("east", WIND): 500}


def test_where_nothing_is_announced_whoever_promised_most_is_asked() -> None:
    assert planned(500, [], {("south", WIND): 100}) == {("south", WIND): 500}
    assert planned(500, [], {("south", WIND): 100, ("north", WIND): 200}) == {("north", WIND): 500}


def test_a_promise_says_nothing_of_what_others_would_have_to_give() -> None:
    through = [NeighbourOffer("east", WIND, 900, 5), NeighbourOffer("south", WIND, 400, 5)]
    orders = plan_orders({WIND: 300}, {}, NAMES, [], LIMITS, through=through, promised_wh={("south", WIND): 300})
    assert [(order.neighbour, order.energy_wh) for order in orders] == [("east", 300)]


def test_a_promise_is_used_once_in_a_plan() -> None:
    offers = [NeighbourOffer("east", WIND, 900, 5), NeighbourOffer("south", WIND, 900, 5)]
    both = planned(300, offers, {("south", WIND): 400}, {SourceGroup.RENEWABLE: 300})
    assert both == {("south", WIND): 400, ("east", WIND): 200}


@given(
    st.integers(0, 500),
    st.lists(
        st.builds(NeighbourOffer, st.sampled_from(NAMES), st.just(WIND), st.integers(0, 300), st.sampled_from([4, 5])),
        unique_by=lambda one: one.neighbour,
    ),
    PROMISED,
)
def test_promises_change_whom_is_asked_and_never_how_much(
    short_wh: int, offers: list[NeighbourOffer], promised_wh: dict[tuple[str, Source], int]
) -> None:
    plan = planned(short_wh, offers, promised_wh)
    assert sum(plan.values()) == short_wh
    assert all(plan.values())
    assert planned(short_wh, offers[::-1], promised_wh) == plan
