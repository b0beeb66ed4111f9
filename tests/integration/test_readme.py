"""Every command in the README works as written: its shell blocks run in order, with a real MQTT server and meter.

Everywhere else that a person reads of commands they and their options at least exist.

Only what a reader has to fill in is filled in here: the MQTT server's port, and the gateway's own meter. `make` targets
are looked up (`make demo` and the others have tests of their own), and `run` commands go to the background, as two
terminals would have them.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.wire.street import Street

from broker import cli as broker_cli
from meter_agent import cli as agent_cli

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = (ROOT / "README.md").read_text()
EXAMPLES: Final = ROOT / "firmware_config" / "examples"
LIMIT_S: Final = 240

PARSERS: Final = {"energy-broker": broker_cli._parser(), "meter-agent": agent_cli._parser()}
PAGES: Final = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", *(ROOT / "docs").iterdir(), *(ROOT / "deploy").rglob("*"), *EXAMPLES.iterdir())
    if path.is_file() and path.suffix in ("", ".md", ".service", ".toml", ".conf")
)


def all_options(parser: argparse.ArgumentParser) -> set[str]:
    """Those of a parser and of all commands below it."""
    options = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options |= {option for child in action.choices.values() for option in all_options(child)}
    return options


ALL_OPTIONS: Final = {option for parser in PARSERS.values() for option in all_options(parser)}

# Each background command has to say that it reached the MQTT server or runs, and ends when the test does.
BACKGROUND: Final = """
: > {log}
{command} >> {log} 2>&1 &
echo $! >> "$PIDS"
timeout 60 grep -q -m1 -E 'connected|running' <(tail -n +1 -f --pid=$! {log}) || {{ cat {log} >&2; exit 1; }}
"""

STREET: Final = {
    "participant": "street",
    "interval_s": 1800,
    "origin_s": 1_309_442_400,
    "folder": "wire",
    "meters": [{"name": "house", "wire": "modbus_tcp", "kind": "iem3000", "device_id": 1, "import_wh": [196, 289]}],
}

AGENT: Final = """
[agent]
data_dir = "data"
ledger = "example"
interval_s = 1800
require_synchronised_clock = false

[agent.broker]
name = "east"
key = "'$BROKER'"

[mqtt]
host = "127.0.0.1"
port = {mqtt_port}

[meters.house]
direction = "consumption"
key_file = "house.pem"
capacity_w = 14000

[meters.house.reader]
protocol = "modbus_tcp"
profile = "schneider-iem3000"
host = "127.0.0.1"
port = {meter_port}
device_id = 1
"""


def shell_lines() -> list[str]:
    """The lines of all shell blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def command_of(words: list[str], parser: argparse.ArgumentParser) -> argparse.ArgumentParser | None:
    """The parser that these words lead to, as far as they name commands; None for a command that there is not."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups or not words or words[0].startswith("-"):
        return parser
    return command_of(words[1:], groups[0].choices[words[0]]) if words[0] in groups[0].choices else None


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_and_option_that_a_page_names_exists(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", (ROOT / page).read_text())
    for program, rest in re.findall(r"\b(energy-broker|meter-agent) ((?!COMMAND)[^`\n|;&#]*)", text):
        command = command_of(rest.split(), PARSERS[program])
        assert command is not None, f"{program} {rest}"
        known = {option for action in command._actions for option in action.option_strings}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest)) <= known, f"{program} {rest}"
    if page.suffix == ".md":
        alone = set(re.findall(r"`(--[a-z][a-z0-9-]*)[ `]", text))
        assert alone <= ALL_OPTIONS, alone - ALL_OPTIONS


@pytest.mark.integration
@pytest.mark.usefixtures("cometbft")
def test_every_command_of_the_readme_works_as_written(
    tmp_path: Path, mosquitto: Mosquitto, start_street: Callable[[dict[str, Any]], Street]
) -> None:
    meter_port = start_street(STREET).addresses()["house"]["port"]
    script = ["set -eu", f"export PATH={Path(sys.executable).parent}:$PATH"]
    for line in shell_lines():
        if line.startswith(("make ", ". .venv/")):
            continue
        if line.startswith("meter-agent check-config"):
            text = AGENT.format(mqtt_port=mosquitto.port, meter_port=meter_port)
            script.append(f"printf '%s' '{text}' > agent.toml")
        if re.match(r"(energy-broker|meter-agent) run |energy-broker ledger testnet ", line):
            script.append(BACKGROUND.format(command=line, log=f"{line.split()[0]}.log"))
        else:
            script.append(line)
        if line == "cd my-broker":
            script.append(
                f"sed -i 's/^host = .*/host = \"127.0.0.1\"/; s/^port = .*/port = {mosquitto.port}/' broker.toml"
            )
    (tmp_path / "firmware_config").symlink_to(ROOT / "firmware_config")
    pids = tmp_path / "pids"
    pids.touch()
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=tmp_path,
            env={**os.environ, "PIDS": str(pids)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    finally:
        for pid in pids.read_text().split():
            subprocess.run(["kill", pid], check=False, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all of it holds" in done.stdout
    assert "house: solar 40 %, wind 30 %, any 30 %" in done.stdout
