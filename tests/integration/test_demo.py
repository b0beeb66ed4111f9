"""The demo as a person runs it: the whole path, and its books held against the recorded data and the ledger."""

import csv
import fcntl
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.books import summarize
from dengen_testing.market import Market, MarketPlan, build_market
from dengen_testing.mosquitto import Mosquitto

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "demo"
ORIGIN_S = 1_318_168_800
SUMMARY_KEYS = [
    "intervals",
    "readers",
    "brokers",
    "consumers",
    "issued_wh",
    "neighbour_requests",
    "neighbour_transfers",
    "neighbour_wh",
    "ledger",
    "seconds",
]


@dataclass(frozen=True)
class Demo:
    """A demo that has run: what it wrote and said."""

    out: Path
    summary: dict[str, Any]
    said: str
    progress: str

    def operations(self) -> list[dict[str, Any]]:
        command = [
            sys.executable,
            "-m",
            "broker.cli",
            "ledger",
            "show",
            str(self.out / "ledger"),
            "operations",
            "--json",
        ]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [json.loads(line) for line in shown.splitlines()]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run once: where several workers share the tests, the others wait and read what the first wrote."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out, said, progress = folder / "demo-out", folder / "demo-said", folder / "demo-progress"
    with (folder / "demo-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            command = [sys.executable, str(DEMO / "run.py"), "--out", str(out)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert ended.returncode == 0, ended.stderr
            progress.write_text(ended.stderr)
            said.write_text(ended.stdout)
    return Demo(out, json.loads((out / "summary.json").read_text()), said.read_text(), progress.read_text())


def recorded_wh(week: str) -> int:
    """The week's consumption straight from the file: the sum of whole Wh a half hour, mean kW times half an hour."""
    with (DEMO / "data" / f"{week}.csv").open(newline="") as file:
        return sum(round(float(row["GC"]) * 500) for row in csv.DictReader(file))


def consumer(demo: Demo, meter: str) -> dict[str, Any]:
    (found,) = [entry for entry in demo.summary["consumers"] if entry["meter"] == meter]
    return found


def test_the_summary_has_the_keys_that_others_rely_on(demo: Demo) -> None:
    assert list(demo.summary) == SUMMARY_KEYS
    assert demo.summary["intervals"] == 336
    assert demo.summary["readers"] == ["modbus_rtu", "modbus_tcp", "p1"]
    assert demo.summary["brokers"] == ["east", "west"]
    for entry in demo.summary["consumers"]:
        assert list(entry) == ["meter", "broker", "contract", "consumed_wh", "delivered_wh", "unmatched_wh"]
        assert sum(entry["contract"].values()) == 1_000_000


def test_every_wh_consumed_is_delivered_or_on_record_as_unmatched(demo: Demo) -> None:
    for entry in demo.summary["consumers"]:
        assert sum(entry["delivered_wh"].values()) + entry["unmatched_wh"] == entry["consumed_wh"]


@pytest.mark.parametrize("week", ["winter", "spring", "summer"])
def test_consumption_equals_the_recorded_data_to_the_wh(demo: Demo, week: str) -> None:
    assert consumer(demo, f"home-{week}")["consumed_wh"] == recorded_wh(week)


def test_two_homes_are_fully_supplied_and_one_is_short_at_times(demo: Demo) -> None:
    unmatched = {entry["meter"]: entry["unmatched_wh"] for entry in demo.summary["consumers"]}
    assert unmatched["home-winter"] == unmatched["home-spring"] == 0
    assert 0 < unmatched["home-summer"] < consumer(demo, "home-summer")["consumed_wh"] // 2


def test_shares_keep_their_bound_where_supply_allowed(demo: Demo) -> None:
    home = consumer(demo, "home-winter")
    assert set(home["delivered_wh"]) == set(home["contract"])
    for source, share_ppm in home["contract"].items():
        assert abs(1_000_000 * home["delivered_wh"][source] - share_ppm * home["consumed_wh"]) < 2_000_000


def test_the_neighbour_helps_every_day_and_the_ledger_shows_each_step(demo: Demo) -> None:
    operations = demo.operations()
    bought = [operation for operation in operations if operation["operation"] == "transfer" and operation["order"]]
    delivered_at = {
        (*asset_of(part["asset"]), number): operation["height"]
        for operation in operations
        if operation["operation"] == "deliver"
        for part in operation["slices"]
        for number in range(part["from_wh"], part["to_wh"])
    }
    assert {(transfer["asset"]["start_s"] - ORIGIN_S) // 86_400 for transfer in bought} == set(range(7))
    for transfer in bought:
        assert {transfer["sender"], transfer["receiver"]} == {"east", "west"}
        # Each of the same Wh goes on to a consumer, perhaps to several lines, and not before it was there.
        for number in range(transfer["from_wh"], transfer["to_wh"]):
            assert delivered_at[(*asset_of(transfer["asset"]), number)] >= transfer["height"]
    assert demo.summary["neighbour_transfers"] == len(bought)
    assert demo.summary["neighbour_wh"] == sum(transfer["to_wh"] - transfer["from_wh"] for transfer in bought)


def test_the_weeks_statements_balance_to_the_micro_over_all_parties(demo: Demo) -> None:
    statements = {path.stem: json.loads(path.read_text()) for path in (demo.out / "statements").glob("*.json")}
    purse: Counter[str] = Counter()
    between: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name, statement in statements.items():
        if name.endswith("-own"):
            continue
        for account in statement["accounts"]:
            payer, payee = account["payer"], account["payee"]
            assert sum(line["amount_micro"] for line in account["lines"]) == account["amount_micro"]
            if statement["party"] in demo.summary["brokers"]:
                between.setdefault((payer, payee), []).append((account["energy_wh"], account["amount_micro"]))
                if account["flow"] == "bought":
                    continue  # The seller's statement has it, too, and money moves once.
            purse[payer] -= account["amount_micro"]
            purse[payee] += account["amount_micro"]
    assert sum(purse.values()) == 0
    assert purse["home-summer"] < 0
    assert all(len(said) == 2 and said[0] == said[1] for said in between.values())
    assert sum(said[0][0] for said in between.values()) == demo.summary["neighbour_wh"]
    for broker in demo.summary["brokers"]:
        totals = statements[f"{broker}-own"]["totals"]
        assert purse[broker] == totals["passed_on_micro"] - totals["bought_micro"]
        assert totals["bought_wh"] == totals["passed_on_wh"] + totals["kept_wh"]
    for entry in demo.summary["consumers"]:
        statement = statements[f"{entry['broker']}-consumer-{entry['meter']}"]
        assert statement["unmatched_wh"] == entry["unmatched_wh"]
        assert statement["accounts"][0]["energy_wh"] == sum(entry["delivered_wh"].values())


def asset_of(asset: dict[str, Any]) -> tuple[str, int]:
    return asset["device"], asset["start_s"]


def test_the_ledger_verifies_from_the_command_line(demo: Demo) -> None:
    assert demo.summary["ledger"]["verified"] is True
    command = [sys.executable, "-m", "broker.cli", "ledger", "verify", str(demo.out / "ledger")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert json.loads((demo.out / "trust.json").read_text())


def test_each_consumer_has_a_certificate_that_verifies_and_says_what_the_books_say(demo: Demo) -> None:
    certificates = demo.out / "certificates"
    assert {file.stem for file in certificates.glob("*.cbor")} == {
        entry["meter"] for entry in demo.summary["consumers"]
    }
    for entry in demo.summary["consumers"]:
        command = [sys.executable, "-m", "broker.cli", "certificate", "verify", "--json"]
        command += [str(certificates / f"{entry['meter']}.cbor"), "--trust", str(demo.out / "trust.json")]
        proven = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert (proven["meter"], proven["broker"]) == (entry["meter"], entry["broker"])
        assert (proven["demanded_wh"], proven["unmatched_wh"]) == (entry["consumed_wh"], entry["unmatched_wh"])
        delivered = {source: energy_wh for source, energy_wh in entry["delivered_wh"].items() if energy_wh}
        assert proven["by_source_wh"] == delivered
    assert list(certificates.glob("*.html"))


def test_progress_and_a_table_are_shown(demo: Demo) -> None:
    assert "100 %  336/336 half hours" in demo.progress
    for text in ("home-summer", "contracted", "unmatched", "verified from the first block"):
        assert text in demo.said


def run_plan(plan: MarketPlan, folder: Path) -> dict[str, Any]:
    with Mosquitto(folder / "mosquitto") as mosquitto:
        mqtt = mosquitto.mqtt_config()
        workspace = build_market(plan, folder / "work", folder / "ledger", mqtt)
        with Market(workspace, mqtt) as market:
            market.run()
    summary = summarize(workspace, "embedded", 0)
    del summary["ledger"]["height"]
    return summary


def test_two_runs_give_the_same_books(tmp_path: Path) -> None:
    plan = runpy.run_path(str(DEMO / "scenario.py"))["demo_plan"](30)
    first, second = (run_plan(plan, tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert first["neighbour_transfers"] > 0
