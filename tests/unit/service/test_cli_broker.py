"""`energy-broker`: every command is documented and does what it says; what is wrong is a sentence and an exit code."""

import argparse
import csv
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker import cli
from broker.config import load_broker_config
from broker.market.forecast import HistoryKind
from broker.protocol.messages import (
    DayAmount,
    Forecast,
    Genesis,
    MessageType,
    NeighbourAmounts,
    Promises,
    SourceOffer,
    SourceOutlook,
    Stock,
    Wishes,
)
from broker.protocol.sources import Source, SourceGroup
from broker.service.store import SCHEMA_VERSION, BatchKind, BatchRow, BrokerStore, OrderInRow, OrderOutRow, WorkState

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "broker.md"


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, with its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from leaves(child, (*words, name))
            return
    yield " ".join(words), parser


COMMANDS = dict(leaves(cli._parser()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_for_itself_and_every_argument(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"energy-broker {command}" in capsys.readouterr().out
    parser = COMMANDS[command]
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_on_the_page(command: str) -> None:
    assert f"`energy-broker {command}" in PAGE.read_text()


def test_every_option_is_on_the_page() -> None:
    page = PAGE.read_text()
    options = {
        option for parser in COMMANDS.values() for action in parser._actions for option in action.option_strings
    } - {"-h", "--help"}
    assert {option for option in options if f"{option}`" not in page and f"{option} " not in page} == set()


def test_every_table_is_on_the_page() -> None:
    from broker.service.registration import TABLES

    page = PAGE.read_text()
    assert [table for table in TABLES if table not in page] == []


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("energy-broker 0.")


class Desk:
    """A folder with keys, a genesis, a broker's config and statements, made by commands."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.keys = {
            name: self.done("key", "new", self.file(f"{name}.pem")).strip()
            for name in ("registrar", "node", "east", "west", "ola", "roof", "home", "barn")
        }
        self.done(*self.genesis())
        self.config = self.file("east.toml")
        self.config.write_text(self.config_text())
        sign = ("--genesis", self.file("genesis.cbor"), "--name")
        self.done(
            *("registrar", "register", *sign, "registrar", "--key", self.file("registrar.pem")),
            *("--party", "ola", "--role", "provider", "--party-key", self.keys["ola"], "--out", self.file("ola.reg")),
        )
        self.done(
            *("registrar", "admit", *sign, "registrar", "--key", self.file("registrar.pem"), "--device", "roof"),
            *("--owner", "ola", "--meter-key", self.keys["roof"], "--source", "solar", "--capacity-w", 4000),
            *("--area", "home", "--commissioned", "2020-01-01T00:00:00Z", "--out", self.file("roof.adm")),
        )
        self.done(*self.mandate("east", "roof.man"))

    def file(self, name: str) -> Path:
        return self.folder / name

    def config_text(self) -> str:
        return f"""
[broker]
name = "east"
key_file = "east.pem"
data_dir = "data"

[ledger]
genesis_file = "genesis.cbor"

[[neighbours]]
name = "west"
key = "{self.keys["west"]}"
"""

    def genesis(self, **changes: object) -> list[object]:
        values: dict[str, object] = {
            "out": self.file("genesis.cbor"),
            "ledger": "test-ledger",
            "area": "home",
            "registrar": f"registrar={self.keys['registrar']}",
            "validator": f"node={self.keys['node']}",
        } | changes
        words: list[object] = ["ledger", "genesis"]
        for name, value in values.items():
            words += [f"--{name.replace('_', '-')}", value]
        return words

    def mandate(self, broker: str, out: str) -> list[object]:
        return [
            *("provider", "mandate", "--genesis", self.file("genesis.cbor"), "--name", "ola"),
            *("--key", self.file("ola.pem"), "--device", "roof", "--broker", broker),
            *("--from", "2021-01-01T00:00:00Z", "--out", self.file(out)),
        ]

    def consumer(self, *more: object, meter: str = "home", key: str | None = None) -> list[object]:
        key = self.keys[meter] if key is None else key
        return ["consumer", "add", "--config", self.config, "--meter", meter, "--key", key, *more]

    def provider(self, *statements: str) -> list[object]:
        return ["provider", "add", "--config", self.config, "--price", 90_000, *map(self.file, statements)]

    def run(self, *words: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def done(self, *words: object) -> str:
        code, out, err = self.run(*words)
        assert (code, err) == (0, "")
        return out

    def store(self) -> BrokerStore:
        return BrokerStore(load_broker_config(self.config).database)

    def table(self, name: str, *form: str) -> str:
        return self.done("list", name, "--config", self.config, *form)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def without(name: str) -> Callable[[Desk], list[object]]:
    """`check-config` after a line of the config is changed."""

    def words(desk: Desk) -> list[object]:
        old, new = name.split(" -> ")
        desk.config.write_text(desk.config_text().replace(old, new))
        return ["check-config", desk.config]

    return words


WRONG: dict[str, tuple[Callable[[Desk], list[object]], str]] = {
    "contract over 100 %": (lambda d: d.consumer("--line", "solar=60", "--line", "wind=50"), "110 %"),
    "unknown source": (lambda d: d.consumer("--line", "moonlight=100"), "moonlight"),
    "no percentage": (lambda d: d.consumer("--line", "solar"), "SOURCE=PERCENT"),
    "a share of NaN": (lambda d: d.consumer("--line", "solar=nan"), "percentage"),
    "an infinite share": (lambda d: d.consumer("--line", "solar=inf"), "percentage"),
    "a share without end": (lambda d: d.consumer("--line", "solar=33.33333"), "four decimals"),
    "a negative share": (lambda d: d.consumer("--line", "solar=-5"), "from 0 to 100"),
    "a line twice": (lambda d: d.consumer("--line", "solar=5", "--line", "solar=5"), "two lines"),
    "unknown shortage choice": (lambda d: d.consumer("--shortage", "cry"), "unmatched, any or substitutes"),
    "unknown substitute": (lambda d: d.consumer("--shortage", "substitutes:moon"), "moon"),
    "unknown window": (lambda d: d.consumer("--window", "week"), "interval, day or month"),
    "a ceiling without a price": (lambda d: d.consumer("--ceiling", "solar"), "SOURCE=PRICE"),
    "an end before the beginning": (lambda d: d.consumer("--until", "1970-01-01T00:00:00Z"), "after the beginning"),
    "an exclusive share for nobody": (lambda d: [*d.provider("roof.man"), "--exclusive", "5"], "belong together"),
    "a reserve of NaN": (lambda d: [*d.provider("roof.man"), "--reserve", "nan"], "percentage"),
    "time without zone": (lambda d: d.consumer("--from", "2026-01-31T00:00:00"), "with its zone"),
    "no time at all": (lambda d: d.consumer("--from", "soon"), "2026-01-31T00:00:00Z"),
    "unknown area": (lambda d: d.consumer("--area", "mars"), "mars"),
    "bad key hex": (lambda d: d.consumer(key="zz"), "key show"),
    "a key that is none": (lambda d: d.consumer(key="a301"), "key show"),
    "a meter name that is none": (lambda d: d.consumer(meter="My Meter", key=d.keys["home"]), "My Meter"),
    "config typo": (without("data_dir -> data_dri"), "broker.data_dri"),
    "config value": (without('"east" -> "East Side"'), "broker.name"),
    "config without ledger": (without("[ledger] -> [legder]"), "legder"),
    "neighbour key": (without("a301 -> zz01"), "neighbours"),
    "itself as neighbour": (without('"west" -> "east"'), "not this broker itself"),
    "missing key file": (without("east.pem -> gone.pem"), "energy-broker key new"),
    "missing genesis": (without("genesis.cbor -> gone.cbor"), "gone.cbor"),
    "missing config": (lambda d: ["run", "--config", d.file("gone.toml")], "gone.toml"),
    "conductor on a real ledger": (without('data_dir = "data" -> data_dir = "data"\nclock = "conductor"'), "simulated"),
    "missing CA file": (without('[ledger] -> [mqtt]\nca_file = "gone.crt"\n[ledger]'), "mqtt.ca_file"),
    "gates in the wrong order": (lambda d: d.genesis(gate_1_s=900, gate_2_s=600), "gate_1_s < gate_2_s"),
    "gate 2 after the next interval": (lambda d: d.genesis(gate_2_s=1_801), "interval_s"),
    "odd interval": (lambda d: d.genesis(interval_s=1_000), "900, 1800 or 3600"),
    "ledger name": (lambda d: d.genesis(ledger="My Ledger"), "genesis.ledger"),
    "registrar without key": (lambda d: d.genesis(registrar="registrar"), "key show"),
    "provider without mandate": (lambda d: d.provider("ola.reg", "roof.adm"), "no mandate"),
    "provider without admission": (lambda d: d.provider("ola.reg", "roof.man"), "admission of roof"),
    "statement that is none": (lambda d: d.provider("east.pem"), "east.pem: expected a signed statement"),
    "missing statement": (lambda d: d.provider("gone.man"), "gone.man"),
    "negative price": (lambda d: [*d.provider("roof.man")[:5], "-1", d.file("roof.man")], "0 or more"),
    "unknown contract": (
        lambda d: ["consumer", "contract", *d.consumer()[2:6], "--from", "2030-01-01T00:00:00Z"],
        "no consumer home",
    ),
    "a share beyond all": (lambda d: d.consumer("--line", "solar=" + "1" * 5_000), "from 0 to 100"),
    "unknown device source": (
        lambda d: [
            *("registrar", "admit", "--genesis", d.file("genesis.cbor"), "--name", "registrar"),
            *("--key", d.file("registrar.pem"), "--device", "x", "--owner", "ola", "--meter-key", d.keys["roof"]),
            *("--source", "moonlight", "--capacity-w", "1", "--area", "home"),
            *("--commissioned", "2020-01-01T00:00:00Z", "--out", d.file("x")),
        ],
        "--source: unknown source 'moonlight'; known: solar",
    ),
    "device without capacity": (
        lambda d: [
            *("registrar", "admit", "--genesis", d.file("genesis.cbor"), "--name", "registrar"),
            *("--key", d.file("registrar.pem"), "--device", "x", "--owner", "ola", "--meter-key", d.keys["roof"]),
            *("--source", "solar", "--capacity-w", "0", "--area", "home"),
            *("--commissioned", "2020-01-01T00:00:00Z", "--out", d.file("x")),
        ],
        "--capacity-w: expected a whole number of 1 or more, got '0'",
    ),
    "unknown table": (lambda d: ["list", "secrets", "--config", d.config], "invalid choice"),
    "no command": (lambda _d: [], "required"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_ends_with_2_and_a_sentence(desk: Desk, case: str) -> None:
    words, sentence = WRONG[case]
    code, out, err = desk.run(*words(desk))
    assert (code, out) == (2, "")
    assert sentence in err
    assert "Traceback" not in err


def test_a_typo_in_a_config_names_file_key_and_what_was_meant(desk: Desk) -> None:
    desk.config.write_text(desk.config_text().replace("key_file", "key_flie"))
    code, _, err = desk.run("check-config", desk.config)
    assert code == 2
    assert str(desk.config) in err
    assert "broker.key_flie" in err
    assert "key_file" in err


def test_a_mandate_for_another_broker_is_not_taken(desk: Desk) -> None:
    desk.done(*desk.mandate("west", "west.man"))
    code, _, err = desk.run(*desk.provider("ola.reg", "roof.adm", "west.man"))
    assert code == 2
    assert "is for west, this broker is east" in err
    assert desk.table("providers") == ""


def test_a_consumer_is_added_once_and_keeps_its_contract(desk: Desk) -> None:
    printed = desk.done(*desk.consumer("--line", "solar=40", "--line", "wind=30"))
    assert printed == "home: solar 40 %, wind 30 %, any 30 %; when short: unmatched\n"
    code, _, err = desk.run(*desk.consumer("--line", "coal=100"))
    assert code == 2
    assert "consumer contract" in err
    code, _, err = desk.run(*desk.consumer(meter="barn", key=desk.keys["home"]))
    assert code == 2
    assert "another meter has the key of barn" in err
    (row,) = map(json.loads, desk.table("contracts", "--json").splitlines())
    assert row["lines_ppm"] == {"solar": 400_000, "wind": 300_000, "any": 300_000}
    assert desk.table("consumers").count("\n") == 1


def test_a_consumer_asks_for_hints_and_can_do_without_them(desk: Desk) -> None:
    def wishes() -> list[bool]:
        return [json.loads(row)["hints"] for row in desk.table("consumers", "--json").splitlines()]

    desk.done(*desk.consumer("--line", "solar=40", "--hints"))
    assert wishes() == [True]
    words = ["consumer", "hints", "--config", desk.config, "--meter"]
    assert desk.done(*words, "home", "--off") == "home: no hints\n"
    assert wishes() == [False]
    assert desk.done(*words, "home") == "home: hints of each next day\n"
    assert wishes() == [True]
    code, _, err = desk.run(*words, "barn")
    assert code == 2
    assert "barn is no consumer's meter here" in err


def test_the_forecasts_of_this_broker_and_its_neighbours_are_shown(desk: Desk) -> None:
    words = ["forecast", "--config", desk.config]
    assert "nothing is forecast yet" in desk.done(*words)
    assert desk.done(*words, "--json") == ""
    day_s = 20_000 * 86_400
    solar, wind, anything = int(Source.SOLAR), int(Source.WIND), int(SourceGroup.ANY)
    generated, demanded = int(HistoryKind.GENERATED), int(HistoryKind.DEMANDED)
    first_wh = 1, *(0,) * 47
    store = desk.store()
    store.begin()
    store.set_expected(
        day_s,
        [
            (generated, solar, tuple(700 * wh for wh in first_wh)),
            (demanded, solar, tuple(200 * wh for wh in first_wh)),
            (demanded, wind, tuple(50 * wh for wh in first_wh)),
            (demanded, anything, tuple(600 * wh for wh in first_wh)),
        ],
        forget_before_s=0,
    )
    for broker, surplus_wh in (("west", 400), ("north", 100)):
        heard = Forecast(
            broker, day_s, day_s + 86_400, (SourceOutlook(Source.WIND, 2, 0, surplus_wh),), (300, *(0,) * 47)
        )
        store.set_heard(day_s, MessageType.FORECAST, broker, heard.to_payload())
    old = Forecast("west", day_s - 86_400, day_s, (), (900,) * 48)
    store.set_heard(old.start_s, MessageType.FORECAST, "west", old.to_payload())
    store.commit()
    store.close()
    keys = ("generated_wh", "demanded_wh", "shortage_wh", "surplus_wh")
    rows = [json.loads(row) for row in desk.done(*words, "--json").splitlines()]
    assert {
        (row["broker"], row["start_s"] - day_s, row["target"]): tuple(row[key] for key in keys) for row in rows
    } == {
        ("east", 0, "solar"): (700, 200, 0, 0),
        ("east", 0, "wind"): (0, 50, 50, 0),
        ("east", 0, "any"): (0, 600, 100, 0),
        ("north", 3_600, "wind"): (None, None, 0, 100),
        ("north", 0, "groups"): (None, None, 300, 0),
        ("west", 3_600, "wind"): (None, None, 0, 400),
        ("west", 0, "groups"): (None, None, 300, 0),
    }
    assert desk.done(*words).count("\n") == len(rows)


def test_what_is_arranged_of_the_next_day_is_shown_both_ways(desk: Desk) -> None:
    day_s = 20_000 * 86_400
    store = desk.store()
    store.begin()
    store.set_expected(day_s, [(int(HistoryKind.GENERATED), int(Source.WIND), (700,) * 48)], forget_before_s=day_s)
    of_east, of_west = (
        (NeighbourAmounts(name, (DayAmount(source, 2, energy_wh),)),)
        for name, source, energy_wh in (("east", Source.WIND, 600), ("west", Source.SOLAR, 300))
    )
    for day in (day_s - 86_400, day_s):
        for broker, wished in (("east", of_west), ("west", of_east)):
            said = Wishes(broker, day, day + 86_400, wished)
            store.set_heard(day, MessageType.WISHES, broker, said.to_payload())
    promised = (NeighbourAmounts("west", (DayAmount(Source.WIND, 2, 500),)),)
    answer = Promises("east", day_s, day_s + 86_400, promised)
    store.set_heard(day_s, MessageType.PROMISES, "east", answer.to_payload())
    store.commit()
    store.close()
    words = ["forecast", "--config", desk.config]
    rows = [json.loads(row) for row in desk.done(*words, "--json").splitlines()]
    keys = ("supplier", "requester", "start_s", "target", "wished_wh", "promised_wh")
    assert [tuple(row[key] for key in keys) for row in rows if "supplier" in row] == [
        ("east", "west", day_s + 3_600, "wind", 600, 500),
        ("west", "east", day_s + 3_600, "solar", 300, None),
    ]
    assert f"supplier=west  requester=east  start_s={day_s + 3_600}  target=solar  wished_wh=300\n" in desk.done(*words)


def test_a_contract_changes_from_a_coming_time_on(desk: Desk) -> None:
    desk.done(*desk.consumer("--line", "solar=100", "--from", "2026-01-01T00:00:00Z"))
    change = ["consumer", "contract", "--config", desk.config, "--meter", "home", "--line", "wind=100", "--from"]
    code, _, err = desk.run(*change, "2025-01-01T00:00:00Z")
    assert code == 2
    assert "must begin later" in err
    store = desk.store()
    february_s = 1_769_904_000
    store.add_message(february_s, "home", MessageType.DEMAND, 0, b"m", b"raw", 1, b"p", b"c")
    store.close()
    code, _, err = desk.run(*change, "2026-02-01T00:00:00Z")
    assert code == 2
    assert "has demands after" in err
    desk.done(*change, "2026-03-01T00:00:00Z")
    versions = [json.loads(line)["version"] for line in desk.table("contracts", "--json").splitlines()]
    assert versions == [1, 2]


def test_a_provider_is_taken_on_once_with_its_statements(desk: Desk) -> None:
    assert desk.done(*desk.provider("ola.reg", "roof.adm", "roof.man")) == "taken on: roof\n"
    (row,) = csv.DictReader(io.StringIO(desk.table("providers", "--csv")))
    assert (row["device"], row["owner"], row["source"], row["price"]) == ("roof", "ola", "solar", "90000")
    states = [json.loads(line)["state"] for line in desk.table("submissions", "--json").splitlines()]
    assert states == ["waiting"] * 3
    code, _, err = desk.run(*desk.provider("ola.reg", "roof.adm", "roof.man"))
    assert code == 2
    assert "taken on already" in err


def test_a_devices_meter_is_no_consumer(desk: Desk) -> None:
    desk.done(*desk.provider("ola.reg", "roof.adm", "roof.man"))
    code, _, err = desk.run(*desk.consumer(meter="roof"))
    assert code == 2
    assert "generating device" in err


def test_statements_are_kept_and_other_files_are_not(desk: Desk) -> None:
    out = desk.done("submit", "--config", desk.config, desk.file("ola.reg"))
    assert out.endswith("registration, kept for the ledger\n")
    code, _, err = desk.run("submit", "--config", desk.config, desk.file("genesis.cbor"))
    assert code == 2
    assert "genesis.cbor: expected a signed statement as `energy-broker registrar`" in err


def test_states_are_words(desk: Desk) -> None:
    store = desk.store()
    store.add_order_out(OrderOutRow(b"1" * 16, 1_800, "west", 3, 100, b"raw", "seen", 80, 80, 0, 1, None, None))
    store.add_order_in(OrderInRow("west", b"2" * 16, 1_800, 3, 100, 9, b"raw", "committed", 60, None, 1, 2))
    store.add_batch(BatchRow(1, b"b" * 32, BatchKind.DELIVER, 1_800, b"raw", WorkState.WAITING))
    store.set_batch(b"b" * 32, WorkState.REFUSED, None, "not_held: somebody else holds it")
    store.add_conflict("home", MessageType.DEMAND, 1_800, 0, b"m" * 32, b"raw", 10)
    store.close()
    (order,) = map(json.loads, desk.table("orders", "--json").splitlines())
    assert (order["state"], order["source"], order["neighbour"]) == ("seen", "wind", "west")
    (request,) = map(json.loads, desk.table("requests", "--json").splitlines())
    assert (request["state"], request["requester"], request["granted_wh"]) == ("committed", "west", 60)
    (batch,) = map(json.loads, desk.table("batches", "--json").splitlines())
    assert (batch["kind"], batch["state"], batch["reason"]) == (
        *("deliver", "refused"),
        "not_held: somebody else holds it",
    )
    assert "kind=demand" in desk.table("conflicts")


def test_tables_are_the_same_in_all_three_forms(desk: Desk) -> None:
    desk.done(*desk.consumer("--line", "solar=40"))
    (as_json,) = map(json.loads, desk.table("contracts", "--json").splitlines())
    (as_csv,) = csv.DictReader(io.StringIO(desk.table("contracts", "--csv")))
    assert json.loads(as_csv["lines_ppm"]) == as_json["lines_ppm"]
    assert as_csv["meter"] == as_json["meter"] == "home"
    assert "meter=home" in desk.table("contracts")


def test_secrets_are_in_no_table(desk: Desk) -> None:
    from broker.service.registration import TABLES

    desk.done(*desk.consumer("--line", "solar=40"))
    store = desk.store()
    (consumer,) = store.consumers()
    store.close()
    everything = "".join(desk.table(name, form) for name in TABLES for form in ("--json", "--csv"))
    assert consumer.secret.hex() not in everything
    assert repr(consumer.secret) not in everything


def test_keys_are_never_overwritten(desk: Desk) -> None:
    before = desk.file("east.pem").read_bytes()
    code, _, err = desk.run("key", "new", desk.file("east.pem"))
    assert code == 1
    assert "east.pem" in err
    assert desk.file("east.pem").read_bytes() == before
    assert desk.done("key", "show", desk.file("east.pem")).strip() == desk.keys["east"]


def test_a_p256_key(desk: Desk) -> None:
    public = desk.done("key", "new", desk.file("p256.pem"), "--algorithm", "p256").strip()
    assert public.startswith("a4010220")
    assert desk.done("key", "show", desk.file("p256.pem")).strip() == public


def test_a_genesis_holds_what_was_asked_for(desk: Desk) -> None:
    desk.done(*desk.genesis(out=desk.file("other.cbor"), conductor=f"baton={desk.keys['barn']}", gate_2_s=1_300))
    genesis = Genesis.from_bytes(desk.file("other.cbor").read_bytes())
    assert genesis.simulated
    assert genesis.conductor is not None
    assert genesis.conductor.name == "baton"
    assert genesis.gate_2_s == 1_300
    trust = json.loads(desk.done("ledger", "trust", "--genesis", desk.file("genesis.cbor")))
    assert trust["ledger"] == "test-ledger"


def test_check_config_says_that_all_is_well(desk: Desk) -> None:
    assert desk.done("check-config", desk.config).endswith("broker east on ledger test-ledger: fine\n")


def test_the_example_config_is_one() -> None:
    config = load_broker_config(ROOT / "firmware_config" / "examples" / "broker.toml")
    assert config.broker.name == "east"
    assert config.ledger.host is not None


def test_a_ledger_that_is_not_there_or_broken_ends_with_1_or_2(desk: Desk) -> None:
    for words in (["verify"], ["show"], ["audit"]):
        more = ["head"] if words == ["show"] else []
        code, _, err = desk.run("ledger", *words, desk.file("no-ledger"), *more)
        assert code in (1, 2)
        assert "no-ledger" in err
        assert "Traceback" not in err


def test_a_database_of_somebody_else_ends_with_1(desk: Desk) -> None:
    desk.file("data").mkdir()
    desk.file("data/broker.db").write_bytes(b"nothing of ours" * 1_000)
    code, _, err = desk.run("list", "consumers", "--config", desk.config)
    assert code == 1
    assert "broker.db" in err


def test_a_contract_that_could_not_have_been_kept_is_taken_with_a_warning(desk: Desk) -> None:
    store = desk.store()
    store.begin()
    for start_s in (0, 1_800):
        left_over = Stock("east", start_s, start_s + 1_800, (SourceOffer(Source.SOLAR, 100, 90_000),))
        store.set_heard(start_s, MessageType.STOCK, "east", left_over.to_payload())
    store.commit()
    store.close()
    sentence = (
        "warning: of solar, 20 % of what 24000 Wh a day need was left over in the last 14 days (200 of 1000 Wh),"
        " here and at neighbours\n"
    )
    code, out, err = desk.run(*desk.consumer("--line", "solar=100", "--expect-wh-a-day", 24_000))
    assert (code, out, err) == (0, "home: solar 100 %; when short: unmatched\n", sentence)


def test_a_contract_takes_all_that_a_person_may_choose(desk: Desk) -> None:
    chosen = ("--window", "day", "--prefer", "ola", "--exclude", "pia", "--highest-price", 90, "--ceiling", "solar=80")
    out = desk.done(*desk.consumer("--line", "solar=100", *chosen, "--until", "2030-01-01T00:00:00Z"))
    assert out == (
        "home: solar 100 %; of the same day; first of ola; nothing of pia; at most 90 µ/kWh; solar at most 80 µ/kWh;"
        " when short: unmatched\n"
    )
    (row,) = [
        json.loads(line)
        for line in desk.done("list", "contracts", "--config", desk.config, "--json").split("\n")
        if line
    ]
    assert row["window"] == "day"
    assert (row["preferred_providers"], row["excluded_providers"]) == (["ola"], ["pia"])
    assert (row["highest_price"], row["price_ceilings"]) == (90, {"solar": 80})
    assert row["valid_until_s"] == 1_893_456_000


def test_a_provider_keeps_shares_for_its_own(desk: Desk) -> None:
    kept = ("--reserve", "20", "--exclusive", "12.5", "--exclusive-for", "home")
    desk.done(*desk.provider("ola.reg", "roof.adm", "roof.man"), *kept)
    (row,) = [
        json.loads(line)
        for line in desk.done("list", "providers", "--config", desk.config, "--json").split("\n")
        if line
    ]
    assert (row["reserve_ppm"], row["exclusive_ppm"], row["exclusive_for"]) == (200_000, 125_000, ["home"])


@pytest.mark.parametrize(
    "words",
    [
        ("run",),
        ("run", "--recover"),
        ("list", "consumers"),
        ("statement", "--own", "--month", "2026-01"),
        ("consumer", "contract", "--meter", "home", "--line", "solar=100", "--from", "2026-01-01T00:00:00Z"),
    ],
    ids=" ".join,
)
def test_a_database_of_an_earlier_schema_is_one_sentence_with_the_next_step(desk: Desk, words: tuple[str, ...]) -> None:
    desk.store().close()
    database = sqlite3.connect(desk.folder / "data" / "broker.db")
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION - 1}")
    database.close()
    code, out, err = desk.run(*words, "--config", desk.config)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"is of schema {SCHEMA_VERSION - 1}, written by another version of this program" in err
    assert "run the version that wrote it, or give this one an empty data_dir" in err


@pytest.mark.parametrize("recovers", [False, True])
def test_only_who_asks_for_it_recovers(tmp_path: Path, recovers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def run_broker(config: object, *, recovers: bool) -> int:
        asked.append(recovers)
        return 0

    monkeypatch.setattr("broker.service.run.run_broker", run_broker)
    monkeypatch.setattr("broker.commands.broker.load_broker_config", lambda path: path)
    arguments = ["run", "--config", str(tmp_path / "broker.toml"), *(["--recover"] if recovers else [])]
    assert cli.main(arguments) == 0
    assert asked == [recovers]
