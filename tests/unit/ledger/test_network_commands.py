"""`energy-broker ledger node` and `ledger testnet`, up to the point where processes begin."""

import json
from pathlib import Path

import pytest
from support import ledger_world as world

from broker import cli
from broker.config import load_broker_config, load_genesis
from broker.ledger.cometbft import binary
from broker.ledger.cometbft.home import load_node_config, read_node_id
from broker.protocol.keys import Algorithm, generate_private_key, save_private_key
from firmware_config.loader import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "cometbft"
    program.write_text("#!/bin/sh\necho 0.38.25\n")
    program.chmod(0o755)
    monkeypatch.setattr(binary, "_built", lambda: program)
    return tmp_path


def founded(folder: Path) -> list[str]:
    """A genesis with the validator `node`; the arguments that make its node."""
    save_private_key(folder / "node.pem", world.key("node"))
    (folder / "genesis.cbor").write_bytes(world.GENESIS.to_bytes())
    return [
        *("ledger", "node", "init", "--home", str(folder / "home"), "--genesis", str(folder / "genesis.cbor")),
        *("--name", "node", "--key", str(folder / "node.pem"), "--host", "east.example"),
    ]


def test_a_node_is_made_and_says_how_its_peers_reach_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = "b" * 40 + "@west.example:26656"
    assert cli.main([*founded(folder), "--peer", peer, "--listen", "0.0.0.0:7000"]) == 0
    assert capsys.readouterr().out == f"{read_node_id(folder / 'home')}@east.example:7000\n"
    config = load_node_config(folder / "home")
    assert config.p2p.peers == (peer,)
    assert config.validator == "node"


def test_a_node_is_not_made_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = founded(folder)
    assert cli.main(arguments) == 0
    before = read_node_id(folder / "home")
    assert cli.main(arguments) == 2
    assert "edit it" in capsys.readouterr().err
    assert read_node_id(folder / "home") == before


def test_only_a_validator_of_the_genesis_gets_a_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = founded(folder)
    save_private_key(folder / "other.pem", generate_private_key())
    arguments[arguments.index(str(folder / "node.pem"))] = str(folder / "other.pem")
    assert cli.main(arguments) == 2
    assert "a validator of ledger" in capsys.readouterr().err


def test_a_testnet_is_set_up_once_and_each_node_knows_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ledger", "testnet", "--path", str(folder / "net"), "--validators", "4", "--set-up-only"]
    assert cli.main(arguments) == 0
    listing = json.loads((folder / "net" / "testnet.json").read_text())
    assert [node["name"] for node in listing] == [f"validator-{number + 1}" for number in range(4)]
    assert len({node["rpc"] for node in listing} | {f"http://{node['p2p']}" for node in listing}) == 8
    genesis = load_genesis(folder / "net" / "genesis.cbor")
    assert len(genesis.validators) == 4
    ids = {read_node_id(folder / "net" / node["home"]) for node in listing}
    for node in listing:
        home = folder / "net" / node["home"]
        known = {peer.partition("@")[0] for peer in load_node_config(home).p2p.peers}
        assert known == ids - {read_node_id(home)}
    said = capsys.readouterr().out
    assert all(node["rpc"] in said for node in listing)
    assert cli.main(arguments) == 0
    assert json.loads((folder / "net" / "testnet.json").read_text()) == listing


def test_a_testnet_of_a_given_genesis_needs_the_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    founded(folder)
    arguments = ["ledger", "testnet", "--path", str(folder / "net"), "--genesis", str(folder / "genesis.cbor")]
    assert cli.main([*arguments, "--set-up-only"]) == 2
    assert "--keys" in capsys.readouterr().err
    assert cli.main([*arguments, "--keys", str(folder), "--set-up-only"]) == 0
    assert (folder / "net" / "node" / "node.toml").is_file()


def test_without_cometbft_the_reason_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(binary, "_built", lambda: None)
    monkeypatch.setattr(binary, "_on_path", lambda: None)
    assert cli.main(["ledger", "testnet", "--path", str(folder / "net")]) == 1
    assert "deploy/setup/cometbft" in capsys.readouterr().err
    assert cli.main(["ledger", "node", "run", "--home", str(folder)]) == 1


def test_a_p256_validator_cannot_have_a_node(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = founded(folder)
    key = generate_private_key(Algorithm.ESP256)
    save_private_key(folder / "p256.pem", key)
    genesis = world.genesis(validators=(world.NamedKey("node", key.public.cose_key),))
    (folder / "genesis.cbor").write_bytes(genesis.to_bytes())
    arguments[arguments.index(str(folder / "node.pem"))] = str(folder / "p256.pem")
    assert cli.main(arguments) == 2
    assert "Ed25519" in capsys.readouterr().err


BROKER = """
[broker]
name = "east"
key_file = "east.pem"
data_dir = "east"

[ledger]
genesis_file = "genesis.cbor"

[ledger.cometbft]
nodes = NODES
"""


@pytest.mark.parametrize("nodes", ["[]", '["127.0.0.1:26657"]', '["http://"]', '["unix:///a"]', '"http://a:1"'])
def test_a_broker_needs_urls_of_its_nodes(folder: Path, nodes: str) -> None:
    (folder / "broker.toml").write_text(BROKER.replace("NODES", nodes))
    with pytest.raises(ConfigError, match="nodes"):
        load_broker_config(folder / "broker.toml")


def test_a_broker_hosts_a_ledger_or_joins_a_network(folder: Path) -> None:
    joined = BROKER.replace("NODES", '["http://127.0.0.1:26657"]')
    (folder / "broker.toml").write_text(joined)
    config = load_broker_config(folder / "broker.toml")
    assert config.ledger.cometbft is not None
    assert config.ledger.cometbft.nodes == ("http://127.0.0.1:26657",)
    hosted = '[ledger.host]\npath = "ledger"\nvalidator = "node"\nkey_file = "node.pem"\n'
    (folder / "broker.toml").write_text(joined + hosted)
    with pytest.raises(ConfigError, match="not both"):
        load_broker_config(folder / "broker.toml")


def test_a_gateway_must_speak_for_a_validator(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    founded(folder)
    save_private_key(folder / "east.pem", generate_private_key())
    gateway = '[ledger.cometbft.gateway]\nvalidator = "node"\nkey_file = "KEY"\n'
    joined = BROKER.replace("NODES", '["http://127.0.0.1:26657"]')
    (folder / "broker.toml").write_text(joined + gateway.replace("KEY", "east.pem"))
    assert cli.main(["check-config", str(folder / "broker.toml")]) == 2
    assert "ledger.cometbft.gateway.validator" in capsys.readouterr().err
    (folder / "broker.toml").write_text(joined + gateway.replace("KEY", "node.pem"))
    assert cli.main(["check-config", str(folder / "broker.toml")]) == 0
