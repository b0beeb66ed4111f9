"""Checks the signatures of a stored ledger in other processes, ahead of the rules: for the verifier, on several cores.

Whether a key's signature of some bytes holds depends on nothing else, so it may be found out anywhere and at any time.
A helper process reads the ledger's blocks by itself, checks every signature in them that it can, and sends for each one
that holds the SHA-256 of (key, signature, message). `Helpers.verifies` answers from these, and checks what it was not
told. So a helper can only save time: whose key counts is still for the rules to say, a signature that does not hold is
found by the caller itself, and where a helper dies, cannot start or is not wanted, the caller checks everything.

A helper is a new interpreter that talks over two pipes. Forking would carry SQLite connections and locks over, and
`multiprocessing` would run the caller's main module again. The pipe is the bounded queue between the two: a helper that
is far ahead waits until it is read. Helpers take turns by height: of n helpers, the first one takes every n-th block.
"""

import os
import select
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from broker.ledger.opening import charter_of
from broker.ledger.operations import OperationCode, operation_code
from broker.ledger.rules.validators import signers_now
from broker.ledger.state import KEY
from broker.ledger.store import FILE_NAME, Store
from broker.protocol import cbor, envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.limits import MAX_BATCH_BYTES
from broker.protocol.messages import Batch, Block, Genesis

MAX_HELPERS: Final = 3
"""The rules run in one process and keep no more than this many busy."""

_READY: Final = b"r"
_START: Final = struct.Struct(">QQ")
"""To a helper: the first height, and how many heights further its next block is."""
_FRAME: Final = struct.Struct(">QI")
"""From a helper: a height, and the number of tokens that follow."""
_TOKEN_BYTES: Final = 32
_ANSWER_WITHIN_S: Final = 60.0
"""A block takes a second at most; a helper that says nothing for so long is given up."""


class Helpers:
    """Helper processes over the ledger in directory `path`; none where there is one core only."""

    def __init__(self, path: Path, count: int) -> None:
        self._starting = [_Helper(path) for _ in range(count)]
        self._working: list[_Helper] = []
        self._first_height = 0
        self._holding: set[bytes] = set()

    def look_ahead(self, height: int) -> None:
        """Tell that block `height` comes next, so that what the helpers found out about it is at hand."""
        # What is left over belongs to signatures that the rules never looked at, for example of a key that is gone.
        self._holding.clear()
        if self._starting and all(helper.is_ready() for helper in self._starting):
            self._working, self._starting = self._starting, []
            self._first_height = height + 1
            for number, helper in enumerate(self._working):
                helper.start(self._first_height + number, len(self._working))
        elif self._working and height >= self._first_height:
            helper = self._working[(height - self._first_height) % len(self._working)]
            self._holding.update(helper.tokens(height))

    def verifies(self, key: PublicKey, signature: bytes, message: bytes) -> bool:
        """What `PublicKey.verifies` says, without the work where a helper has done it."""
        return _token(key, signature, message) in self._holding or key.verifies(signature, message)

    def close(self) -> None:
        """End the helpers and wait for them."""
        for helper in self._starting + self._working:
            helper.close()
        self._starting, self._working = [], []


class _Helper:
    """One process at the other end of two pipes. Once anything goes wrong with it, it has found out nothing."""

    def __init__(self, path: Path) -> None:
        # -P: the current directory may hold anything and is not a place to import from.
        command = [sys.executable, "-P", "-m", "broker.ledger.signatures", str(path.absolute())]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        self._lost = False

    def is_ready(self) -> bool:
        """True once it has started, or never will."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], 0)
        if readable and not self._lost:
            self._lost = self._read(1) != _READY
        return bool(readable)

    def start(self, height: int, step: int) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_START.pack(height, step))
        except OSError:
            self._lost = True

    def tokens(self, height: int) -> Iterator[bytes]:
        """The tokens of this block; none if the helper is lost."""
        head = self._read(_FRAME.size)
        if len(head) < _FRAME.size or self._lost:
            return
        for_height, count = _FRAME.unpack(head)
        raw = self._read(count * _TOKEN_BYTES)
        if for_height != height or self._lost:
            self._lost = True
            return
        for at in range(0, len(raw), _TOKEN_BYTES):
            yield raw[at : at + _TOKEN_BYTES]

    def _read(self, length: int) -> bytes:
        """That many bytes; fewer mark the helper as lost."""
        assert self._process.stdout is not None
        parts, missing = [], 0 if self._lost else length
        while missing:
            readable, _, _ = select.select([self._process.stdout], [], [], _ANSWER_WITHIN_S)
            part = os.read(self._process.stdout.fileno(), missing) if readable else b""
            if not part:
                self._lost = True
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()


def _token(key: PublicKey, signature: bytes, message: bytes) -> bytes:
    return sha256(key.cose_key + signature + message).digest()


# --- In the helper process


def _help(path: Path) -> None:
    """Check blocks as the other side asked for, until it has read enough and closes the pipe."""
    store = Store.open_read_only(path / FILE_NAME)
    genesis = Genesis.from_bytes(store.meta("genesis") or b"")
    lookup = _lookup(store, genesis)
    output = sys.stdout.buffer
    output.write(_READY)
    output.flush()
    height, step = _START.unpack(sys.stdin.buffer.read(_START.size))
    for number, _, raw in store.blocks(height):
        if number != height:
            continue
        found: list[bytes] = []
        _open_block(raw, genesis.ledger, lookup, found)
        output.write(_FRAME.pack(height, len(found)) + b"".join(found))
        output.flush()
        height += step


def _lookup(store: Store, genesis: Genesis) -> Callable[[bytes], Signer | None]:
    """Who has that key, by what is stored at the end: it need not be right, only likely."""
    charter = charter_of(genesis)
    by_id = {**charter.registrars, **signers_now(store, charter)}

    @lru_cache(maxsize=65_536)
    def signer(key_id: bytes) -> Signer | None:
        if key_id in by_id:
            return by_id[key_id]
        row: Any = store.get((KEY, key_id))
        return None if row is None else Signer(row.name, public_key_from_cose(row.cose_key))

    return signer


def _open_block(raw: bytes, ledger: str, lookup: envelope.KeyLookup, found: list[bytes]) -> None:
    """Check a block's signature and those inside it, as deep as it can be read."""
    try:
        sealed = _checked(raw, ledger, lookup, found)
        for raw_batch in Block.from_payload(sealed.payload).batches:
            batch = Batch.from_payload(_checked(raw_batch, ledger, lookup, found).payload)
            for operation in batch.operations:
                # Most operations are deliveries, and there is nothing sealed in them.
                if operation_code(operation) != OperationCode.DELIVER:
                    _open_statements(cbor.decode(operation, "operation", MAX_BATCH_BYTES), ledger, lookup, found)
    except ProtocolError:
        return  # The caller finds the same fault and says where it is.


def _open_statements(value: Any, ledger: str, lookup: envelope.KeyLookup, found: list[bytes]) -> None:
    """Check what is sealed inside an operation, wherever it stands there."""
    if type(value) is list:
        for item in value:
            _open_statements(item, ledger, lookup, found)
    elif type(value) is bytes and envelope.is_sealed(value):
        with suppress(ProtocolError):  # Other bytes may begin alike.
            _checked(value, ledger, lookup, found)


def _checked(raw: bytes, ledger: str, lookup: envelope.KeyLookup, found: list[bytes]) -> envelope.Envelope:
    """Take an envelope apart, and add its token if its signature holds. Raises MalformedMessage."""
    sealed = envelope.parse(raw)
    signer = lookup(sealed.key_id)
    if signer is not None:
        message = envelope.to_be_signed(sealed, ledger, signer.name)
        if sealed.algorithm is signer.key.algorithm and signer.key.verifies(sealed.signature, message):
            found.append(_token(signer.key, sealed.signature, message))
    return sealed


if __name__ == "__main__":
    try:
        _help(Path(sys.argv[1]))
    except (BrokenPipeError, KeyboardInterrupt, sqlite3.Error, ProtocolError, ValueError, struct.error):
        # The caller goes on without; it reads the same file and reports what is wrong with it.
        os._exit(1)
