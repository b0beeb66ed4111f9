"""The command `meter-agent`: help, version, exit codes, and errors that name what to change."""

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from broker.protocol.envelope import seal
from broker.protocol.keys import generate_private_key, save_private_key
from broker.protocol.messages import DeliveredLine, Delivery, DeliveryState, Quality
from broker.protocol.sources import Source
from meter_agent import cli
from meter_agent.clock import SystemClock
from meter_agent.intervals import Anchor, Boundary, MeterState, SealedInterval
from meter_agent.journal import Journal, OutboxRow
from meter_agent.outbox import OutboxState
from meter_agent.profiles import load_profile, profile_names
from meter_agent.readings import ReadFailure, Sample

BROKER = generate_private_key()
PAGE = Path(__file__).parents[3] / "docs" / "agent.md"


class Shown:
    """A meter that shows what the test says."""

    def __init__(self, result: Sample | ReadFailure) -> None:
        self.result = result
        self.closed = False

    def sample(self) -> Sample:
        if isinstance(self.result, ReadFailure):
            raise self.result
        return self.result

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config that is right, with two meters behind an address where nobody answers."""
    for name in ("house", "roof"):
        save_private_key(tmp_path / f"{name}.pem", generate_private_key())
    meters = "".join(
        f"""
[meters.{name}]
direction = "{direction}"
key_file = "{name}.pem"
capacity_w = 5000
reader = {{ protocol = "modbus_tcp", profile = "eastron-sdm630", host = "127.0.0.1", port = 1, timeout_s = 0.2 }}
"""
        for name, direction in (("house", "consumption"), ("roof", "generation"))
    )
    file = tmp_path / "agent.toml"
    file.write_text(
        f"""
[agent]
data_dir = "data"
ledger = "demo"
broker = {{ name = "east", key = "{BROKER.public.cose_key.hex()}" }}

[mqtt]
host = "127.0.0.1"
port = 1
{meters}"""
    )
    return file


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def _commands() -> dict[str, argparse.ArgumentParser]:
    """Every command with its parser."""
    (adder,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(adder.choices)


@pytest.mark.parametrize("command", ["", *_commands()])
def test_help_explains_every_command_and_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert "exit codes: 0 it worked" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", _commands())
def test_every_command_and_option_is_documented(command: str) -> None:
    page, parser = PAGE.read_text(), _commands()[command]
    assert f"`meter-agent {command}" in page
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []
    options = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert {option for option in options if f"{option}`" not in page and f"{option} " not in page} == set()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("meter-agent 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run"],
        ["status", "--config", "x", "--last", "0"],
        ["read", "--config", "x", "--every", "nan"],
        ["scan", "--host", "h", "--ids", "0-248"],
        ["scan", "--host", "h", "--ids", "9-1"],
        ["scan", "--host", "h", "--ids", ""],
        ["simulate", "--tcp", "1502"],
        ["simulate", "abb-b23", "--tcp", "65536"],
        ["simulate", "abb-b23", "--tcp", "0", "--import-wh", "-1"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_check_config_says_that_all_is_fine(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--config", str(config_file)]) == 0
    assert "fine; 2 meter(s): house, roof" in capsys.readouterr().out


WRONG = {
    "no target": (["scan"], "--port"),
    "TCP port": (["scan", "--host", "h", "--port", "/dev/ttyUSB0"], "with --host: expected a whole number from 1 to"),
    "serial options": (["scan", "--host", "h", "--baud", "9600"], "for a serial port"),
    "unknown profile": (["scan", "--host", "h", "--profile", "sdm"], "no meter profile 'sdm'"),
    "show what": (["profiles", "show"], "one name"),
    "show unknown": (["profiles", "show", "sdm"], "no meter profile 'sdm'"),
    "no wire": (["simulate", "abb-b23"], "--tcp or --pty"),
    "simulate unknown": (["simulate", "sdm", "--tcp", "0"], "no meter profile 'sdm'"),
    "simulate id twice": (["simulate", "abb-b23:1", "abb-b23:1", "--tcp", "0"], "each once"),
    "simulate id": (["simulate", "abb-b23:248", "--tcp", "0"], "1 to 247"),
    "simulate serial": (["simulate", "abb-b23", "--tcp", "0", "--serial", "A1"], "serial number"),
    "simulate power": (["simulate", "abb-b23", "--tcp", "0", "--power-w", "99999999"], "does not fit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_do_not_fit_are_exit_code_2_and_a_sentence(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, sentence = WRONG[case]
    assert cli.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_check_config_says_the_same_in_json(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--json", "--config", str(config_file)]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "file": str(config_file), "meters": ["house", "roof"]}
    _replace(config_file, "capacity_w", "capcity_w")
    assert cli.main(["check-config", "--json", "--config", str(config_file)]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["file"], said["key"]) == (False, str(config_file), "meters.house.capcity_w")


@pytest.mark.parametrize("command", ["check-config", "read"])
def test_an_unconfirmed_profile_is_warned_of_by_meter(
    command: str, config_file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _replace(config_file, "eastron-sdm630", "acrel-adw300")
    assert cli.main([command, "--config", str(config_file)]) == (0 if command == "check-config" else 1)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("house: the profile acrel-adw300 is unconfirmed; compare")


def test_profiles_lists_what_is_unconfirmed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profiles", "acrel"]) == 0
    assert "ADW300 (unconfirmed: compare with the display)" in capsys.readouterr().out
    assert cli.main(["profiles", "--json", "unconfirmed"]) == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["acrel-adw300"]
    assert cli.main(["profiles", "show", "acrel-adw300"]) == 0
    assert "  unconfirmed: compare with the display\n" in capsys.readouterr().out
    assert cli.main(["profiles", "eastron", "--json"]) == 0
    assert all(json.loads(line)["confirmed"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("capacity_w", "capcity_w", ["meters.house.capcity_w", "`capacity_w` perhaps"]),
        ("eastron-sdm630", "eastron-sdm63", ["meters.house", "eastron-sdm63"]),
        ("house.pem", "missing.pem", ["missing.pem", "No such file"]),
        ("port = 1\n\n", 'port = 1\nca_file = "no.pem"\n\n', ["mqtt.ca_file", "no.pem"]),
    ],
)
@pytest.mark.parametrize("command", ["check-config", "run"])
def test_mistakes_are_exit_code_2_and_name_what_to_change(
    command: str, old: str, new: str, told: list[str], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _replace(config_file, old, new)
    assert cli.main([command, "--config", str(config_file)]) == 2
    error = capsys.readouterr().err
    for words in told:
        assert words in error


def test_a_ca_file_that_is_no_certificate_is_exit_code_2(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config_file.parent / "ca.pem").write_text("not a certificate")
    _replace(config_file, "port = 1\n\n", 'port = 1\nca_file = "ca.pem"\n\n')
    assert cli.main(["run", "--config", str(config_file)]) == 2
    assert "check ca_file" in capsys.readouterr().err


def test_read_prints_each_meter_and_fails_if_one_does_not_answer(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = {
        "house": Shown(Sample(1.0, 1_700_000_000.4, 12_345_678, None, -250, "A1")),
        "roof": Shown(ReadFailure("roof", "the serial port /dev/ttyUSB9 is missing")),
    }
    monkeypatch.setattr("meter_agent.readers.create_readers", lambda _meters, _clock: readers)
    assert cli.main(["read", "--config", str(config_file)]) == 1
    out, error = capsys.readouterr()
    assert out == "house: import 12.345678 kWh power -250 W serial number A1\n"
    assert error == "meter-agent: roof: the serial port /dev/ttyUSB9 is missing\n"
    assert all(reader.closed for reader in readers.values())

    assert cli.main(["read", "--config", str(config_file), "--meter", "house", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "meter": "house",
        "time_s": 1_700_000_000,
        "import_mwh": 12_345_678,
        "export_mwh": None,
        "power_w": -250,
        "serial_number": "A1",
    }


def test_watch_goes_on_after_a_failure_until_ctrl_c(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = Shown(Sample(1.0, 1_700_000_000.4, 12_345_678, None, -250, None))
    rounds = iter((ReadFailure("house", "unplugged"), house.result))

    def pause(_seconds: float) -> None:
        try:
            house.result = next(rounds)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("meter_agent.readers.create_readers", lambda _meters, _clock: {"house": house})
    monkeypatch.setattr("time.sleep", pause)
    assert cli.main(["read", "--watch", "--config", str(config_file), "--meter", "house"]) == 0
    out, error = capsys.readouterr()
    assert out == 2 * "2023-11-14T22:13:20Z house: import 12.345678 kWh power -250 W\n"
    assert error == "meter-agent: house: unplugged\n"
    assert house.closed


def test_profiles_are_listed_searched_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profiles", "--json"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {entry["name"] for entry in listed} >= {*profile_names(), "p1"}
    assert cli.main(["profiles", "SCHNEIDER", "iem3155"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "schneider-iem3000"]
    assert cli.main(["profiles", "no-such-meter"]) == 1
    assert "try fewer words" in capsys.readouterr().err


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profiles", "show", name]) == 0
    shown = capsys.readouterr().out
    profile = load_profile(name)
    for text in (name, profile.maker, *profile.models, *(caveat.text for caveat in profile.caveats)):
        assert text in shown
    assert cli.main(["profiles", "show", name, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["name"], len(whole["references"])) == (name, len(profile.references))


def test_a_meter_that_is_not_in_the_config_is_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["read", "--config", str(config_file), "--meter", "cellar"]) == 2
    assert "meters.cellar: expected one of house, roof" in capsys.readouterr().err


def test_status_shows_intervals_deliveries_and_events(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["status", "--config", str(config_file)]) == 1
    assert "has the agent run" in capsys.readouterr().err

    journal = Journal(config_file.parent / "data", 10)
    state = MeterState(Anchor(1_000_000, None, 1, 1, None), Boundary(1800, 7, Quality.MEASURED, 1800, 1800), 1800)
    journal.seal("house", state, [OutboxRow(SealedInterval(0, 1800, 7, Quality.MEASURED, None), 0, bytes(32), b"m")])
    delivery = Delivery("house", 0, 1800, 0, 7, 2, DeliveryState.FINAL, (DeliveredLine(0, Source.WIND, 5),))
    journal.note_delivery("house", 0, 0, seal(delivery, BROKER, "demo", "east"))
    journal.note_event(5, "house", "fault", "text")
    journal.close()
    now_s = 1_700_000_000
    monkeypatch.setattr("time.time", lambda: now_s)
    assert cli.main(["status", "--config", str(config_file), "--meter", "house"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "agent house: not running; this is what its journal says",
        f"clock system: {'' if SystemClock(True).trusted() else 'not '}synchronised",
        f"house reading 1970-01-01T00:00:01Z, {now_s - 1} s ago: import 0.000001 kWh",
        "house outbox 1 waiting for a receipt, the oldest from 1970-01-01T00:00:00Z",
        "house interval 1970-01-01T00:00:00Z 7 Wh measured waiting",
        "house delivery 1970-01-01T00:00:00Z final: wind 5 Wh; unmatched 2 Wh",
        "house event 1970-01-01T00:00:05Z fault: text",
    ]
    assert cli.main(["status", "--config", str(config_file), "--meter", "house", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["agent"], status["running"], status["broker"]["connected"]) == ("house", False, False)
    (meter,) = status["meters"]
    assert meter["reading"]["import_mwh"] == 1
    assert (meter["waiting"], meter["oldest_waiting_s"]) == (1, 0)
    assert meter["intervals"] == [
        {"start_s": 0, "end_s": 1800, "energy_wh": 7, "quality": "measured", "state": "waiting"}
    ]
    assert meter["deliveries"][0]["lines"] == [{"source": "wind", "energy_wh": 5}]
    assert status["events"] == [{"time_s": 5, "meter": "house", "kind": "fault", "detail": "text"}]


def test_a_running_agent_loads_nothing_that_it_was_not_asked_for() -> None:
    code = "import sys, meter_agent.cli, meter_agent.service; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    of_installer = {name for name in loaded if name.startswith("meter_agent.installer.")}
    assert of_installer == {"meter_agent.installer.commands"}
    assert not loaded & {"meter_agent.home_link", "meter_agent.home_messages", "pymodbus", "dengen_testing"}


def _start(config_file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "meter_agent.cli", "run", "--config", str(config_file)],
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"ended without saying {words!r}")


def test_run_without_meter_and_server_keeps_trying_and_ends_cleanly_on_sigterm(config_file: Path) -> None:
    with _start(config_file) as process:
        _wait_for_line(process, "read-failure")
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 0
    with sqlite3.connect(config_file.parent / "data" / "journal.sqlite") as database:
        kinds = {kind for (kind,) in database.execute("SELECT kind FROM event")}
    database.close()
    assert kinds == {"read-failure"}


def test_send_again_has_accepted_intervals_wait_once_more(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(config_file.parent / "data", 10)
    assert cli.main(["send-again", "--config", str(config_file), "--from", "1970-01-01T00:30:00Z"]) == 1
    assert "stop the agent for this" in capsys.readouterr().err
    for number in range(4):
        state = MeterState(Anchor(1_000_000, None, 1, 1, None), None, 1800)
        interval = SealedInterval(1_800 * number, 1_800 * number + 1_800, 7, Quality.MEASURED, None)
        journal.seal("house", state, [OutboxRow(interval, 0, bytes((number,)) * 32, b"sealed %d" % number)])
        # What was refused is tried again by itself; that it was refused must not be forgotten here.
        answer = OutboxState.REFUSED if number == 3 else OutboxState.ACCEPTED
        journal.note_answer("house", 1_800 * number, 0, answer, b"receipt")
    journal.close()
    assert cli.main(["send-again", "--config", str(config_file), "--from", "1970-01-01T00:30:00Z"]) == 0
    assert capsys.readouterr().out == "2 intervals wait to be sent again when the agent runs\n"
    journal = Journal(config_file.parent / "data", 10)
    assert [message.message for message in journal.waiting(["house"], 9)] == [b"sealed 1", b"sealed 2"]
    journal.close()


def test_run_on_a_journal_that_another_agent_holds_is_exit_code_1(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(config_file.parent / "data", 10)
    assert cli.main(["run", "--config", str(config_file)]) == 1
    assert "another agent runs with this data_dir" in capsys.readouterr().err
    journal.close()
