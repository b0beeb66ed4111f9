"""A node's files: CometBFT's own formats, equal on every node where they must be, secret where they must be."""

import base64
import json
import tomllib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from support import ledger_world as world

from broker.ledger.cometbft.home import (
    ConsensusSection,
    NodeConfig,
    P2pSection,
    RpcSection,
    SnapshotSection,
    address_of,
    chain_id,
    config_toml,
    genesis_json,
    load_node_config,
    node_config_text,
    node_id,
    node_key_json,
    read_node_id,
    validator_key_json,
    write_home,
    write_node_key,
)
from broker.protocol import keys
from broker.protocol.keys import Algorithm, generate_private_key
from broker.protocol.messages import NamedKey
from firmware_config.loader import ConfigError, WrongValue

# What `cometbft init` of v0.38.25 wrote.
SECRET = "ZYjm/FAqYrgSN77fffPUC6KXzb4UNShDUDMEkbVJZ2U+4M5MMfHz54mMYWrVxehtEov2zuXWsFvkzAUJJ+kn7w=="
PUBLIC = "PuDOTDHx8+eJjGFq1cXobRKL9s7l1rBb5MwFCSfpJ+8="
ADDRESS = "6D5F259C10E5310C6C6C572EEDBDDCA3FBBF19D0"
KEY = keys._private(ed25519.Ed25519PrivateKey.from_private_bytes(base64.b64decode(SECRET)[:32]))
PEER = "a" * 40 + "@127.0.0.1:1"


def config(**changes: object) -> NodeConfig:
    values = {"genesis_file": Path("genesis.cbor"), "validator": "v1", "key_file": Path("v1.pem")}
    return NodeConfig(**(values | changes))  # type: ignore[arg-type]


def test_a_validators_key_is_what_cometbft_writes() -> None:
    assert json.loads(validator_key_json(KEY)) == {
        "address": ADDRESS,
        "pub_key": {"type": "tendermint/PubKeyEd25519", "value": PUBLIC},
        "priv_key": {"type": "tendermint/PrivKeyEd25519", "value": SECRET},
    }
    assert address_of(base64.b64decode(PUBLIC)) == ADDRESS


def test_a_nodes_id_is_the_address_of_its_key() -> None:
    assert json.loads(node_key_json(KEY)) == {"priv_key": {"type": "tendermint/PrivKeyEd25519", "value": SECRET}}
    assert node_id(node_key_json(KEY)) == ADDRESS.lower()


def test_the_genesis_names_every_validator_and_nothing_of_a_node() -> None:
    genesis = world.genesis(validators=tuple(NamedKey(name, world.key(name).public.cose_key) for name in ("v1", "v2")))
    made = json.loads(genesis_json(genesis))
    assert [(each["name"], each["power"]) for each in made["validators"]] == [("v1", "1"), ("v2", "1")]
    assert made["chain_id"] == chain_id(genesis)
    assert genesis_json(genesis) == genesis_json(genesis)


def test_two_ledgers_of_one_name_never_share_a_chain() -> None:
    first, second = world.genesis(), world.genesis(currency="JPY")
    assert first.ledger == second.ledger
    assert chain_id(first) != chain_id(second)
    assert len(chain_id(world.genesis(ledger="x" * 63))) == 50


def test_a_validator_with_a_p256_key_is_refused() -> None:
    key = generate_private_key(Algorithm.ESP256)
    with pytest.raises(WrongValue, match="Ed25519"):
        genesis_json(world.genesis(validators=(NamedKey("v1", key.public.cose_key),)))
    with pytest.raises(WrongValue, match="Ed25519"):
        validator_key_json(key)


def test_the_config_that_keeps_a_network_to_itself_and_quiet() -> None:
    made = tomllib.loads(config_toml(config(p2p=P2pSection("0.0.0.0:1", (PEER,)), rpc=RpcSection("127.0.0.1:2"))))
    assert made["p2p"]["pex"] is False
    assert made["p2p"]["persistent_peers"] == PEER
    assert made["rpc"]["laddr"] == "tcp://127.0.0.1:2"
    assert made["consensus"]["create_empty_blocks"] is False
    assert made["mempool"]["recheck"] is False
    assert made["proxy_app"].startswith("unix://")


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    wanted = config(
        genesis_file=tmp_path / "genesis.cbor",
        key_file=tmp_path / "v1.pem",
        p2p=P2pSection("0.0.0.0:1", (PEER,)),
        consensus=ConsensusSection(2_000, 500, 100, 10),
        snapshots=SnapshotSection(50, ("10.0.0.1:26657", "10.0.0.2:26657"), 7, "ab" * 32),
    )
    (tmp_path / "node.toml").write_text(node_config_text(wanted))
    assert load_node_config(tmp_path) == wanted


def test_a_node_begins_with_a_snapshot_only_where_it_is_told_whom_and_what_to_trust() -> None:
    assert tomllib.loads(config_toml(config()))["statesync"]["enable"] is False
    nodes = ("10.0.0.1:26657", "10.0.0.2:26657")
    made = tomllib.loads(config_toml(config(snapshots=SnapshotSection(50, nodes, 7, "ab" * 32))))["statesync"]
    assert (made["enable"], made["rpc_servers"], made["trust_height"]) == (True, ",".join(nodes), 7)
    assert made["trust_hash"] == "AB" * 32
    for refused in ((nodes[:1], 7, "ab" * 32), (nodes, 1, "ab" * 32), (nodes, 7, "")):
        with pytest.raises(WrongValue, match="trust_hash"):
            SnapshotSection(50, *refused)


def test_every_node_says_how_often_snapshots_are_taken() -> None:
    assert json.loads(genesis_json(world.GENESIS, 50))["app_state"]["snapshot_every"] == 50


@pytest.mark.parametrize("peer", ["127.0.0.1:26656", "abc@127.0.0.1:26656", "a" * 40 + "@host"])
def test_a_peer_without_its_id_or_port_is_refused(tmp_path: Path, peer: str) -> None:
    (tmp_path / "node.toml").write_text(node_config_text(config()).replace("peers = [", f'peers = ["{peer}"'))
    with pytest.raises(ConfigError, match="ID@HOST:PORT"):
        load_node_config(tmp_path)


def test_secrets_are_for_their_owner_only_and_what_was_signed_is_never_reset(tmp_path: Path) -> None:
    genesis = world.genesis()
    write_home(tmp_path, config(), genesis, KEY)
    state = tmp_path / "data" / "priv_validator_state.json"
    state.write_text('{"height": "7", "round": 0, "step": 3}')
    write_home(tmp_path, config(), genesis, KEY)
    assert json.loads(state.read_text())["height"] == "7"
    assert (tmp_path / "config" / "priv_validator_key.json").stat().st_mode & 0o077 == 0


def test_a_nodes_identity_is_made_once(tmp_path: Path) -> None:
    write_node_key(tmp_path, KEY)
    assert read_node_id(tmp_path) == ADDRESS.lower()
    with pytest.raises(FileExistsError):
        write_node_key(tmp_path, KEY)
