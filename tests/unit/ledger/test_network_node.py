"""The supervisor of a node, with a script in CometBFT's place: ended, failed, stopped."""

import os
import threading
from pathlib import Path

import pytest
from dengen_testing.waiting import wait_until
from support import ledger_world as world

from broker.ledger.cometbft import node as module
from broker.ledger.cometbft.binary import CometbftMissing, find_cometbft
from broker.ledger.cometbft.home import NodeConfig, RpcSection, node_config_text, write_node_key
from broker.ledger.cometbft.node import PID_NAME, NodeFailed, run_node
from broker.ledger.store import LedgerError
from broker.protocol.keys import PrivateKey, generate_private_key, save_private_key
from broker.protocol.messages import Genesis
from firmware_config.loader import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # A node's process stands in its home; this one comes back.
    monkeypatch.setattr(module, "RESTART_AFTER_S", (0.0, 0.0))
    home = tmp_path / "node"
    save_private_key(tmp_path / "node.pem", world.key("node"))
    (tmp_path / "genesis.cbor").write_bytes(world.GENESIS.to_bytes())
    write_node_key(home, generate_private_key())
    config = NodeConfig(tmp_path / "genesis.cbor", "node", tmp_path / "node.pem", rpc=RpcSection("127.0.0.1:1"))
    (home / "node.toml").write_text(node_config_text(config))
    return home


def script(home: Path, text: str) -> Path:
    file = home.parent / "cometbft"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def serve_until_stopped(
    path: Path,
    genesis: Genesis,
    validator_name: str,
    validator_key: PrivateKey,
    socket_path: Path,
    stop: threading.Event,
    snapshot_every: int,
) -> None:
    assert stop.wait(20)


def test_it_is_started_again_and_given_up_after_a_few_times(home: Path) -> None:
    starts = home.parent / "starts"
    program = script(home, f"echo x >> {starts}; echo panic: no memory; exit 2")
    with pytest.raises(NodeFailed, match=r"3 times right after its start.*code 2.*panic: no memory"):
        run_node(home, program, serve_until_stopped, threading.Event())
    assert starts.read_text().count("x") == 3


def test_a_consensus_failure_stops_the_node_and_says_what_to_do(home: Path) -> None:
    program = script(home, "echo 'E CONSENSUS FAILURE!!! err=wrong app hash'; exec sleep 60")
    with pytest.raises(NodeFailed, match=r"another state than two thirds.*ledger verify"):
        run_node(home, program, serve_until_stopped, threading.Event())


def test_it_is_asked_to_end_and_the_application_lives_until_it_has(home: Path) -> None:
    ready, ended = home.parent / "ready", home.parent / "ended"
    program = script(home, f"trap 'echo done > {ended}; exit 0' TERM; echo > {ready}; while :; do sleep 0.05; done")
    stop = threading.Event()
    seen = []

    def serve(*arguments: object) -> None:
        wait_until(lambda: (home / PID_NAME).exists() and (home / PID_NAME).read_text() != "", "the pid")
        # A shell that has not come to its trap yet would simply end.
        wait_until(ready.exists, "the trap to be set")
        stop.set()
        app_stop = arguments[5]
        assert isinstance(app_stop, threading.Event)
        assert app_stop.wait(10)
        seen.append(ended.exists())

    run_node(home, program, serve, stop)
    assert seen == [True]
    assert not (home / PID_NAME).exists()


def test_an_application_that_fails_takes_it_down(home: Path) -> None:
    program = script(home, "exec sleep 60")
    pids = []

    def serve(*_: object) -> None:
        wait_until(lambda: (home / PID_NAME).exists() and (home / PID_NAME).read_text() != "", "the pid")
        pids.append(int((home / PID_NAME).read_text()))
        raise LedgerError(home, "the disk is full")

    with pytest.raises(LedgerError, match="the disk is full"):
        run_node(home, program, serve, threading.Event())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_one_home_is_run_once(home: Path) -> None:
    def serve(*_: object) -> None:
        with pytest.raises(LedgerError, match="in use by another process"):
            run_node(home, program, serve_until_stopped, threading.Event())

    program = script(home, "exec sleep 60")
    run_node(home, program, serve, threading.Event())


def test_a_key_that_is_no_validators_is_refused(home: Path) -> None:
    (home.parent / "node.pem").unlink()
    save_private_key(home.parent / "node.pem", generate_private_key())
    with pytest.raises(ConfigError, match="a validator of ledger"):
        run_node(home, home, serve_until_stopped, threading.Event())


def test_a_home_that_was_not_initialised_is_refused(home: Path) -> None:
    (home / "config" / "node_key.json").unlink()
    with pytest.raises(ConfigError, match="ledger node init"):
        run_node(home, home, serve_until_stopped, threading.Event())


def test_another_version_is_refused(home: Path) -> None:
    with pytest.raises(CometbftMissing, match=r"version 0\.34\.1"):
        find_cometbft(script(home, "echo 0.34.1"))
    assert find_cometbft(script(home, "echo v0.38.25"))


def test_a_program_that_does_not_run_is_refused(home: Path) -> None:
    with pytest.raises(CometbftMissing, match="does not run"):
        find_cometbft(home / "nothing")
