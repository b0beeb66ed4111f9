"""Case 8: the tables behind it all can be listed and exported: users, providers, contracts, history."""

import contextlib
import csv
import io
import sqlite3
from pathlib import Path

import pytest
from dengen_testing.market import energy_broker

from broker.service.registration import TABLES
from cases.marketplace import Broker, MarketPlace, Meter

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def anna(market: MarketPlace, east: Broker, west: Broker) -> Meter:
    """A consumer who got solar of an own provider and wind through a neighbour, in the half hour that has ended."""
    roof = east.takes_on_device("roof", "solar", owner="ola", price=90_000)
    mill = west.takes_on_device("mill", "wind", owner="pia", price=70_000)
    meter = east.takes_on_consumer("anna", {"solar": 60, "wind": 40}, "--prefer", "ola", shortage="any")
    market.next_half_hour()
    roof.reports(300)
    mill.reports(900)
    meter.reports(500)
    market.gate_1()
    market.gate_2()
    return meter


def test_8_users_providers_contracts_and_history_can_be_listed(
    market: MarketPlace, east: Broker, west: Broker, anna: Meter
) -> None:
    # Users: whom a broker serves, by the id of the meter's key.
    key_id = market.public_key("anna").key_id.hex()
    assert [(row["meter"], row["key_id"]) for row in east.table("consumers")] == [("anna", key_id)]
    # Providers: devices with owner, source, price.
    (provider,) = east.table("providers")
    assert (provider["device"], provider["owner"], provider["source"], provider["price"]) == (
        *("roof", "ola", "solar"),
        90_000,
    )
    # Contracts: every version, with shares in ppm.
    (contract,) = east.table("contracts")
    assert contract["lines_ppm"] == {"solar": 600_000, "wind": 400_000}
    assert (contract["shortage"], contract["preferred_providers"]) == ("any", ["ola"])
    # History: what was delivered, of which device, through which neighbour, of which half hour.
    history = sorted(anna.history(), key=lambda row: row["source"])
    assert [(row["energy_wh"], row["source"], row["device"], row["through"]) for row in history] == [
        (300, "solar", "roof", None),
        (200, "wind", "mill", "west"),
    ]
    assert {row["start_s"] for row in history} == {market.half_hour_s}
    # From whom to whom, on both sides of each change of ownership.
    assert [(row["provider"], row["energy_wh"]) for row in east.rows_now("provided")] == [("ola", 300)]
    assert [(row["neighbour"], row["energy_wh"]) for row in east.rows_now("purchases")] == [("west", 200)]
    assert [(row["neighbour"], row["energy_wh"]) for row in west.rows_now("sales")] == [("east", 200)]


@pytest.mark.usefixtures("anna")
@pytest.mark.parametrize("name", ["consumers", "providers", "contracts", "history", "demands", "readings", "orders"])
def test_8_each_table_says_the_same_as_text_json_and_csv(east: Broker, name: str) -> None:
    rows = east.table(name)
    assert rows
    exported = list(csv.DictReader(io.StringIO(energy_broker("list", name, "--config", east.config, "--csv"))))
    assert [list(row) for row in exported] == [list(row) for row in rows]
    for column, value in rows[0].items():
        if isinstance(value, str | int):
            assert exported[0][column] == str(value)
    assert len(energy_broker("list", name, "--config", east.config).splitlines()) == len(rows)


@pytest.mark.usefixtures("anna")
def test_8_no_table_gives_away_the_secret_behind_a_consumers_pseudonyms(market: MarketPlace, east: Broker) -> None:
    with contextlib.closing(sqlite3.connect(market.folder / "east-data" / "broker.db")) as database:
        (secret,) = database.execute("SELECT secret FROM consumer").fetchone()
    printed = "".join(energy_broker("list", name, "--config", east.config, "--json") for name in TABLES)
    assert len(secret) == 32
    assert secret.hex() not in printed


@pytest.mark.usefixtures("anna")
def test_8_the_books_of_the_ledger_can_be_exported_by_anybody_with_a_copy(market: MarketPlace, tmp_path: Path) -> None:
    energy_broker("ledger", "audit", "--export", tmp_path, market.ledger)
    with (tmp_path / "devices.csv").open(newline="") as file:
        (mill,) = [row for row in csv.DictReader(file) if row["device"] == "mill"]
    assert (mill["owner"], mill["issued_wh"], mill["delivered_wh"]) == ("pia", "900", "200")
    with (tmp_path / "deliveries.csv").open(newline="") as file:
        deliveries = {(row["broker"], row["source"]): row["delivered_wh"] for row in csv.DictReader(file)}
    assert deliveries == {("east", "solar"): "300", ("east", "wind"): "200"}
