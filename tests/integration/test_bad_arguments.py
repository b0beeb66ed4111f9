"""Every argument of every command of both programs, given what does not belong there: a sentence and an exit code.

The commands are those of argparse's own tree, so a new one is covered by being there. Each runs in this process, in a
folder where every other argument is right, as far as its name says what is right. What would serve is interrupted.
"""

import argparse
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Final

import cbor2
import pytest
from support.ledger_world import GENESIS, found, key

from broker import cli as broker_cli
from broker.protocol.keys import save_private_key
from meter_agent import cli as agent_cli

SERVES_AFTER_S: Final = 0.3
"""Longer than any command here takes to refuse; one that goes on has taken its arguments."""

UGLY: Final = re.compile(
    r"Traceback|Errno|codec can't|invalid \w+ value|object at 0x|NoneType|PosixPath|"
    r"from (\d+) to \1\b|expected (expected|for example|unknown|no )"
)
"""What no sentence for an operator has in it."""

GOOD: Final = dict(
    pair.split(" ", 1)
    for pair in """\
genesis genesis.cbor
trust trust.json
since checkpoint.cbor
checkpoint checkpoint.cbor
path ledger
ledger ledger
first ledger
second ledger
check ledger
proof proof.cbor
evidence proof.cbor
file proof.cbor
certificate proof.cbor
name registrar
party ola
owner ola
broker b1
meter home
device roof
statements roof.man
source solar
capacity_w 4000
area home
price 90000
line solar=40
commissioned_s 2020-01-01T00:00:00Z
from_s 2030-01-01T00:00:00Z
to_s 2030-02-01T00:00:00Z
at_s 2031-01-01T00:00:00Z
day 2026-01-31
month 2026-01
leaf 0
operation 1/0
batch 00
node http://127.0.0.1:1
host localhost
tcp 127.0.0.1:0
meters eastron-sdm630
words sdm630
home node-home""".splitlines()
)
"""A right value by the name of the argument; keys, outputs and what is not here are made below."""

LONG: Final = "n" * 5_000
TEXTS: Final = (
    "",
    "-1",
    "²",
    "9" * 30,
    "0001-01-01T00:00:00+14:00",
    "1960-01-01",
    "9999-12",
    "9999-12-31",
    "a b\x1b[31m\n",
    "=",
    "[",
    LONG,
)
PATHS: Final = ("missing", "", LONG, "genesis.cbor/below", "/dev/zero", "missing/below")


def _put(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _another_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE meta (name TEXT, value BLOB)")


PERIOD: Final = ("month", "day", "from_s", "to_s")
"""Of these a command wants one or two, which its parser does not know."""

NAMED_BY_CONFIG: Final = {
    "energy-broker": ("genesis.cbor", "b1.pem", "data/broker.db", "ledger/ledger.sqlite3"),
    "meter-agent": ("home.pem",),
}

CONTENTS: Final[dict[str, Callable[[Path], object]]] = {
    "nothing": _put(b""),
    "random bytes": _put(bytes((number * 197) % 256 for number in range(3_000))),
    "other text": _put(b"hello\n"),
    "other JSON": _put(b'{"a": [1, {"b": null}]}'),
    "deep JSON": _put(b"[" * 60_000),
    "other CBOR": _put(cbor2.dumps({0: 3, 1: [b"x", {}]})),
    "other TOML": _put(b"[broker]\nname = 1\n"),
    "a database": _another_database,
    "a directory": Path.mkdir,
}


def leaves(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from leaves(child, (*words, name))
            return
    yield " ".join(words), parser


PROGRAMS: Final[dict[str, ModuleType]] = {"energy-broker": broker_cli, "meter-agent": agent_cli}
PARSERS: Final = {program: module._parser() for program, module in PROGRAMS.items()}
COMMANDS: Final = dict(leaf for program, parser in PARSERS.items() for leaf in leaves(parser, (program,)))


class StillServing(BaseException):
    """Raised into a command that has taken what it was given and serves."""


def serve(*_arguments: object) -> None:
    raise StillServing


@contextmanager
def limited() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, serve)
    signal.setitimer(signal.ITIMER_REAL, SERVES_AFTER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(words: list[str]) -> int | None:
    """The exit code; None for a command that would have gone on."""
    try:
        with limited():
            return int(PROGRAMS[words[0]].main(words[1:]))
    except SystemExit as ended:
        return int(ended.code or 0)
    except StillServing:
        return None


def made(*words: str) -> str:
    out = StringIO()
    with redirect_stdout(out):
        assert run(["energy-broker", *words]) == 0, words
    return out.getvalue()


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command takes from its process, or starts beside it, is not this one's."""
    monkeypatch.setattr("logging.basicConfig", lambda **_options: None)
    # One parser for all runs, since making it takes longer than most of them.
    for program, module in PROGRAMS.items():
        monkeypatch.setattr(module, "_parser", lambda parser=PARSERS[program]: parser)
    # A network's program ends at once here, and nobody waits for its nodes.
    monkeypatch.setattr("broker.ledger.cometbft.binary.find_cometbft", lambda _named=None: Path("/bin/false"))
    monkeypatch.setattr("broker.ledger.cometbft.testnet.run_testnet", serve)
    with Path("/dev/null").open() as no_input:
        monkeypatch.setattr("sys.stdin", no_input)
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a right file for every argument; paths in it are relative."""
    folder = tmp_path_factory.mktemp("right")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("registrar", "node", "b1"):
            save_private_key(Path(f"{name}.pem"), key(name))
        home_key = made("key", "new", "home.pem").strip()
        Path("home.key").write_text(home_key)
        found(Path("ledger")).close()
        Path("genesis.cbor").write_bytes(GENESIS.to_bytes())
        Path("trust.json").write_text(made("ledger", "trust", "--path", "ledger"))
        Path("broker.toml").write_text(
            '[broker]\nname = "b1"\nkey_file = "b1.pem"\ndata_dir = "data"\n'
            '[ledger]\ngenesis_file = "genesis.cbor"\n'
            '[ledger.host]\npath = "ledger"\nvalidator = "node"\nkey_file = "node.pem"\n'
            '[mqtt]\nhost = "127.0.0.1"\nport = 1\n'
        )
        made("consumer", "add", "--config", "broker.toml", "--meter", "home", "--key", home_key)
        made(
            *("provider", "mandate", "--genesis", "genesis.cbor", "--name", "registrar", "--key", "registrar.pem"),
            *("--device", "roof", "--broker", "b1", "--from", "2021-01-01T00:00:00Z", "--out", "roof.man"),
        )
        made("ledger", "checkpoint", "ledger", "--out", "checkpoint.cbor")
        made("ledger", "prove", "ledger", "--leaf", "0", "--out", "proof.cbor")
        Path("agent.toml").write_text(
            '[agent]\ndata_dir = "agent-data"\nledger = "a-ledger"\n'
            f'broker = {{ name = "b1", key = "{key("b1").public.cose_key.hex()}" }}\n'
            '[mqtt]\nhost = "127.0.0.1"\nport = 1\n'
            '[meters.home]\ndirection = "consumption"\nkey_file = "home.pem"\ncapacity_w = 5000\n'
            'reader = { protocol = "p1", port = "/dev/missing" }\n'
        )
    return folder


def good(program: str, action: argparse.Action, key: str) -> str:
    """A right value of an argument, as far as its name tells."""
    if action.choices:
        return str(next(iter(action.choices)))
    match action.dest:
        case "config":
            return "agent.toml" if program == "meter-agent" else "broker.toml"
        case "key" if action.type is Path:
            return "registrar.pem"
        case "key" | "party_key" | "meter_key":
            return key
        case "registrar" | "validator" | "conductor":
            return f"{action.dest}={key}"
        case "out" | "path" if action.help is not None and ("new" in action.help or action.dest == "out"):
            return f"new-{action.dest}"
    return GOOD.get(action.dest, "1")


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What takes a value and is not one of a closed list, which argparse itself explains."""
    return [
        action
        for action in parser._actions
        if action.nargs != 0 and not isinstance(action, argparse._HelpAction) and not action.choices
    ]


def line(command: str, spoilt: argparse.Action, value: str, key: str) -> list[str]:
    """The command with all that it needs, and with `value` for the spoilt argument."""
    words, places = command.split(), []
    groups = [group for group in COMMANDS[command]._mutually_exclusive_groups if group.required]
    needed = {group._group_actions[0].dest for group in groups if spoilt not in group._group_actions}
    if spoilt.dest not in PERIOD:
        needed.add("month")
    for action in COMMANDS[command]._actions:
        text = value if action is spoilt else good(words[0], action, key)
        if not action.option_strings:
            places.append(text)
        elif action is spoilt or action.required or action.dest in needed:
            words += [action.option_strings[0] + ("" if action.nargs == 0 else f"={text}")]
    return [*words, "--", *places] if places else words


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("command", COMMANDS)
def test_what_does_not_belong_there_is_refused_with_a_sentence(
    command: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home_key = (template / "home.key").read_text()
    numbers = count()
    wrong: list[str] = []

    def check(case: str, words: list[str]) -> None:
        code = run(words)
        said = capsys.readouterr().err
        if code is not None and (code not in (0, 1, 2) or (code and not said.strip()) or UGLY.search(said)):
            wrong.append(f"{case}: exit code {code}: {said[-300:]}")

    def fresh() -> None:
        folder = tmp_path / str(next(numbers))
        shutil.copytree(template, folder)
        monkeypatch.chdir(folder)

    fresh()
    for action in arguments(COMMANDS[command]):
        for value in PATHS if action.type is Path else TEXTS:
            check(f"{action.dest} {value[:30]!r}", line(command, action, value, home_key))
        if action.type is not Path:
            continue
        right = Path(good(command.split()[0], action, home_key))
        for name, spoil in CONTENTS.items():
            shutil.rmtree("spoilt", ignore_errors=True)
            Path("spoilt").unlink(missing_ok=True)
            spoil(Path("spoilt"))
            check(f"{action.dest} is {name}", line(command, action, "spoilt", home_key))
        inside = sorted(path.relative_to(template) for path in (template / right).rglob("*") if path.is_file())
        named = NAMED_BY_CONFIG[command.split()[0]] if action.dest == "config" else ()
        for file in [*inside, *map(Path, named)]:
            for name in ("nothing", "random bytes", "a database", "a directory"):
                fresh()
                file.unlink()
                CONTENTS[name](file)
                check(f"{file.name} is {name}", line(command, action, str(right), home_key))
    assert wrong == []
