"""Agents, brokers, streets and servers as processes of their own: started, watched, ended and killed by their own pid.

Output of a process goes to its log file, which grows over restarts. Nothing here ends a process that it did not start.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

from dengen_testing.waiting import wait_until

STOP_LIMIT_S: Final = 10.0
"""After SIGTERM a process has this long to end before it is killed."""

_LOG_TAIL_BYTES: Final = 4_000


class ProcessEnded(Exception):
    """A process that should be running has ended. `code` is its exit code, negative for a signal."""

    def __init__(self, name: str, code: int, log_tail: str) -> None:
        super().__init__(f"{name} ended with exit code {code}; the end of its log:\n{log_tail}")
        self.name = name
        self.code = code


class ManagedProcess:
    """One child process that can be started again after it ended."""

    def __init__(
        self, name: str, command: Sequence[str], log_file: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        """`name` is for messages. `environment` adds to ours."""
        self.name = name
        self.command = tuple(command)
        self.log_file = log_file
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self.running and self._process is not None else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it ended, or None while it runs or was never started."""
        return None if self._process is None else self._process.poll()

    def start(self) -> Self:
        """Start it; output is appended to the log file. Raises ValueError if it runs already."""
        if self.running:
            raise ValueError(f"{self.name} runs already")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = _spawn(self.command, log, self._environment)
        return self

    def stop(self, limit_s: float = STOP_LIMIT_S) -> int:
        """SIGTERM, and SIGKILL if it has not ended after `limit_s`. Returns the exit code."""
        return self._end(signal.SIGTERM, limit_s)

    def kill(self) -> int:
        """SIGKILL at once: the power cut among the ways to end. Returns the exit code."""
        return self._end(signal.SIGKILL, STOP_LIMIT_S)

    def check_running(self) -> None:
        """Raise ProcessEnded if it has ended."""
        if not self.running:
            code = self.exit_code
            raise ProcessEnded(self.name, -1 if code is None else code, self.log_tail())

    def wait_ended(self, limit_s: float) -> int:
        """Wait until it ends by itself. Raises WaitedTooLong. Returns the exit code."""
        wait_until(lambda: not self.running, f"{self.name} to end", limit_s=limit_s, detail=self.log_tail)
        code = self.exit_code
        assert code is not None
        return code

    def log_tail(self) -> str:
        """The last lines of its log, for error messages."""
        with contextlib.suppress(FileNotFoundError):
            return self.log_file.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return "(no log)"

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, how: signal.Signals, limit_s: float) -> int:
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode


class ProcessGroup:
    """Processes that belong together; leaving the `with` stops them, the last started first."""

    def __init__(self) -> None:
        self._processes: list[ManagedProcess] = []

    def add(self, process: ManagedProcess) -> ManagedProcess:
        """Take over a process (started or not)."""
        self._processes.append(process)
        return process

    def check_running(self) -> None:
        """Raise ProcessEnded for the first one that has ended."""
        for process in self._processes:
            process.check_running()

    def stop(self) -> None:
        """Ask all to end at once, then wait for each."""
        for process in reversed(self._processes):
            if process.pid is not None:
                os.kill(process.pid, signal.SIGTERM)
        for process in reversed(self._processes):
            process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def agent_process(config: Path, log_file: Path | None = None) -> ManagedProcess:
    """`meter-agent run` with that config, not started; the log goes beside the config unless said otherwise."""
    return _console_script("meter_agent.cli", "meter-agent", config, log_file)


def broker_process(config: Path, log_file: Path | None = None) -> ManagedProcess:
    """`energy-broker run` with that config, not started; the log goes beside the config unless said otherwise."""
    return _console_script("broker.cli", "energy-broker", config, log_file)


def street_process(config: Path, log_file: Path | None = None) -> ManagedProcess:
    """A street of wire-level meters (`python -m dengen_testing.wire`) with that config, not started."""
    log_file = log_file or config.with_suffix(".log")
    command = [sys.executable, "-m", "dengen_testing.wire", "--config", str(config)]
    return ManagedProcess(f"street {config.stem}", command, log_file)


def _console_script(module: str, name: str, config: Path, log_file: Path | None) -> ManagedProcess:
    # By module and not by script name, so that it is this interpreter's even where PATH says otherwise.
    command = [sys.executable, "-m", module, "run", "--config", str(config)]
    return ManagedProcess(f"{name} {config.stem}", command, log_file or config.with_suffix(".log"))


def _spawn(command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in a terminal reaches only us, and we end the children in our order.
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
    )
