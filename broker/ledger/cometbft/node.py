"""Runs a node: the application in this process, CometBFT as its child.

The two live and die together. CometBFT ends by itself when its application is gone; when CometBFT ends, it is started
again, more slowly each time, and picks up where the application stands. It is not started again after a consensus
failure, or when it keeps ending right after its start: then this process stops and says why, because a node that is
different from the others must be looked at, and everything it holds stays as it is.

Signals and waits are here; what is written where stands in `home`.
"""

import contextlib
import fcntl
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from broker.config import load_genesis
from broker.ledger.certificate import CERTIFICATE_NAME
from broker.ledger.cometbft.certify import CommitNode, certify
from broker.ledger.cometbft.home import LEDGER_FOLDER, NODE_FILE, SOCKET_NAME, load_node_config, write_home
from broker.ledger.cometbft.rpc import HttpNode, NodeError
from broker.ledger.store import LedgerError
from broker.protocol.files import reason_of
from broker.protocol.keys import PrivateKey, load_private_key
from broker.protocol.messages import Genesis
from firmware_config.loader import ConfigError

LOG: Final = logging.getLogger("ledger-node")

PID_NAME: Final = "cometbft.pid"
LOCK_NAME: Final = "node.lock"

RESTART_AFTER_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Waits before CometBFT is started again, by how often it has ended soon after a start."""

SOON_S: Final = 10.0
"""A CometBFT that ran for less has not really started."""

STOP_LIMIT_S: Final = 10.0
"""After SIGTERM CometBFT has this long to close its databases before it is killed."""

_CERTIFY_EVERY_S: Final = 0.5
"""How often a node looks for a newer certificate; it costs two questions to itself."""

_RPC_LIMIT_S: Final = 5.0
_KEPT_LINES: Final = 20
_FAILURE: Final = "CONSENSUS FAILURE"


class Serve(Protocol):
    """`serve_application`: serves CometBFT on `socket_path` until `stop` is set. Raises LedgerError."""

    def __call__(
        self,
        path: Path,
        genesis: Genesis,
        validator_name: str,
        validator_key: PrivateKey,
        socket_path: Path,
        stop: threading.Event,
        snapshot_every: int,
    ) -> None: ...


class NodeFailed(Exception):
    """A node that cannot go on by itself. The text says what an operator does next."""


def run_node(home: Path, cometbft: Path, serve: Serve, stop: threading.Event) -> None:
    """Run the node in `home` until `stop` is set. Raises ConfigError, LedgerError or NodeFailed."""
    config = load_node_config(home)
    genesis = load_genesis(config.genesis_file)
    key = load_private_key(config.key_file)
    if any((named.name == config.validator) != (named.key == key.public.cose_key) for named in genesis.validators):
        raise ConfigError(
            home / NODE_FILE,
            "validator",
            f"a validator of ledger {genesis.ledger} with its own key, or a name and key of none of them",
        )
    if not (home / "config" / "node_key.json").is_file():
        raise ConfigError(home, "", "a node's home with config/node_key.json; make one with `ledger node init`")
    home = home.resolve()
    with _locked(home):
        write_home(home, config, genesis, key)
        # A path of a unix socket has at most 107 bytes, so both sides name it from the home they stand in.
        os.chdir(home)
        child = Cometbft(cometbft, home, stop)
        watcher = threading.Thread(target=child.run, name="cometbft", daemon=True)
        watcher.start()
        rpc = HttpNode(_own_rpc(config.rpc.listen), _RPC_LIMIT_S)
        keeper = threading.Thread(
            target=keep_certificate, args=(home / LEDGER_FOLDER, genesis.ledger, rpc, stop), daemon=True
        )
        keeper.start()
        try:
            # The application goes on until CometBFT has closed its databases.
            serve(
                home / LEDGER_FOLDER,
                genesis,
                config.validator,
                key,
                Path(SOCKET_NAME),
                child.ended,
                config.snapshots.every,
            )
        finally:
            stop.set()
            child.ended.wait(STOP_LIMIT_S + 5.0)
    if child.failure is not None:
        raise NodeFailed(child.failure)


def keep_certificate(ledger_directory: Path, ledger: str, node: CommitNode, stop: threading.Event) -> None:
    """Put the network's certificate of the newest block beside the ledger, again whenever there is a newer one."""
    file = ledger_directory / CERTIFICATE_NAME
    kept: bytes | None = None
    while not stop.wait(_CERTIFY_EVERY_S):
        try:
            certificate = certify(node, ledger, 0.0)
        except NodeError as error:
            LOG.debug("no certificate: %s", error)
            continue
        if certificate.block_id == kept:
            continue
        unfinished = file.with_name(file.name + ".new")
        try:
            unfinished.write_bytes(certificate.to_bytes())
            unfinished.replace(file)
        except OSError as error:
            LOG.warning("the network's certificate cannot be written: %s", error)
            continue
        kept = certificate.block_id


def _own_rpc(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    return f"http://127.0.0.1:{port}" if host in ("0.0.0.0", "") else f"http://{listen}"


class Cometbft:
    """The child: started, listened to, started again. `failure` says why it was given up, None while it was not."""

    def __init__(
        self,
        program: Path,
        home: Path,
        stop: threading.Event,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._program = program
        self._home = home
        self._stop = stop
        self._monotonic_s = monotonic_s
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.failure: str | None = None
        self.ended = threading.Event()
        """Set when it has ended for good."""

    def run(self) -> None:
        """Keep it running until `stop` is set, or it is given up, which sets `stop`."""
        try:
            self._keep_running()
        except OSError as error:
            self._give_up(f"cometbft cannot be started ({reason_of(error)})")
        finally:
            self.ended.set()

    def _keep_running(self) -> None:
        soon = 0
        while not self._stop.is_set():
            started_s = self._monotonic_s()
            code = self._run_once()
            if self._stop.is_set():
                break
            soon = soon + 1 if self._monotonic_s() - started_s < SOON_S else 0
            if soon > len(RESTART_AFTER_S):
                self._give_up(f"cometbft ended {soon} times right after its start, the last time with code {code}")
                break
            pause_s = RESTART_AFTER_S[max(0, soon - 1)]
            LOG.warning("cometbft ended with code %s; it is started again in %s s", code, pause_s)
            self._stop.wait(pause_s)

    def _run_once(self) -> int:
        process = subprocess.Popen(
            [self._program, "start", "--home", str(self._home)],
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        (self._home / PID_NAME).write_text(str(process.pid))
        listener = threading.Thread(target=self._listen, args=(process,), name="cometbft-log", daemon=True)
        listener.start()
        try:
            while process.poll() is None and not self._stop.wait(0.1):
                pass
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_LIMIT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            (self._home / PID_NAME).unlink(missing_ok=True)
        code = process.wait()
        listener.join(1.0)
        return code

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """Pass its log on, and notice the one failure after which it lives on but takes no part any more."""
        assert process.stdout is not None
        for line in process.stdout:
            text = line.rstrip()
            self._lines.append(text)
            LOG.info("cometbft: %s", text)
            if _FAILURE in text and self.failure is None:
                self._give_up("CometBFT's consensus has failed: this node computed another state than two thirds did")

    def _give_up(self, what: str) -> None:
        last = next((line for line in reversed(self._lines) if line), "nothing")
        self.failure = (
            f"{what}. Its last words: {last[:1_000]}. This node has stopped; its data stays as it is. Run"
            f" `energy-broker ledger verify {self._home / LEDGER_FOLDER}`. If that finds a fault, remove"
            f" {LEDGER_FOLDER}/ and all of data/ but priv_validator_state.json, and start it again"
        )
        self._stop.set()


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the home for this process, so that one validator never runs twice in one place."""
    descriptor = os.open(home / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(home, "in use by another process; stop that one first") from None
        yield
    finally:
        os.close(descriptor)
