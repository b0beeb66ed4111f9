"""The ABCI application behind a real socket: killed at each step of a commit, restarted, handed the block again."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.comet_driver import CometDriver, HungUp, Refused, block
from support.ledger_world import SET_UP, batch, deliver, issue, take

from broker.ledger.cometbft import abci
from broker.ledger.cometbft.application import TxCode
from broker.ledger.verify import verify_ledger

pytestmark = pytest.mark.integration

# Serves the application; kills itself when SQLite begins statement number KILL of the commit at HEIGHT, or (-1) when
# all of the commit is written and only the answer is missing.
SERVER = """
import os, signal, sys, threading
from pathlib import Path
from support.ledger_world import GENESIS, key
from broker.ledger.cometbft import abci, application, server

directory, height, kill = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())

class Fragile(application.NodeApplication):
    def _commit(self):
        if self.network_height + 1 != height:
            return super()._commit()
        statements = 0

        def count(statement):
            nonlocal statements
            if statements == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            statements += 1

        self._store._db.set_trace_callback(count)
        super()._commit()
        if kill == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        print(statements, flush=True)
        return abci.CommitResponse()

server.NodeApplication = Fragile
server.serve_application(directory / "ledger", GENESIS, "node", key("node"), directory / "app.sock", stop, 1_000)
"""

TRADE = batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000))
DELIVERY = batch(*[deliver(n, 10, ("solar-1", 10 * n, 10 * n + 10)) for n in range(20)])


class Served:
    """The application in a process of its own."""

    def __init__(self, path: Path, height: int = 0, kill: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path), str(height), str(kill)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.driver = CometDriver(path / "app.sock")

    def stop(self) -> tuple[int, str, str]:
        """Ask it to end; returns exit code, output and errors."""
        self.driver.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        output, errors = self.process.communicate(timeout=20)
        return self.process.returncode, output, errors

    def killed(self) -> None:
        self.driver.close()
        self.process.communicate(timeout=20)
        assert self.process.returncode == -signal.SIGKILL


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.stop()


def started(path: Path, height: int = 0, kill: int = 0) -> Served:
    served = Served(path, height, kill)
    served.driver.init_chain()
    served.driver.make_block(1, *SET_UP)
    served.driver.make_block(2, TRADE)
    return served


def statements_of_commit(path: Path) -> int:
    """How many SQL statements the commit of block 3 begins."""
    served = started(path, 3, 1_000_000)
    served.driver.make_block(3, DELIVERY)
    _, output, _ = served.stop()
    return int(output)


def test_killed_at_each_step_of_a_commit_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    count = statements_of_commit(whole)
    assert count > 4
    expected = verify_ledger(whole / "ledger")
    assert expected.ok
    for step in sorted({*range(0, count, max(1, count // 6)), count - 1, -1}):
        path = tmp_path / f"step{step}"
        path.mkdir()
        served = started(path, 3, step)
        app_hash = served.driver.finalize(3, DELIVERY).app_hash
        with pytest.raises(HungUp):
            served.driver.commit()
        served.killed()
        again = Served(path)
        info = again.driver.info()
        if step == -1:
            # Ahead of CometBFT, which then skips this block: it knows the app hash from here.
            assert (info.last_block_height, info.last_block_app_hash) == (3, app_hash)
        else:
            assert info.last_block_height == 2, f"statement {step} was not the last, and yet the commit stands"
            replayed = again.driver.make_block(3, DELIVERY)
            assert (replayed.app_hash, replayed.tx_results[0].code) == (app_hash, TxCode.APPLIED)
        again.driver.make_block(4)
        assert again.stop() == (0, "", "")
        report = verify_ledger(path / "ledger")
        assert (report.errors, report.height, report.state_hash) == ((), 3, expected.state_hash)


def test_killed_before_commit_the_block_is_handed_in_again(tmp_path: Path) -> None:
    served = started(tmp_path)
    before = served.driver.finalize(3, DELIVERY)
    served.process.kill()
    served.killed()
    again = Served(tmp_path)
    assert again.driver.info().last_block_height == 2
    assert again.driver.make_block(3, DELIVERY) == before
    assert again.driver.make_block(4, DELIVERY).tx_results[0].code == TxCode.REFUSED
    again.stop()


def test_four_connections_are_answered_each_in_its_own_order(served: Served, tmp_path: Path) -> None:
    served.driver.init_chain()
    others = [CometDriver(tmp_path / "app.sock") for _ in range(3)]
    for number, driver in enumerate((served.driver, *others)):
        requests = [abci.EchoRequest(f"{number}-{count}") for count in range(50)]
        answers = driver.ask_all(*requests, abci.FlushRequest())
        assert answers == [*[abci.EchoResponse(request.message) for request in requests], abci.FlushResponse()]
    large = batch(*[deliver(n, 10) for n in range(1_000)])
    answers = others[0].ask_all(*[abci.CheckTxRequest(large)] * 5, abci.FlushRequest())
    assert len(answers) == 6
    for driver in others:
        driver.close()
    assert served.driver.make_block(1, *SET_UP).app_hash


def test_a_wrong_height_stops_the_process_and_says_why(tmp_path: Path) -> None:
    served = started(tmp_path)
    with pytest.raises(Refused, match="hands in block 9"):
        served.driver.ask(block(9), abci.FinalizeBlockResponse)
    code, _, errors = served.stop()
    assert code == 1
    assert "ApplicationStopped" in errors


def test_bytes_that_are_no_request_end_that_connection_only(served: Served, tmp_path: Path) -> None:
    stranger = CometDriver(tmp_path / "app.sock")
    stranger._socket.sendall(b"\x03abc")
    with pytest.raises((Refused, HungUp)):
        stranger.ask_all(abci.FlushRequest())
    stranger.close()
    assert served.driver.info().last_block_height == 0


def test_the_socket_is_gone_after_the_end_and_a_left_one_is_replaced(tmp_path: Path) -> None:
    served = Served(tmp_path)
    served.process.kill()
    served.killed()
    assert (tmp_path / "app.sock").exists()
    again = Served(tmp_path)
    assert again.driver.info().last_block_height == 0
    assert again.stop() == (0, "", "")
    assert not (tmp_path / "app.sock").exists()
