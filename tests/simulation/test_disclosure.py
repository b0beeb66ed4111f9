"""A disclosed day: it opens that day on the ledger and no other, and whatever is altered is refused with the reason."""

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import key

from broker import cli
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.inspect import demands as demands_on_the_ledger
from broker.ledger.state import DEMAND, DemandRow, decode_key, decode_row, encode_row, table_bounds
from broker.ledger.store import FILE_NAME
from broker.protocol.messages import MessageType
from broker.service.disclosure import (
    Disclosure,
    DisclosureError,
    DisclosureReport,
    check_disclosure,
    day_number,
    disclose,
)
from broker.service.pseudonyms import DAY_S, interval_key, pseudonym
from broker.service.registration import RegistrationError
from broker.service.store import BrokerStore
from simulation.plans import PAIR
from simulation.world import INTERVAL_S, T0, Books, World

DAY = T0 // DAY_S
"""31 January 2026; the run goes on into 1 February after two intervals."""


class Run:
    """A finished run of PAIR and what can be disclosed of it."""

    def __init__(self, folder: Path) -> None:
        self.world = World(PAIR, folder / "world")
        self.books: Books = self.world.run()
        self.ledger = folder / "world" / "ledger"

    def of(self, meter: str, day: int = DAY) -> Disclosure:
        (broker,) = (plan.broker for plan in PAIR.consumers if plan.meter == meter)
        store = BrokerStore(self.world.brokers[broker].config.database)
        try:
            return disclose(store, self.world.genesis, broker, meter, day)
        finally:
            store.close()

    def check(self, disclosure: Disclosure) -> DisclosureReport:
        # Through its file, as an auditor gets it.
        return check_disclosure(Disclosure.from_json(disclosure.to_json()), self.ledger)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("disclosure"))


@pytest.mark.parametrize("plan", PAIR.consumers, ids=lambda plan: plan.meter)
@pytest.mark.parametrize("day", [DAY, DAY + 1])
def test_a_disclosed_day_shows_what_the_meter_asked_for_and_got(run: Run, plan: Any, day: int) -> None:
    report = run.check(run.of(plan.meter, day))
    assert report.faults == ()
    starts = [T0 + index * INTERVAL_S for index in range(4) if (T0 + index * INTERVAL_S) // DAY_S == day]
    expected = {start_s: plan.energies_wh[(start_s - T0) // INTERVAL_S] for start_s in starts}
    assert {interval.start_s: interval.demanded_wh for interval in report.intervals} == expected
    for interval in report.intervals:
        by_source: dict[str, int] = {}
        for delivery in interval.deliveries:
            by_source[delivery.source.label] = by_source.get(delivery.source.label, 0) + delivery.energy_wh
        assert by_source == {
            source: energy_wh
            for (meter, start_s, source), energy_wh in run.books.delivered_wh.items()
            if (meter, start_s) == (plan.meter, interval.start_s)
        }


def test_a_day_key_opens_that_day_and_no_other(run: Run) -> None:
    disclosed = run.of("anna")
    opened = {
        (demand.start_s, demand.pseudonym)
        for demand in demands_on_the_ledger(run.ledger)
        if demand.pseudonym == pseudonym(interval_key(disclosed.day_key, demand.start_s), disclosed.meter_key.key_id)
    }
    assert {start_s // DAY_S for start_s, _ in opened} == {DAY}
    assert len(opened) == 2
    following = run.of("anna", DAY + 1)
    assert following.day_key != disclosed.day_key
    report = run.check(replace(following, day_key=disclosed.day_key))
    assert len(report.faults) == 2
    assert all("not on the ledger under this day key" in fault for fault in report.faults)


def test_nothing_else_of_the_meter_is_given_out(run: Run) -> None:
    """In particular not the secret, from which every day follows."""
    store = BrokerStore(run.world.brokers["east"].config.database)
    consumer = store.consumer("anna")
    store.close()
    assert consumer is not None
    text = run.of("anna").to_json()
    assert consumer.secret.hex() not in text
    assert set(json.loads(text)) == {
        *("disclosure", "ledger", "genesis_sha256", "broker", "meter", "meter_key", "day", "day_key", "demands")
    }
    assert len(json.loads(text)["demands"]) == 2


def test_a_demand_that_was_left_out_is_noticed(run: Run) -> None:
    disclosed = run.of("anna")
    (fault,) = run.check(replace(disclosed, demands=disclosed.demands[1:])).faults
    assert "which was left out" in fault


def test_an_altered_day_key_finds_nothing(run: Run) -> None:
    disclosed = run.of("anna")
    altered = bytes((disclosed.day_key[0] ^ 1,)) + disclosed.day_key[1:]
    faults = run.check(replace(disclosed, day_key=altered)).faults
    assert len(faults) == 2
    assert all("not on the ledger under this day key" in fault for fault in faults)


def test_an_altered_demand_is_not_what_the_meter_signed(run: Run) -> None:
    disclosed = run.of("anna")
    first = disclosed.demands[0]
    for position in range(0, len(first), 7):
        altered = first[:position] + bytes((first[position] ^ 1,)) + first[position + 1 :]
        faults = run.check(replace(disclosed, demands=(altered, *disclosed.demands[1:]))).faults
        assert "demand 1 is not what anna signed" in faults[0], position
        assert "left out" in faults[1]


def test_another_demand_that_the_meter_signs_later_is_not_the_one_committed_to(run: Run) -> None:
    disclosed = run.of("anna")
    other = run.world.signed(run.world.meter_value("anna", T0, 77), "anna")
    (fault,) = run.check(replace(disclosed, demands=(other, *disclosed.demands[1:]))).faults
    assert "committed to another demand" in fault
    (again,) = run.check(replace(disclosed, demands=(*disclosed.demands, other))).faults
    assert "there twice, or in two versions" in again


def test_demands_of_others_and_of_other_days_do_not_belong(run: Run) -> None:
    disclosed, following, other = run.of("anna"), run.of("anna", DAY + 1), run.of("ben")
    (fault,) = run.check(replace(disclosed, demands=(*disclosed.demands, following.demands[0]))).faults
    assert "of 2026-02-01, another day" in fault
    (fault,) = run.check(replace(disclosed, demands=(*disclosed.demands, other.demands[0]))).faults
    assert "not what anna signed" in fault
    reading = run.world.signed(replace(run.world.meter_value("roof", T0, 5), meter="anna"), "anna")
    (fault,) = run.check(replace(disclosed, demands=(*disclosed.demands, reading))).faults
    assert "no demand of anna" in fault


def test_another_meter_broker_or_ledger_is_refused(run: Run) -> None:
    disclosed = run.of("anna")
    assert run.check(replace(disclosed, meter="ben")).faults
    assert run.check(replace(disclosed, meter_key=key("ben").public)).faults
    faults = run.check(replace(disclosed, broker="west")).faults
    assert faults
    assert all("served by east" in fault for fault in faults)
    for other in (replace(disclosed, ledger="other"), replace(disclosed, genesis_hash=bytes(32))):
        (fault,) = run.check(other).faults
        assert "founded on another genesis" in fault


def test_a_ledger_that_says_another_amount_is_refused(run: Run, tmp_path: Path) -> None:
    """Such a ledger does not verify either, but an auditor may have been given any."""
    disclosed = run.of("anna")
    alias = run.check(disclosed).intervals[0].pseudonym
    for change, reason in (
        ({"demanded_wh": 499}, "the meter asked for 500 Wh, the ledger has 499"),
        ({"delivered_wh": 1}, "slices are not what it says was delivered"),
        ({"commitment": bytes(32)}, "committed to another demand"),
    ):
        copy = tmp_path / reason[:8]
        shutil.copytree(run.ledger, copy)
        database = sqlite3.connect(copy / FILE_NAME)
        rows = database.execute("SELECT key, value FROM state WHERE key >= ? AND key < ?", table_bounds(DEMAND))
        ((raw_key, raw),) = [row for row in rows if decode_key(row[0])[2] == alias]
        row = decode_row(DEMAND, raw)
        assert isinstance(row, DemandRow)
        database.execute("UPDATE state SET value = ? WHERE key = ?", (encode_row(row._replace(**change)), raw_key))
        database.commit()
        database.close()
        (fault,) = check_disclosure(disclosed, copy).faults
        assert reason in fault


def test_an_interval_that_is_not_closed_yet_is_no_fault(folder: Path) -> None:
    world = World(PAIR, folder / "world")
    world.run(T0 + INTERVAL_S + 10)
    store = BrokerStore(world.brokers["east"].config.database)
    disclosed = disclose(store, world.genesis, "east", "anna", DAY)
    assert len(disclosed.demands) == len(list(store.messages(T0, MessageType.DEMAND))) == 1
    store.close()
    report = check_disclosure(disclosed, folder / "world" / "ledger")
    assert report.faults == ()
    assert [(interval.start_s, interval.demanded_wh) for interval in report.intervals] == [(T0, 500)]


def test_who_is_not_served_here_cannot_be_disclosed(run: Run) -> None:
    store = BrokerStore(run.world.brokers["east"].config.database)
    with pytest.raises(RegistrationError, match="no consumer ben"):
        disclose(store, run.world.genesis, "east", "ben", DAY)
    store.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"disclosure": 2}, "another version"),
        ({"day": "31.1.2026"}, "no UTC day"),
        ({"day": None}, "no UTC day"),
        ({"day_key": "00"}, "32 bytes"),
        ({"day_key": "zz"}, "hex"),
        ({"meter_key": "00"}, "meter_key"),
        ({"meter": "Ann A"}, "a name"),
        ({"demands": "all"}, "a list"),
        ({"demands": [5]}, "hex"),
    ],
)
def test_a_file_that_is_no_disclosure_is_refused_by_name(run: Run, change: dict[str, Any], reason: str) -> None:
    text = json.dumps(json.loads(run.of("anna").to_json()) | change)
    with pytest.raises(DisclosureError, match=reason):
        Disclosure.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "{", "9" * 5_000, "[" * 100_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(DisclosureError):
        Disclosure.from_json(text)


def test_days_are_utc(run: Run) -> None:
    assert day_number("1970-01-01") == 0
    assert day_number("2026-01-31") == DAY


def test_the_commands(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "east.toml"
    east = run.world.brokers["east"].config
    config.write_text(
        f'[broker]\nname = "east"\nkey_file = "{east.broker.key_file}"\ndata_dir = "{east.broker.data_dir}"\n'
        f'[ledger]\ngenesis_file = "{east.ledger.genesis_file}"\n'
    )
    give = ["disclose", "--config", str(config), "--meter", "anna", "--day"]
    assert cli.main([*give, "2026-01-31", "--out", str(folder / "day")]) == 0
    assert (folder / "day").stat().st_mode & 0o777 == 0o600
    assert cli.main([*give, "2026-01-31", "--out", str(folder / "day")]) == 1, "an existing file is never overwritten"
    assert cli.main([*give, "January"]) == 2
    capsys.readouterr()
    assert cli.main(["ledger", "check-disclosure", str(folder / "day"), "--ledger", str(run.ledger), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["demanded_wh"], line["delivered_wh"]) for line in lines] == [(500, 500), (300, 180)]
    value = json.loads((folder / "day").read_text())
    value["demands"].pop()
    (folder / "less").write_text(json.dumps(value))
    assert cli.main(["ledger", "check-disclosure", str(folder / "less"), "--ledger", str(run.ledger)]) == 1
    assert "left out" in capsys.readouterr().err
    (folder / "none").write_text("{}")
    assert cli.main(["ledger", "check-disclosure", str(folder / "none"), "--ledger", str(run.ledger)]) == 2
    (folder / "binary").write_bytes(b"\xff\x00")
    capsys.readouterr()
    assert cli.main(["ledger", "check-disclosure", str(folder / "binary"), "--ledger", str(run.ledger)]) == 2
    assert "binary: expected what `energy-broker disclose` gave out (it is no text)" in capsys.readouterr().err


def test_the_engine_is_not_needed_and_may_run(run: Run) -> None:
    engine = EmbeddedLedger(run.ledger, run.world.genesis, "node", key("node"))
    assert run.check(run.of("anna")).faults == ()
    engine.close()
