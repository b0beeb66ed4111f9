"""After the gates: what turns out to have been otherwise, what is proven of it, and a broker that has forgotten it.

Corrected and late values are settled by further operations. A consumer's certificate rests on a copy of the ledger that
its broker makes over MQTT, having none of its own. A broker whose database went back to an older backup takes what it
did since from the ledger.
"""

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.market import CommandFailed, energy_broker
from dengen_testing.processes import ManagedProcess

from broker.ledger.store import FILE_NAME
from broker.protocol.messages import Block, Query, ReceiptStatus
from broker.service.ledger_copy import COPY_NAME
from cases.marketplace import HALF_HOUR_S, HARBOUR, LEDGER, Broker, MarketPlace, Meter, content, utc

pytestmark = pytest.mark.integration


def passes(market: MarketPlace, *reports: tuple[Meter, int]) -> int:
    """A half hour in which these meters report; returns when it began."""
    market.next_half_hour()
    for meter, energy_wh in reports:
        meter.reports(energy_wh)
    market.gate_1()
    market.gate_2()
    return market.half_hour_s


def statement(broker: Broker, start_s: int, *whose: str) -> dict[str, Any]:
    """An account of the half hour, once it agrees with the ledger."""
    span = ("--from", utc(start_s), "--to", utc(start_s + HALF_HOUR_S), "--json", "--check", broker.market.ledger)
    found: dict[str, Any] = json.loads(energy_broker("statement", "--config", broker.config, *span, *whose))
    return found


def certificate(consumer: Meter, start_s: int) -> Path:
    """The consumer's certificate of the half hour, for which the broker brings its copy of the ledger up to date."""
    market = consumer.broker.market
    out = market.folder / f"{consumer.name}-{len(list(market.folder.glob('*.certificate')))}.certificate"
    span = ("--from", utc(start_s), "--to", utc(start_s + HALF_HOUR_S), "--out", out)
    energy_broker("certificate", "issue", "--config", consumer.broker.config, "--meter", consumer.name, *span)
    return out


def proven(file: Path, market: MarketPlace, *options: str | Path) -> dict[str, Any]:
    """What anybody can check of a certificate, offline, with the trust file of the ledger's genesis."""
    trust = market.folder / "trust.json"
    trust.write_text(energy_broker("ledger", "trust", "--genesis", market.genesis))
    found: dict[str, Any] = json.loads(
        energy_broker("certificate", "verify", file, "--trust", trust, "--json", *options)
    )
    return found


def test_corrected_and_late_values_are_settled_anew_and_the_certificate_says_so(
    market: MarketPlace, east: Broker, west: Broker
) -> None:
    """Anna, Ben and Cora are west's, as are roof and barn. Ben's wind comes from the mill, which is east's."""
    roof = west.takes_on_device("roof", "solar", owner="ola")
    barn = west.takes_on_device("barn", "solar")
    mill = east.takes_on_device("mill", "wind")
    anna = west.takes_on_consumer("anna", {"solar": 100})
    ben = west.takes_on_consumer("ben", {"wind": 100})
    cora = west.takes_on_consumer("cora", {"solar": 100})
    first_s = passes(market, (roof, 900), (mill, 400), (anna, 500), (ben, 300))
    assert (anna.got(), ben.got(), cora.got()) == ({"solar": 500}, {"wind": 300}, {})
    before = certificate(anna, first_s)

    # Down: the roof made less than Anna alone got of it, the mill less than east sold.
    roof.reports(200, revision=1)
    mill.reports(250, revision=1)
    market.settle()
    assert (anna.got(), ben.got()) == ({"solar": 200}, {"wind": 250})
    # Late: the barn's reading and Cora's demand. What is open is filled with the next close.
    barn.reports(400)
    cora.reports(80)
    passes(market, (roof, 0), (mill, 0), (anna, 0), (ben, 0))
    market.half_hour_s = first_s
    assert (anna.got(), ben.got(), cora.got()) == ({"solar": 500}, {"wind": 250}, {"solar": 80})
    assert market.closed_by(west) == (3, 880, 830)
    # Up: Anna used 150 Wh more; 20 Wh of the barn are left, and the roof made 100 Wh more after all.
    anna.reports(650, revision=1)
    roof.reports(300, revision=2)
    passes(market, (roof, 0), (mill, 0), (anna, 0), (ben, 0))
    market.half_hour_s = first_s
    assert anna.got() == {"solar": 620}
    assert market.closed_by(west) == (3, 1_030, 950)
    # Down again: she used 400 Wh, and gives back the rest.
    anna.reports(400, revision=2)
    passes(market, (roof, 0), (mill, 0), (anna, 0), (ben, 0))
    market.half_hour_s = first_s
    assert (anna.got(), cora.got()) == ({"solar": 400}, {"solar": 80})
    assert market.closed_by(west) == (3, 780, 730)
    assert market.holder_of("roof"), market.holder_of("barn")
    print(market.holder_of("roof"), market.holder_of("barn"))
    market.check_books()

    # Money and certificate say the same. What was certified before was true at its height, and has been overtaken.
    (account,) = statement(west, first_s, "--consumer", "anna")["accounts"]
    assert {line["kind"]: line["energy_wh"] for line in account["lines"]} == {"traded": 920, "taken back": -520}
    (account,) = statement(west, first_s, "--provider", "ola")["accounts"]
    assert (account["energy_wh"], account["amount_micro"]) == (300, 24_000)
    sold, bought = (
        next(account for account in statement(*whose)["accounts"] if account["energy_wh"])
        for whose in ((east, first_s, "--neighbour", "west"), (west, first_s, "--neighbour", "east"))
    )
    assert (sold["energy_wh"], sold["lines"]) == (250, bought["lines"])
    found = proven(certificate(anna, first_s), market, "--ledger", market.ledger)
    assert (found["demanded_wh"], found["by_source_wh"], found["is_provisional"]) == (400, {"solar": 400}, True)
    assert found["ledger_now"]["faults"] == []
    assert proven(before, market)["by_source_wh"] == {"solar": 500}
    with pytest.raises(CommandFailed, match=r"the demand was corrected since height .* from 500 to 400 Wh"):
        proven(before, market, "--ledger", market.ledger)


BOOKS = ("demands", "readings", "history", "provided", "purchases", "sales")


def books(broker: Broker) -> dict[str, list[dict[str, Any]]]:
    return {name: broker.table(name) for name in BOOKS}


@pytest.mark.parametrize("name", ["west", "east"])
def test_a_broker_whose_database_is_an_older_backup_takes_back_from_the_ledger_what_it_did(
    market: MarketPlace, east: Broker, west: Broker, name: str
) -> None:
    """West reaches the ledger over MQTT; on a network, east has nodes of its own. Each sells to the other."""
    forgetful, other = (west, east) if name == "west" else (east, west)
    hall, weir = forgetful.takes_on_device(f"{name}-hall", "solar"), other.takes_on_device(f"{name}-weir", "hydro")
    dora = forgetful.takes_on_consumer(f"{name}-dora", {"solar": 50, "hydro": 50})
    emil = other.takes_on_consumer(f"{name}-emil", {"solar": 100})
    passes(market, (hall, 700), (weir, 300), (dora, 400), (emil, 100))
    copy = market.folder / f"{name}-backup"
    energy_broker("backup", "--config", forgetful.config, "--out", copy)
    sent = []
    for energy_wh in (400, 500):
        passes(market, (hall, 700), (weir, 300), (dora, energy_wh), (emil, 100))
        sent += [(hall, hall.signed(700)), (dora, dora.signed(energy_wh))]
        assert dora.got() == {"solar": energy_wh // 2, "hydro": energy_wh // 2}
    dora.reports(450, revision=1)
    sent.append((dora, dora.signed(450, revision=1)))
    market.settle()
    before = books(forgetful)
    forgetful.loses_power()
    database = market.folder / f"{name}-data" / "broker.db"
    for leftover in database.parent.glob("broker.db*"):
        leftover.unlink()
    shutil.copy(copy / "broker.db", database)

    # It does not go on as if nothing had been.
    forgetful.comes_back()
    assert forgetful.process.wait_ended(20.0) == 1
    assert "older than the ledger" in forgetful.process.log_tail()
    forgetful.comes_back("--recover")
    market.settle()
    assert "recovered from the ledger: " in forgetful.process.log_tail()
    after = books(forgetful)
    assert {table: after[table] for table in BOOKS[2:]} == {table: before[table] for table in BOOKS[2:]}
    for meter, raw in sent:
        assert meter.answer_to(raw).status is ReceiptStatus.ACCEPTED
    market.settle()
    assert books(forgetful) == before
    for start_s in (market.half_hour_s - HALF_HOUR_S, market.half_hour_s):
        statement(forgetful, start_s, "--own")
    passes(market, (hall, 700), (weir, 300), (dora, 200), (emil, 100))
    # What went back of her hydro is made up for: the account that decides the mix has come back, too.
    assert (dora.got(), emil.got()) == ({"solar": 75, "hydro": 125}, {"solar": 100})
    statement(forgetful, market.half_hour_s, "--own")
    market.check_books()


def test_the_copy_behind_certificates_goes_on_without_a_validator_and_finds_one_that_lies_about_a_block(
    market: MarketPlace, west: Broker
) -> None:
    shed = west.takes_on_device("shed", "biomass")
    fay = west.takes_on_consumer("fay", {"biomass": 100})
    certificate(fay, passes(market, (shed, 300), (fay, 200)))
    copy = market.folder / "west-data" / COPY_NAME
    copied, begun = height_of(copy), asked_from_the_first_block(market)
    second_s = passes(market, (shed, 300), (fay, 250))

    first = FirstValidator(market)
    first.stops()
    true = first.seals_in_place_of(copied + 1, lambda block: replace(block, state_hash=b"?" * 32))
    first.starts()
    market.brokers[HARBOUR].loses_power()
    market.brokers[HARBOUR].comes_back()  # Whoever is new to a network turns to its first node.
    with pytest.raises(CommandFailed, match=f"block {copied + 1} names another state than its operations make"):
        certificate(fay, second_s)
    assert height_of(copy) == copied

    first.stops()
    first.seals_in_place_of(copied + 1, lambda _: true)
    if market.network is None:
        first.starts()
    # On a network the others answer in its place, and the market goes on.
    assert proven(certificate(fay, second_s), market)["by_source_wh"] == {"biomass": 250}
    third_s = passes(market, (shed, 300), (fay, 300))
    assert proven(certificate(fay, third_s), market)["by_source_wh"] == {"biomass": 300}
    assert asked_from_the_first_block(market) == begun, "the copy went on where it was"
    if market.network is not None:
        first.starts()
    energy_broker("ledger", "verify", copy)
    energy_broker("ledger", "compare", copy, market.ledger, "--allow-prefix")


def test_a_broker_hears_of_what_was_done_while_the_one_that_serves_it_the_ledger_was_away(
    market: MarketPlace, east: Broker, west: Broker
) -> None:
    """On a network the ledger goes on without its gateway."""
    height = height_of(market.ledger)
    market.brokers[HARBOUR].loses_power()
    mast = east.takes_on_device("mast", "wind")
    if market.network is not None:
        market.wait_until(lambda: height_of(market.ledger) > height, "east to have its device admitted")
    market.brokers[HARBOUR].comes_back()
    market.settle()  # All must have taken in the same blocks.
    gus = west.takes_on_consumer("gus", {"wind": 100})
    passes(market, (mast, 300), (gus, 200))
    assert gus.got() == {"wind": 200}


@dataclass
class FirstValidator:
    """The validator whose copy answers for the ledger: the host, or the node that its gateway asks first."""

    market: MarketPlace

    def stops(self) -> None:
        self._process.stop()

    def starts(self) -> None:
        self._process.start()
        network = self.market.network
        if network is not None:
            first, second = network.nodes[:2]
            height = second.head().head.height
            self.market.wait_until(
                lambda: first.answers() and first.head().head.height >= height, "the first node to catch up"
            )

    def seals_in_place_of(self, height: int, changed: Callable[[Block], Block]) -> Block:
        """While it does not run: it has another block there, under its own seal. Returns the one before."""
        with contextlib.closing(sqlite3.connect(self.market.ledger / FILE_NAME)) as database:
            ((raw,),) = database.execute("SELECT raw FROM blocks WHERE height = ?", (height,))
            sealed = self.market.sealed_by("validator-1", changed(content(raw)))
            database.execute("UPDATE blocks SET raw = ? WHERE height = ?", (sealed, height))
            database.commit()
        block: Block = content(raw)
        return block

    @property
    def _process(self) -> ManagedProcess:
        network = self.market.network
        return self.market.brokers[HARBOUR].process if network is None else network.nodes[0].process


def height_of(ledger: Path) -> int:
    (head,) = energy_broker("ledger", "show", ledger, "head", "--json").splitlines()
    height: int = json.loads(head)["height"]
    return height


def asked_from_the_first_block(market: MarketPlace) -> int:
    """How often somebody has asked the ledger for its blocks from the first one on."""
    asked = [content(message.payload) for message in market.heard(market.topics.ledger_submit(LEDGER))]
    return sum(isinstance(said, Query) and said.from_height == 1 for said in asked)
