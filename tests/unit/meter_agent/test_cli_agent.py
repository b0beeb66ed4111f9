"""The command `meter-agent`: help, version, exit codes, and errors that name what to change."""

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
from meter_agent.intervals import Anchor, Boundary, MeterState, SealedInterval
from meter_agent.journal import Journal, OutboxRow
from meter_agent.readings import ReadFailure, Sample

BROKER = generate_private_key()


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


@pytest.mark.parametrize("command", [[], ["run"], ["read"], ["check-config"], ["status"]])
def test_help_explains_every_command_and_the_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    assert "exit codes: 0 it worked" in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("meter-agent 0.")


@pytest.mark.parametrize("arguments", [[], ["dance"], ["run"], ["status", "--config", "x", "--last", "0"]])
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2


def test_check_config_says_that_all_is_fine(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", "--config", str(config_file)]) == 0
    assert "fine; 2 meter(s): house, roof" in capsys.readouterr().out


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


def test_a_meter_that_is_not_in_the_config_is_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["read", "--config", str(config_file), "--meter", "cellar"]) == 2
    assert "meters.cellar: expected one of house, roof" in capsys.readouterr().err


def test_status_shows_intervals_deliveries_and_events(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--config", str(config_file)]) == 1
    assert "has the agent run" in capsys.readouterr().err

    journal = Journal(config_file.parent / "data", 10)
    state = MeterState(Anchor(1, None, 1, 1, None), Boundary(1800, 7, Quality.MEASURED, 1800, 1800), 1800)
    journal.seal("house", state, [OutboxRow(SealedInterval(0, 1800, 7, Quality.MEASURED, None), 0, bytes(32), b"m")])
    delivery = Delivery("house", 0, 1800, 0, 7, 2, DeliveryState.FINAL, (DeliveredLine(0, Source.WIND, 5),))
    journal.note_delivery("house", 0, 0, seal(delivery, BROKER, "demo", "east"))
    journal.note_event(5, "house", "fault", "text")
    journal.close()
    assert cli.main(["status", "--config", str(config_file), "--meter", "house"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "house interval 0 7 Wh measured waiting",
        "house delivery 0 final: wind 5 Wh; unmatched 2 Wh",
        "house event 5 fault: text",
    ]


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


def test_run_on_a_journal_that_another_agent_holds_is_exit_code_1(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(config_file.parent / "data", 10)
    assert cli.main(["run", "--config", str(config_file)]) == 1
    assert "another agent runs with this data_dir" in capsys.readouterr().err
    journal.close()
