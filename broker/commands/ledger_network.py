"""`energy-broker ledger node` and `ledger testnet`: nodes of a CometBFT network that keeps the ledger."""

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from broker.commands.common import DONE, FAILED, WrongUse, add_command, add_group
from broker.config import load_genesis
from broker.protocol.addresses import Address, Host
from broker.protocol.command_line import whole_number
from broker.protocol.keys import generate_private_key, load_private_key, save_private_key
from broker.protocol.messages import Genesis, NamedKey
from firmware_config.loader import WrongValue


def add_commands(group: Any) -> None:
    """Add the commands to those of `energy-broker ledger`."""
    node = add_group(group, "node", "Set up and run one node of a ledger network.")
    init = add_command(node, "init", "Make a node's home, and print the address that its peers need.", _node_init)
    init.add_argument("--home", type=Path, required=True, metavar="DIR", help="where the node keeps everything")
    init.add_argument("--genesis", type=Path, required=True, metavar="FILE", help="the ledger's genesis file")
    init.add_argument("--name", required=True, metavar="NAME", help="the validator that this node is")
    init.add_argument("--key", type=Path, required=True, metavar="FILE", help="the validator's private key (Ed25519)")
    init.add_argument("--host", required=True, metavar="HOST", help="name or address under which peers reach this node")
    init.add_argument("--listen", default="0.0.0.0:26656", metavar="HOST:PORT", help="for peers; default: %(default)s")
    init.add_argument("--rpc", default="127.0.0.1:26657", metavar="HOST:PORT", help="for brokers; default: %(default)s")
    init.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="ID@HOST:PORT",
        help="another node; may be repeated, or added later",
    )
    run = add_command(node, "run", "Run a node until SIGTERM or SIGINT.", _node_run)
    run.add_argument("--home", type=Path, required=True, metavar="DIR", help="the node's home")
    run.add_argument("--cometbft", type=Path, metavar="FILE", help="the CometBFT program, if not on PATH or in .tools")
    testnet = add_command(
        group, "testnet", "Set up a network on this machine, for trying it out, and run it until SIGTERM.", _testnet
    )
    testnet.add_argument("--path", type=Path, required=True, metavar="DIR", help="where it is made, or was made before")
    testnet.add_argument(
        "--validators", type=whole_number(1, 64), default=4, metavar="N", help="how many nodes; default: %(default)s"
    )
    testnet.add_argument("--ledger", default="testnet", metavar="ID", help="name of a new ledger; default: %(default)s")
    testnet.add_argument("--area", default="home", metavar="NAME", help="market area of a new ledger")
    testnet.add_argument(
        "--genesis", type=Path, metavar="FILE", help="use this genesis; then --keys has NAME.pem of each validator"
    )
    testnet.add_argument("--keys", type=Path, metavar="DIR", help="the validators' private keys, for --genesis")
    testnet.add_argument("--set-up-only", action="store_true", help="do not run it")


def _node_init(options: argparse.Namespace) -> int:
    from broker.ledger.cometbft.home import (
        NODE_FILE,
        NodeConfig,
        P2pSection,
        RpcSection,
        ed25519_public_bytes,
        node_config_text,
        read_node_id,
        write_node_key,
    )

    genesis = load_genesis(options.genesis)
    key = load_private_key(options.key)
    if any((named.name == options.name) != (named.key == key.public.cose_key) for named in genesis.validators):
        raise WrongValue("--name", f"a validator of ledger {genesis.ledger} with its --key, or a name of none of them")
    ed25519_public_bytes(key.public)
    for option, rule, given in (
        ("--host", Host(), options.host),
        ("--listen", Address(), options.listen),
        ("--rpc", Address(), options.rpc),
    ):
        expected = rule.check(given)
        if expected is not None:
            raise WrongValue(option, expected)
    config = NodeConfig(
        options.genesis.resolve(),
        options.name,
        options.key.resolve(),
        P2pSection(options.listen, tuple(options.peer)),
        RpcSection(options.rpc),
    )
    if (options.home / NODE_FILE).exists():
        raise WrongUse(f"{options.home / NODE_FILE} is there already; edit it, since it is read at every start")
    write_node_key(options.home, generate_private_key())
    (options.home / NODE_FILE).write_text(node_config_text(config))
    if NamedKey(options.name, key.public.cose_key) not in genesis.validators:
        note = f"{options.name} is no validator of the genesis: its node follows, and votes once registrars add it"
        print(note, file=sys.stderr)
    port = options.listen.rpartition(":")[2]
    print(f"{read_node_id(options.home)}@{options.host}:{port}")
    return DONE


def _node_run(options: argparse.Namespace) -> int:
    from broker.ledger.cometbft.application import ApplicationStopped
    from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft
    from broker.ledger.cometbft.node import NodeFailed, run_node
    from broker.ledger.cometbft.server import serve_application
    from broker.ledger.faults import LedgerInvariantBroken

    stop = _stopped_by_signals()
    try:
        run_node(options.home, find_cometbft(options.cometbft), serve_application, stop)
    except (CometbftMissing, NodeFailed, ApplicationStopped, LedgerInvariantBroken) as error:
        return _failed(error)
    return DONE


def _testnet(options: argparse.Namespace) -> int:
    from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft
    from broker.ledger.cometbft.testnet import FILE_NAME, load_testnet, run_testnet, set_up

    try:
        find_cometbft()
    except CometbftMissing as error:
        return _failed(error)
    path: Path = options.path
    if (path / FILE_NAME).exists():
        nodes = load_testnet(path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        genesis_file, keys = _genesis_and_keys(options)
        names = [validator.name for validator in load_genesis(genesis_file).validators]
        nodes = set_up(path, genesis_file, {name: keys / f"{name}.pem" for name in names})
    for node in nodes:
        print(f"{node.name}: brokers reach it at {node.rpc}; home {node.home}", flush=True)
    if not options.set_up_only:
        run_testnet(nodes, _stopped_by_signals(), lambda: print("running: every node has the first block", flush=True))
    return DONE


def _genesis_and_keys(options: argparse.Namespace) -> tuple[Path, Path]:
    """The genesis file and the folder of its validators' keys: as given, or made new with a registrar."""
    path: Path = options.path
    if options.genesis is not None:
        if options.keys is None:
            raise WrongValue("--keys", "the folder with the private key of each validator of --genesis")
        return options.genesis, options.keys
    named = []
    for name in ("registrar", *(f"validator-{number + 1}" for number in range(options.validators))):
        key = generate_private_key()
        save_private_key(path / f"{name}.pem", key)
        named.append(NamedKey(name, key.public.cose_key))
    genesis = Genesis(
        options.ledger,
        1_800,
        600,
        1_200,
        90 * 86_400,
        "EUR",
        (options.area,),
        (named[0],),
        tuple(named[1:]),
        False,
        None,
    )
    raw = genesis.to_bytes()
    Genesis.from_bytes(raw)
    (path / "genesis.cbor").write_bytes(raw)
    return path / "genesis.cbor", path


def _stopped_by_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("ledger-node").setLevel(logging.INFO)
    return stop


def _failed(error: Exception) -> int:
    print(f"energy-broker: {error}", file=sys.stderr)
    return FAILED
