"""A CometBFT node's home: the text of each of its files, from our genesis and our keys. Pure but for `write_home`.

Everybody makes the same `genesis.json` out of the ledger's genesis, so there is nothing to exchange but addresses, and
the chain id carries the hash of that genesis, so that nodes of two ledgers of one name never talk to each other. A
validator signs votes with the Ed25519 key with which it seals blocks of the ledger.

Files and their fields: https://docs.cometbft.com/v0.38/core/configuration and `types/genesis.go`, `privval/file.go`,
`p2p/key.go` of CometBFT v0.38.
"""

import base64
import json
import os
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final

from broker.ledger.certificate import chain_id_of
from broker.ledger.chain import genesis_hash
from broker.ledger.cometbft.application import SNAPSHOT_EVERY, VALIDATOR_POWER, app_state_of
from broker.ledger.limits import MAX_BLOCK_BATCHES
from broker.protocol.addresses import Address
from broker.protocol.command_line import shown
from broker.protocol.keys import Algorithm, PrivateKey, PublicKey, public_key_from_cose
from broker.protocol.limits import MAX_BATCH_BYTES, MAX_BLOCK_BYTES
from broker.protocol.messages import Genesis
from firmware_config.loader import Between, OneName, WrongValue, load_config

NODE_FILE: Final = "node.toml"
LEDGER_FOLDER: Final = "ledger"
"""Where the application keeps the ledger: what `energy-broker ledger verify` takes."""

SOCKET_NAME: Final = "app.sock"

MAX_MEMPOOL_BYTES: Final = 64 * 2**20
"""Batches that wait in a node. Beyond it a broker is told to come again; it keeps its batches anyway."""

MAX_RPC_BODY_BYTES: Final = 4 * MAX_BATCH_BYTES // 3 + 4_096
"""A batch in base64 inside JSON."""

_NODE_ID: Final = re.compile(r"[0-9a-f]{40}")

_GENESIS_TIME: Final = "2026-01-01T00:00:00Z"
"""The same for every ledger, because nothing reads it: our own genesis has no time, and rules read market time."""


@dataclass(frozen=True, slots=True)
class P2pSection:
    """Where other nodes reach this one, and where it reaches them: `peers` are `ID@HOST:PORT`, as their `init` says."""

    listen: Annotated[str, Address()] = "0.0.0.0:26656"
    peers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for peer in self.peers:
            node_id, _, address = peer.partition("@")
            if _NODE_ID.fullmatch(node_id) is None or Address().check(address) is not None:
                raise WrongValue("peers", f"ID@HOST:PORT as `ledger node init` prints it, got {shown(peer)}")


@dataclass(frozen=True, slots=True)
class RpcSection:
    """Where this node's brokers reach it. Whoever reaches it can submit and read: keep it on a private network."""

    listen: Annotated[str, Address()] = "127.0.0.1:26657"


@dataclass(frozen=True, slots=True)
class ConsensusSection:
    """Waits, in milliseconds, and the look back for votes by the same key.

    `propose_ms`: for a proposal, before the next validator's turn; it grows by half with each failed round. It costs
    only where a proposer is away, and must be longer than a full block takes to make and travel.
    `vote_ms`: for the votes of the rest once two thirds have voted without agreement.
    `commit_ms`: for the last validators' votes before the next block begins without them.
    `double_sign_check_height`: refuse to start if one of so many last blocks carries this validator's vote. For a
    machine that replaces another one; 0 where a node only restarts, or it would refuse to.
    """

    propose_ms: Annotated[int, Between(50, 60_000)] = 1_000
    vote_ms: Annotated[int, Between(10, 60_000)] = 300
    commit_ms: Annotated[int, Between(0, 60_000)] = 20
    double_sign_check_height: Annotated[int, Between(0, 10_000)] = 0


@dataclass(frozen=True, slots=True)
class SnapshotSection:
    """Snapshots for nodes that join later, and the start of this node from one of theirs (state sync).

    `every`: blocks from one snapshot to the next, 0 for none. The same on all nodes: what they agree on depends on it.
    `from_nodes`: a new node begins with a snapshot if at least two RPC addresses HOST:PORT of nodes stand here. It then
    trusts block `trust_height` of the network by its hash `trust_hash` (hex), which two operators have told it: one of
    the last seven days, and never the first, whose time is that of the genesis.
    """

    every: Annotated[int, Between(0, 1_000_000)] = SNAPSHOT_EVERY
    from_nodes: tuple[str, ...] = ()
    trust_height: Annotated[int, Between(0, 2**53)] = 0
    trust_hash: str = ""

    def __post_init__(self) -> None:
        if self.from_nodes and (len(self.from_nodes) < 2 or self.trust_height < 2 or len(self.trust_hash) != 64):
            raise WrongValue(
                "from_nodes",
                "two nodes or more, with a trust_height of 2 or more and its trust_hash (64 hex characters)",
            )


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`node.toml`: what an operator says about a node. CometBFT's own files are made from it at every start."""

    genesis_file: Path
    validator: Annotated[str, OneName()]
    key_file: Path
    p2p: P2pSection = field(default_factory=P2pSection)
    rpc: RpcSection = field(default_factory=RpcSection)
    consensus: ConsensusSection = field(default_factory=ConsensusSection)
    snapshots: SnapshotSection = field(default_factory=SnapshotSection)


def load_node_config(home: Path) -> NodeConfig:
    """Read `node.toml` of a node's home. Raises ConfigError."""
    return load_config(home / NODE_FILE, NodeConfig)


def node_config_text(config: NodeConfig) -> str:
    """The text of a `node.toml`; file names are taken as relative to it."""
    peers = "".join(f"    {json.dumps(peer)},\n" for peer in config.p2p.peers)
    consensus = config.consensus
    return f"""# A node of a ledger network. `energy-broker ledger node run --home THIS-DIRECTORY` runs it.
genesis_file = {json.dumps(str(config.genesis_file))}
validator = "{config.validator}"
key_file = {json.dumps(str(config.key_file))}

[p2p]
# Where the other nodes reach this one; open it to them, and to nobody else.
listen = "{config.p2p.listen}"
# All other nodes, as their `ledger node init` printed them: ID@HOST:PORT.
peers = [
{peers}]

[rpc]
# Where this operator's brokers reach it. Never open this to others.
listen = "{config.rpc.listen}"

[consensus]
propose_ms = {consensus.propose_ms}
vote_ms = {consensus.vote_ms}
commit_ms = {consensus.commit_ms}
# For a machine that takes over from another one: refuse to start while the last so many blocks carry our vote.
double_sign_check_height = {consensus.double_sign_check_height}

[snapshots]
# Blocks from one snapshot to the next; the same on all nodes.
every = {config.snapshots.every}
# A new node begins with a snapshot of others where these say from whom, and which block to trust.
from_nodes = {json.dumps(list(config.snapshots.from_nodes))}
trust_height = {config.snapshots.trust_height}
trust_hash = "{config.snapshots.trust_hash}"
"""


def chain_id(genesis: Genesis) -> str:
    """CometBFT's name of this ledger: at most 50 characters, different for each genesis."""
    return chain_id_of(genesis.ledger, genesis_hash(genesis))


def address_of(public_key: bytes) -> str:
    """CometBFT's address of an Ed25519 key: 20 bytes of its SHA-256, in hex."""
    return sha256(public_key).hexdigest()[:40].upper()


def ed25519_public_bytes(key: PublicKey) -> bytes:
    """The 32 bytes of an Ed25519 key. Raises WrongValue for another algorithm: CometBFT's validators sign with it."""
    if key.algorithm is not Algorithm.ED25519:
        raise WrongValue("validator key", "an Ed25519 key, which every validator of a ledger network needs")
    return key.ed25519_bytes()


def genesis_json(genesis: Genesis, snapshot_every: int = SNAPSHOT_EVERY) -> str:
    """CometBFT's genesis of this ledger: equal bytes on every node. Raises WrongValue if a validator cannot be one."""
    validators = []
    for named in genesis.validators:
        public = ed25519_public_bytes(public_key_from_cose(named.key))
        validators.append(
            {
                "address": address_of(public),
                "pub_key": {"type": "tendermint/PubKeyEd25519", "value": _base64(public)},
                "power": str(VALIDATOR_POWER),
                "name": named.name,
            }
        )
    value = {
        "genesis_time": _GENESIS_TIME,
        "chain_id": chain_id(genesis),
        "initial_height": "1",
        "consensus_params": {
            "block": {"max_bytes": str(MAX_BLOCK_BYTES), "max_gas": "-1"},
            "evidence": {
                "max_age_num_blocks": "100000",
                "max_age_duration": str(48 * 3_600 * 10**9),
                "max_bytes": "65536",
            },
            "validator": {"pub_key_types": ["ed25519"]},
            "version": {"app": "0"},
            "abci": {"vote_extensions_enable_height": "0"},
        },
        "validators": validators,
        "app_hash": "",
        "app_state": app_state_of(genesis, snapshot_every),
    }
    return _json(value)


def validator_key_json(key: PrivateKey) -> str:
    """`priv_validator_key.json` of this key. Raises WrongValue unless it is Ed25519."""
    public = ed25519_public_bytes(key.public)
    return _json(
        {
            "address": address_of(public),
            "pub_key": {"type": "tendermint/PubKeyEd25519", "value": _base64(public)},
            "priv_key": {"type": "tendermint/PrivKeyEd25519", "value": _base64(key.ed25519_seed() + public)},
        }
    )


def node_key_json(key: PrivateKey) -> str:
    """`node_key.json`: the key by which a node proves to others that it is the one of that id."""
    secret = key.ed25519_seed() + ed25519_public_bytes(key.public)
    return _json({"priv_key": {"type": "tendermint/PrivKeyEd25519", "value": _base64(secret)}})


def node_id(node_key: str) -> str:
    """The id that stands in `peers`, from the text of a `node_key.json`. Raises ValueError if it is none."""
    secret = base64.b64decode(json.loads(node_key)["priv_key"]["value"], validate=True)
    return address_of(secret[32:]).lower()


def config_toml(config: NodeConfig) -> str:
    """CometBFT's `config.toml`. What is not in it keeps CometBFT's default."""
    consensus, snapshots = config.consensus, config.snapshots
    return f"""# Made from {NODE_FILE} at every start; change that file instead.
proxy_app = "unix://{SOCKET_NAME}"
moniker = "{config.validator}"
log_level = "error"
log_format = "plain"
abci = "socket"

[rpc]
laddr = "tcp://{config.rpc.listen}"
max_body_bytes = {MAX_RPC_BODY_BYTES}

[p2p]
laddr = "tcp://{config.p2p.listen}"
persistent_peers = "{",".join(config.p2p.peers)}"
# The nodes know each other by name; nobody is looked for, and addresses of private networks are fine.
pex = false
addr_book_strict = false
allow_duplicate_ip = true
dial_timeout = "3s"
# Votes are small and wanted at once, blocks are large: both wait for these.
flush_throttle_timeout = "2ms"
max_packet_msg_payload_size = 16384
send_rate = 20480000
recv_rate = 20480000

[mempool]
# What CheckTx looks at does not change with the next block.
recheck = false
size = {4 * MAX_BLOCK_BATCHES}
max_txs_bytes = {MAX_MEMPOOL_BYTES}
max_tx_bytes = {MAX_BATCH_BYTES}
cache_size = {16 * MAX_BLOCK_BATCHES}

[consensus]
timeout_propose = "{consensus.propose_ms}ms"
timeout_propose_delta = "{max(1, consensus.propose_ms // 2)}ms"
timeout_prevote = "{consensus.vote_ms}ms"
timeout_prevote_delta = "{max(1, consensus.vote_ms // 2)}ms"
timeout_precommit = "{consensus.vote_ms}ms"
timeout_precommit_delta = "{max(1, consensus.vote_ms // 2)}ms"
timeout_commit = "{consensus.commit_ms}ms"
# With the votes of all there is nothing to wait for.
skip_timeout_commit = true
create_empty_blocks = false
peer_gossip_sleep_duration = "4ms"
double_sign_check_height = {consensus.double_sign_check_height}

[statesync]
enable = {"true" if snapshots.from_nodes else "false"}
rpc_servers = "{",".join(snapshots.from_nodes)}"
trust_height = {snapshots.trust_height}
trust_hash = "{snapshots.trust_hash.upper()}"
trust_period = "168h0m0s"
discovery_time = "5s"

[storage]
# The application keeps the results that anybody asks for.
discard_abci_responses = true

[tx_index]
indexer = "null"
"""


def write_home(home: Path, config: NodeConfig, genesis: Genesis, key: PrivateKey) -> None:
    """Write CometBFT's files of a node, but for `node_key.json`, which is its own. Its data stays. Raises OSError."""
    folder = home / "config"
    folder.mkdir(parents=True, exist_ok=True)
    (home / "data").mkdir(exist_ok=True)
    _write(folder / "config.toml", config_toml(config))
    _write(folder / "genesis.json", genesis_json(genesis, config.snapshots.every))
    _write(folder / "priv_validator_key.json", validator_key_json(key))
    state = home / "data" / "priv_validator_state.json"
    if not state.exists():
        # What this validator has signed last; CometBFT does not start without it, and never signs below it.
        _write(state, _json({"height": "0", "round": 0, "step": 0}))


def write_node_key(home: Path, key: PrivateKey) -> None:
    """Give a node its identity towards other nodes, once. Raises FileExistsError rather than change it."""
    folder = home / "config"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "node_key.json"
    if file.exists():
        raise FileExistsError(file)
    _write(file, node_key_json(key))


def read_node_id(home: Path) -> str:
    """The id of the node that lives here. Raises FileNotFoundError before `ledger node init`."""
    return node_id((home / "config" / "node_key.json").read_text())


def _write(file: Path, text: str) -> None:
    """Replace a file whole, readable by its owner only; a power cut leaves the old or the new one."""
    temporary = file.with_name(file.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
