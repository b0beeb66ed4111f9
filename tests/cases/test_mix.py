"""Cases 2, 5 and 6: which source the next Wh come from, and what happens when nobody has it."""

import pytest
from dengen_testing.market import energy_broker

from broker.protocol.messages import DeliveryState
from broker.protocol.sources import Source
from cases.marketplace import Broker, MarketPlace, utc

pytestmark = pytest.mark.integration

SUBSTITUTE = 255
"""The line of a Wh that no line of the contract covers, as docs/protocol.md has it."""


def test_2_the_next_wh_come_from_the_source_that_is_furthest_behind_its_share(
    market: MarketPlace, east: Broker
) -> None:
    """Half solar, half wind: after a night of wind alone, the day's Wh are solar until both stand level again."""
    roof = east.takes_on_device("roof", "solar")
    mill = east.takes_on_device("mill", "wind")
    anna = east.takes_on_consumer("anna", {"solar": 50, "wind": 50}, shortage="any")
    supply_and_expected_mix = [
        # solar and wind made, demand, and what it is to get
        (0, 900, 200, {"wind": 200}),  # Night. 100 Wh of solar are owed from now on.
        (900, 900, 100, {"solar": 100}),  # What was short before comes first.
        (900, 900, 140, {"solar": 120, "wind": 20}),  # 440 in all: solar 220, wind 220.
        (900, 900, 100, {"solar": 50, "wind": 50}),  # Level: half and half.
    ]
    for solar_wh, wind_wh, demand_wh, expected in supply_and_expected_mix:
        market.next_half_hour()
        roof.reports(solar_wh)
        mill.reports(wind_wh)
        anna.reports(demand_wh)
        market.gate_1()
        market.gate_2()
        assert anna.got() == expected


def test_2_a_new_contract_begins_with_a_fresh_account(market: MarketPlace, east: Broker) -> None:
    """What the old contract owed does not count for the new one; the old one stays on record."""
    tower = east.takes_on_device("tower", "wind")
    pond = east.takes_on_device("pond", "hydro")
    bea = east.takes_on_consumer("bea", {"hydro": 100})
    market.next_half_hour()
    pond.reports(100)
    tower.reports(900)
    bea.reports(100)
    market.gate_2()
    assert bea.got() == {"hydro": 100}

    next_start = utc(market.half_hour_s + 1_800)
    energy_broker(
        *("consumer", "contract", "--config", east.config, "--meter", "bea", "--from", next_start),
        *("--line", "hydro=20", "--line", "wind=80"),
    )
    market.next_half_hour()
    pond.reports(900)
    tower.reports(900)
    bea.reports(100)
    market.gate_2()
    assert bea.got() == {"hydro": 20, "wind": 80}
    versions = [row["lines_ppm"] for row in east.table("contracts") if row["meter"] == "bea"]
    assert versions == [{"hydro": 1_000_000}, {"hydro": 200_000, "wind": 800_000}]


@pytest.mark.parametrize(
    ("choice", "got", "unmatched_wh"),
    [
        ("unmatched", {}, 300),
        ("any", {"nuclear": 300}, 0),
        ("substitutes:coal", {"coal": 200}, 100),
        ("substitutes:coal,nuclear", {"coal": 200, "nuclear": 100}, 0),
    ],
)
def test_5_what_nobody_has_is_settled_as_the_contract_chose(
    market: MarketPlace, east: Broker, west: Broker, choice: str, got: dict[str, int], unmatched_wh: int
) -> None:
    """A contract for geothermal alone, and no geothermal anywhere: east asks west, west refuses, gate 2 decides."""
    number = {"unmatched": 1, "any": 2, "substitutes:coal": 3, "substitutes:coal,nuclear": 4}[choice]
    pile = east.takes_on_device(f"pile-{number}", "nuclear")
    stove = east.takes_on_device(f"stove-{number}", "coal")
    cleo = east.takes_on_consumer(f"cleo-{number}", {"geothermal": 100}, shortage=choice)
    market.next_half_hour()
    pile.reports(1_000)
    stove.reports(200)
    receipt = cleo.reports(300)
    market.gate_1()
    assert [(row["source"], row["state"]) for row in east.rows_now("orders")] == [("geothermal", "refused")]
    assert [row["state"] for row in west.rows_now("requests")] == ["refused"]
    assert cleo.got() == {}, "gate 2 has not come: the choice does not apply yet"
    market.gate_2()

    assert cleo.got() == got
    assert cleo.unmatched_wh() == unmatched_wh
    assert {row["line"] for row in cleo.history()} <= {SUBSTITUTE}
    # On the ledger as well, where everybody can see how much was demanded and how little came.
    (demand,) = [row for row in market.on_ledger("demands") if row["pseudonym"] == receipt.pseudonym.hex()]
    assert demand["demanded_wh"] - demand["delivered_wh"] == unmatched_wh
    assert market.closed_by(east) == (1, 300, 300 - unmatched_wh)
    told = cleo.was_told()
    assert (told.state, told.unmatched_wh) == (DeliveryState.FINAL, unmatched_wh)


def test_6_each_source_reaches_the_consumer_who_contracted_it(market: MarketPlace, east: Broker) -> None:
    """The seven renewable ones, nuclear, and the three fossil ones: a device and a consumer for each."""
    assert [source.label for source in Source] == [
        *("solar", "solar_thermal", "wind", "biomass", "geothermal", "hydro", "ambient_heat"),
        *("nuclear", "oil", "coal", "natural_gas"),
    ]
    devices = {
        source: east.takes_on_device(f"unit-{source.label.replace('_', '-')}", source.label) for source in Source
    }
    users = {
        source: east.takes_on_consumer(f"user-{source.label.replace('_', '-')}", {source.label: 100})
        for source in Source
    }
    market.next_half_hour()
    for source in Source:
        devices[source].reports(1_000)
        users[source].reports(100 + source)
    market.gate_1()
    market.gate_2()

    for source in Source:
        assert users[source].got() == {source.label: 100 + source}
        assert [row["device"] for row in users[source].history()] == [devices[source].name]


def test_6_one_contract_over_several_sources_and_groups(market: MarketPlace, east: Broker) -> None:
    """Named sources first; a group takes what is most plentiful among its members."""
    made_wh = {"solar": 500, "wind": 500, "biomass": 700, "nuclear": 500, "oil": 300, "coal": 400}
    devices = {source: east.takes_on_device(f"plant-{source}", source) for source in made_wh}
    hugo = east.takes_on_consumer("hugo", {"solar": 30, "wind": 20, "renewable": 20, "nuclear": 10, "fossil": 20})
    market.next_half_hour()
    for source, energy_wh in made_wh.items():
        devices[source].reports(energy_wh)
    hugo.reports(1_000)
    market.gate_1()
    market.gate_2()

    assert hugo.got() == {"solar": 300, "wind": 200, "biomass": 200, "nuclear": 100, "coal": 200}
    by_line = {row["line"]: row["source"] for row in hugo.history()}
    assert by_line == {0: "solar", 1: "wind", 2: "biomass", 3: "nuclear", 4: "coal"}


def test_6_a_provider_with_several_devices(market: MarketPlace, east: Broker) -> None:
    """Each device makes assets of its own, of its own source, all of one owner."""
    farm = [
        east.takes_on_device("farm-roof", "solar", owner="farmer"),
        east.takes_on_device("farm-barn", "solar", owner="farmer"),
        east.takes_on_device("farm-digester", "biomass", owner="farmer"),
    ]
    ida = east.takes_on_consumer("ida", {"solar": 75, "biomass": 25})
    market.next_half_hour()
    for device, energy_wh in zip(farm, (400, 350, 250), strict=True):
        device.reports(energy_wh)
    ida.reports(1_000)
    market.gate_1()
    market.gate_2()

    assert {row["device"]: row["energy_wh"] for row in ida.history()} == {
        "farm-roof": 400,
        "farm-barn": 350,
        "farm-digester": 250,
    }
    provided = [row for row in east.rows_now("provided") if row["provider"] == "farmer"]
    assert {row["device"]: row["energy_wh"] for row in provided} == {
        "farm-roof": 400,
        "farm-barn": 350,
        "farm-digester": 250,
    }
    owned = {row["device"]: row["source"] for row in east.table("providers") if row["owner"] == "farmer"}
    assert owned == {"farm-roof": "solar", "farm-barn": "solar", "farm-digester": "biomass"}
