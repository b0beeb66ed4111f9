"""A consumer's agent asks its broker for a certificate over MQTT, and checks what comes without the broker."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dengen_testing.listener import Listener
from dengen_testing.market import CommandFailed, energy_broker
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ProcessGroup
from support.broker_desk import INTERVAL_S, T0, BrokerDesk
from support.schema import validate_traffic

from broker.protocol.messages import ReceiptStatus
from broker.service.ledger_copy import COPY_NAME

pytestmark = pytest.mark.integration


@pytest.fixture
def desk(
    tmp_path: Path, mosquitto: Mosquitto, processes: ProcessGroup, start_listener: Callable[..., Listener]
) -> BrokerDesk:
    listener = start_listener(mosquitto.mqtt_config(), ["dengen/v1/#"])
    made = BrokerDesk(tmp_path / "market", mosquitto, listener, processes)
    for meter in ("anna", "ben"):
        # There is no meter to read here, but an agent's config says where it is.
        with made.workspace.config(meter).open("a") as config:
            config.write(f'[meters.{meter}.reader]\nprotocol = "p1"\nport = "/dev/null"\n')
    return made


def ask(desk: BrokerDesk, meter: str, from_s: int, to_s: int, out: Path) -> subprocess.CompletedProcess[str]:
    """`meter-agent certificate`, as a process of its own."""
    begin, end = (datetime.fromtimestamp(time_s, UTC).isoformat() for time_s in (from_s, to_s))
    command = [sys.executable, "-m", "meter_agent.cli", "certificate", "--config", str(desk.workspace.config(meter))]
    command += ["--meter", meter, "--from", begin, "--to", end, "--out", str(out), "--timeout", "90"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_consumers_agent_gets_a_certificate_that_verifies_offline(desk: BrokerDesk, tmp_path: Path) -> None:
    desk.tick(T0 + INTERVAL_S + 10)
    for meter, energy_wh in (("roof", 900), ("mill", 400), ("anna", 500), ("dam", 100), ("ben", 300)):
        desk.report(meter, energy_wh)
    out = tmp_path / "anna.cbor"
    early = ask(desk, "anna", T0, T0 + INTERVAL_S, out)
    assert early.returncode == 1
    assert "east issues no certificate" in early.stderr
    assert not out.exists()
    for after_s in (700, 1_300):
        desk.tick(T0 + INTERVAL_S + after_s)
    asked = ask(desk, "anna", T0, T0 + INTERVAL_S, out)
    assert asked.returncode == 0, asked.stderr
    trust = tmp_path / "trust.json"
    trust.write_text(energy_broker("ledger", "trust", "--genesis", desk.workspace.genesis))
    proven = json.loads(energy_broker("certificate", "verify", out, "--trust", trust, "--json"))
    assert (proven["meter"], proven["broker"], proven["demanded_wh"]) == ("anna", "east", 500)
    assert proven["by_source_wh"] == {"solar": 300, "wind": 200}
    # The other broker reaches the ledger over MQTT only: it makes a copy of its own, which verifies like the host's.
    remote = tmp_path / "ben.cbor"
    asked = ask(desk, "ben", T0, T0 + INTERVAL_S, remote)
    assert asked.returncode == 0, asked.stderr
    copy = desk.workspace.config("west").with_name("west-data") / COPY_NAME
    proven = json.loads(
        energy_broker("certificate", "verify", remote, "--trust", trust, "--ledger", desk.workspace.ledger, "--json")
    )
    assert (proven["meter"], proven["broker"], proven["demanded_wh"]) == ("ben", "west", 300)
    assert proven["ledger_now"]["faults"] == []
    energy_broker("ledger", "compare", copy, desk.workspace.ledger, "--allow-prefix")
    energy_broker("ledger", "verify", copy)
    validate_traffic((message.topic, message.payload) for message in desk.listener.messages)


def test_a_correction_overtakes_a_certificate_and_the_one_that_is_issued_anew_is_right(
    desk: BrokerDesk, tmp_path: Path
) -> None:
    """Anna had 300 Wh of the roof's 900. After the gates it turns out that it made 100, and that she used 450."""
    desk.tick(T0 + INTERVAL_S + 10)
    for meter, energy_wh in (("roof", 900), ("mill", 400), ("anna", 500), ("dam", 100), ("ben", 300)):
        desk.report(meter, energy_wh)
    for after_s in (700, 1_300):
        desk.tick(T0 + INTERVAL_S + after_s)
    before, after = tmp_path / "before.cbor", tmp_path / "after.cbor"
    assert ask(desk, "anna", T0, T0 + INTERVAL_S, before).returncode == 0
    for meter, energy_wh in (("roof", 100), ("anna", 450)):
        corrected = desk.signed(desk.value(meter, energy_wh, revision=1))
        assert desk.receipt(desk.send(corrected, meter)).status is ReceiptStatus.ACCEPTED
    desk.tick(T0 + 2 * INTERVAL_S + 10)
    for meter in ("roof", "mill", "anna", "dam", "ben"):
        desk.report(meter, 100, 1)
    for after_s in (700, 1_300):
        desk.tick(T0 + 2 * INTERVAL_S + after_s)
    asked = ask(desk, "anna", T0, T0 + INTERVAL_S, after)
    assert asked.returncode == 0, asked.stderr
    trust = tmp_path / "trust.json"
    trust.write_text(energy_broker("ledger", "trust", "--genesis", desk.workspace.genesis))
    verify = ("--trust", trust, "--ledger", desk.workspace.ledger, "--json")
    now = json.loads(energy_broker("certificate", "verify", after, *verify))
    assert (now["demanded_wh"], now["by_source_wh"]["solar"], now["is_provisional"]) == (450, 100, True)
    assert now["ledger_now"]["faults"] == []
    # What was given out before is true at its height, and overtaken by what the ledger has now.
    energy_broker("certificate", "verify", before, "--trust", trust)
    with pytest.raises(CommandFailed, match=r"the demand was corrected since height .* from 500 to 450 Wh") as caught:
        energy_broker("certificate", "verify", before, *verify)
    assert "of 300 Wh that roof made at 2026-02-01T00:00:00Z the ledger has 100" in str(caught.value)
    span = ("--from", "2026-02-01T00:00:00Z", "--to", "2026-02-01T00:30:00Z", "--json")
    statement = ("statement", "--config", desk.workspace.config("east"), *span, "--check", desk.workspace.ledger)
    (account,) = json.loads(energy_broker(*statement, "--consumer", "anna"))["accounts"]
    assert account["energy_wh"] == now["delivered_wh"]
    (account,) = json.loads(energy_broker(*statement, "--provider", "ola"))["accounts"]
    roof = {line["kind"]: line["energy_wh"] for line in account["lines"] if line["device"] == "roof"}
    assert roof == {"traded": 900, "taken back": -800}
    energy_broker(*statement, "--own")
