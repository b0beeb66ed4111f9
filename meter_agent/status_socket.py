"""How a running agent answers `meter-agent status`: a Unix socket in its data_dir that says all in one JSON text.

What changes with every sample is in no file, because an SD card would not last; whoever asks is told from memory. The
socket is open to those who may write to data_dir.
"""

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

FILE_NAME: Final = "status.sock"
MAX_ANSWER_BYTES: Final = 1_048_576
ANSWER_TIMEOUT_S: Final = 2.0
_BACKLOG: Final = 4


class StatusSocket:
    """Answers whoever connects, in a thread of its own, until closed."""

    def __init__(self, data_dir: Path, snapshot: Callable[[], dict[str, Any]]) -> None:
        """`snapshot` is called from this thread. Raises OSError."""
        self._data_dir = data_dir
        self._snapshot = snapshot
        # The journal's lock makes sure that no other agent uses this folder: what lies there is from before a crash.
        (data_dir / FILE_NAME).unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        with _short_path(data_dir) as path:
            self._listener.bind(path)
        (data_dir / FILE_NAME).chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        os.close(self._wake_write)
        self._thread.join()
        os.close(self._wake_read)
        self._listener.close()
        (self._data_dir / FILE_NAME).unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            # The pipe becomes readable when `close` closes its other end.
            readable, _, _ = select.select([self._listener.fileno(), self._wake_read], [], [])
            if self._wake_read in readable:
                return
            connection, _ = self._listener.accept()
            connection.settimeout(ANSWER_TIMEOUT_S)
            with contextlib.suppress(OSError), connection:
                connection.sendall(json.dumps(self._snapshot()).encode())


def ask(data_dir: Path) -> dict[str, Any] | None:
    """What the agent on this folder says, None if none runs or it does not answer in time."""
    parts: list[bytes] = []
    try:
        with _short_path(data_dir) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(path)
            while sum(map(len, parts)) <= MAX_ANSWER_BYTES:
                part = connection.recv(65_536)
                if not part:
                    break
                parts.append(part)
        answer: dict[str, Any] = json.loads(b"".join(parts))
    except (OSError, ValueError):
        return None
    return answer


@contextlib.contextmanager
def _short_path(data_dir: Path) -> Iterator[str]:
    """The socket's path by way of the folder's descriptor: the path of a Unix socket has room for 107 bytes only."""
    folder = os.open(data_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{FILE_NAME}"
    finally:
        os.close(folder)
