"""Case 7: a broker on its own, two brokers (`test_change_requests.py`), and many that are each other's neighbours."""

from collections.abc import Iterator

import pytest

from cases.marketplace import Broker, MarketPlace

pytestmark = pytest.mark.integration

VALLEY = ("aoba", "birch", "cedar", "dune", "elm")
"""Five brokers in a ring: each has the one before and the one after for neighbours."""


@pytest.fixture
def valley(market: MarketPlace) -> Iterator[dict[str, Broker]]:
    for place, name in enumerate(VALLEY):
        market.open_broker(name, [VALLEY[place - 1], VALLEY[(place + 1) % len(VALLEY)]])
    yield {name: market.brokers[name] for name in VALLEY}
    market.close_brokers(*VALLEY)


@pytest.fixture
def hermit(market: MarketPlace) -> Iterator[Broker]:
    """A broker without neighbours."""
    yield market.open_broker("hermit")
    market.close_brokers("hermit")


def test_7_a_broker_on_its_own_serves_what_it_has_and_asks_nobody(market: MarketPlace, hermit: Broker) -> None:
    mill = hermit.takes_on_device("mill", "wind")
    anna = hermit.takes_on_consumer("anna", {"wind": 50, "solar": 50})
    for wind_wh in (600, 100):
        market.next_half_hour()
        mill.reports(wind_wh)
        anna.reports(400)
        market.gate_1()
        market.gate_2()
        assert anna.got() == {"wind": min(wind_wh, 200)}
        assert hermit.table("orders") == []
        assert market.closed_by(hermit) == (1, 400, min(wind_wh, 200))
    market.check_books()


def test_7_in_a_ring_of_five_each_lacks_what_a_neighbour_has(market: MarketPlace, valley: dict[str, Broker]) -> None:
    """Every broker has 500 Wh of a source of its own and a consumer who wants 300 Wh of the next one's source."""
    sources = dict(zip(VALLEY, ("solar", "wind", "biomass", "hydro", "nuclear"), strict=True))
    following = dict(zip(VALLEY, (*VALLEY[1:], VALLEY[0]), strict=True))
    devices = {name: broker.takes_on_device(f"unit-{name}", sources[name]) for name, broker in valley.items()}
    users = {
        name: broker.takes_on_consumer(f"user-{name}", {sources[following[name]]: 100})
        for name, broker in valley.items()
    }
    for _ in range(2):  # What neighbours announced in the first half hour tells whom to ask in the second.
        market.next_half_hour()
        for name in VALLEY:
            devices[name].reports(500)
            users[name].reports(300)
        market.gate_1()
        market.gate_2()

    for name, broker in valley.items():
        supplier = following[name]
        assert users[name].got() == {sources[supplier]: 300}
        assert {row["through"] for row in users[name].history()} == {supplier}
        assert users[name].unmatched_wh() == 0
        assert [row["neighbour"] for row in broker.rows_now("purchases")] == [supplier]
        assert market.holder_of(f"unit-{name}") == {name: 200}
    market.check_books()


def test_7_two_neighbours_of_one_broker_share_what_it_has_left(market: MarketPlace, valley: dict[str, Broker]) -> None:
    """Aoba has 600 Wh of wind; birch wants 800 Wh and elm 400 Wh: two thirds and one third, whoever came first."""
    mill = valley["aoba"].takes_on_device("high-mill", "wind")
    ben = valley["birch"].takes_on_consumer("ben", {"wind": 100})
    eva = valley["elm"].takes_on_consumer("eva", {"wind": 100})
    for _ in range(2):
        market.next_half_hour()
        mill.reports(600)
        ben.reports(800)
        eva.reports(400)
        market.gate_1()
        market.gate_2()

    assert (ben.got(), eva.got()) == ({"wind": 400}, {"wind": 200})
    assert (ben.unmatched_wh(), eva.unmatched_wh()) == (400, 200)
    assert market.holder_of("high-mill") == {}
    market.check_books()


def test_7_a_broker_that_joins_later_learns_from_the_ledger_whose_energy_its_neighbour_has(market: MarketPlace) -> None:
    """Anna takes nothing of pia's. That the neighbour's roof is ola's was said before anna's broker was there."""
    north = market.open_broker("north")
    roof = north.takes_on_device("north-roof", "solar", owner="ola")
    market.settle()
    market.close_brokers("north")
    market.open_broker("north", ["south"])
    south = market.open_broker("south", ["north"])
    anna = south.takes_on_consumer("south-anna", {"solar": 100}, "--exclude", "pia")
    market.next_half_hour()
    roof.reports(500)
    anna.reports(300)
    market.gate_1()
    market.gate_2()
    assert anna.got() == {"solar": 300}
    assert market.holder_of("north-roof") == {"north": 200}
    market.check_books()
    market.close_brokers("north", "south")
