"""Re-derives a ledger from its genesis and compares everything that is stored with it.

The history is replayed into a second ledger file in a scratch directory, with the same rules that the engine uses and
none of its stored results: every signature, every rule, the state after each block, Merkle roots and the chain. Then
every stored row is compared with the replayed one. Memory stays bounded, however long the history is.

What it cannot know is whether the history goes on: a copy cut off after a whole block is a sound, shorter ledger.
Compare the reported height and block id with a checkpoint that others have seen.
"""

import fcntl
import os
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.ledger.chain import Step, block_id_of, first_head, genesis_hash, validators_of
from broker.ledger.faults import LedgerInvariantBroken, RuleViolation
from broker.ledger.opening import Charter, RefusedBatch, charter_of, open_batch
from broker.ledger.receipts import SignedHead, verify_checkpoint, verify_signed_root
from broker.ledger.rules import keys_read
from broker.ledger.state import decode_key
from broker.ledger.store import FILE_NAME, LOCK_NAME, NETWORK, SIGNED_HEAD, LedgerError, Store
from broker.ledger.trust import Trust
from broker.protocol import envelope
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Block, Genesis

MAX_ERRORS: Final = 100
"""More errors than these say nothing new."""

_BLOCKS_PER_WRITE: Final = 16


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked, and what is wrong. `genesis_hash` and `block_id` are for comparing with what others hold."""

    ledger: str
    genesis_hash: bytes
    height: int
    block_id: bytes
    state_hash: bytes
    root: bytes
    batches: int
    operations: int
    rows: int
    errors: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors


def verify_ledger(path: Path) -> VerifyReport:
    """Check the ledger in directory `path`, also while an engine runs on it.

    Whatever is wrong with its content stands in the report. Raises LedgerError only where there is nothing to check: no
    ledger file, or one whose genesis cannot be read.
    """
    file = path / FILE_NAME
    if not file.is_file():
        raise LedgerError(path, f"holds no {FILE_NAME}; give the ledger's directory")
    errors = _wal_faults(path)
    try:
        store = Store.open_read_only(file)
    except sqlite3.Error as error:
        raise LedgerError(path, f"SQLite cannot open it: {error}") from error
    try:
        return _verified(path, store, errors)
    finally:
        store.close()


def _verified(path: Path, store: Store, errors: list[str]) -> VerifyReport:
    try:
        genesis = Genesis.from_bytes(store.meta("genesis") or b"")
        charter = charter_of(genesis)
    except (sqlite3.Error, ProtocolError, ValueError, TypeError) as error:
        raise LedgerError(path, f"its genesis cannot be read ({error}); restore the ledger from a copy") from error
    replay = _Replay(genesis, charter, errors)
    with tempfile.TemporaryDirectory(prefix="ledger-verify-") as scratch:
        try:
            with store.snapshot():
                errors += [f"SQLite: {fault}" for fault in store.integrity_faults()]
                replay.run(store, Path(scratch))
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            errors.append(f"SQLite cannot read on: {error}")
    head = replay.head
    return VerifyReport(
        genesis.ledger,
        genesis_hash(genesis),
        head.height,
        head.block_id,
        head.state_hash,
        head.checkpoint().root,
        replay.batches,
        replay.operations,
        replay.rows,
        tuple(errors[:MAX_ERRORS]),
    )


class _Stop(Exception):
    """The history cannot be replayed further; what follows would only be wrong because of this."""


class _Replay:
    """The second derivation, and how far it has come."""

    def __init__(self, genesis: Genesis, charter: Charter, errors: list[str]) -> None:
        self._genesis = genesis
        self._charter = charter
        self._validators = validators_of(genesis)
        self._errors = errors
        self.head = first_head(genesis)
        self.batches = 0
        self.operations = 0
        self.rows = 0

    def run(self, stored: Store, scratch: Path) -> None:
        replayed = Store.create(scratch / FILE_NAME, self._genesis.to_bytes(), self.head, durable=False)
        try:
            self._replay(stored, replayed)
            self._compare("state row", stored.state_rows(), replayed.state_rows(), _show_key)
            self._compare("batch", stored.batch_rows(), replayed.batch_rows(), lambda raw: raw.hex())
            self._compare("Merkle nodes from", stored.node_rows(), replayed.node_rows(), str)
            # Nobody but a validator can make the signed head again, so it is checked instead of compared; and where the
            # network stands is for CometBFT to compare.
            own_meta = (row for row in stored.meta_rows() if row[0] not in (SIGNED_HEAD, NETWORK))
            self._compare("meta", own_meta, replayed.meta_rows(), str)
            self._check_signed_head(stored.meta(SIGNED_HEAD))
        except _Stop as stop:
            self._errors.append(str(stop))
        finally:
            replayed.close()

    def _replay(self, stored: Store, replayed: Store) -> None:
        waiting = Step(replayed, self._charter, self.head)
        written: list[tuple[int, bytes, bytes]] = []
        heights: list[tuple[bytes, int]] = []
        for row in stored.blocks():
            heights += self._block(row, waiting, replayed)
            written.append(row)
            if len(written) == _BLOCKS_PER_WRITE:
                replayed.write(waiting.rows, waiting.written(), written, heights, waiting.head, waiting.nodes)
                waiting, written, heights = Step(replayed, self._charter, waiting.head), [], []
        replayed.write(waiting.rows, waiting.written(), written, heights, waiting.head, waiting.nodes)

    def _block(self, row: tuple[int, bytes, bytes], step: Step, replayed: Store) -> list[tuple[bytes, int]]:
        """Check and apply one block; returns its batches for the index."""
        height, block_id, raw = row
        where = f"height {height}"
        if height != step.head.height + 1:
            raise _Stop(f"{where}: block {step.head.height + 1} is missing")
        try:
            opened = envelope.open_envelope(raw, self._genesis.ledger, self._validators.get)
        except (ProtocolError, TypeError) as error:
            raise _Stop(f"{where}: {error}") from error
        block = opened.message
        if not isinstance(block, Block) or block_id_of(raw) != block_id or block.height != height:
            raise _Stop(f"{where}: the stored block is another one than its row says")
        if block.previous != step.head.block_id:
            raise _Stop(f"{where}: does not follow on the block before it")
        found = []
        for number, raw_batch in enumerate(block.batches):
            try:
                batch = open_batch(raw_batch, step.state, self._charter)
                replayed.prefetch(keys_read(batch))
                step.apply(batch)
            except (ProtocolError, RuleViolation, RefusedBatch, LedgerInvariantBroken) as error:
                raise _Stop(f"{where}, batch {number}: {error}") from error
            found.append((batch.batch_id, height))
            self.operations += len(batch.operations)
        expected = step.block(block.batches)
        for name in ("tree_size", "root", "state_hash"):
            if getattr(block, name) != getattr(expected, name):
                raise _Stop(f"{where}: {name} is not what the operations up to here make")
        step.finish_block(raw)
        self.head = step.head
        self.batches += len(block.batches)
        return found

    def _check_signed_head(self, raw: bytes | None) -> None:
        """A validator's signatures of the head: only a copy that was made without a key may lack them."""
        if raw is None:
            return
        trust = Trust(self._genesis.ledger, genesis_hash(self._genesis), self._validators, {})
        try:
            signed = SignedHead.from_bytes(raw)
            checkpoint, _ = verify_checkpoint(signed.checkpoint, trust)
            verify_signed_root(signed.root, checkpoint.root, trust)
        except (ProtocolError, TypeError) as error:
            self._errors.append(f"meta {SIGNED_HEAD}: {error}")
            return
        if checkpoint != self.head.checkpoint():
            self._errors.append(f"meta {SIGNED_HEAD}: signs height {checkpoint.height}, another head than the stored")

    def _compare(self, what: str, stored: Iterator[Any], replayed: Iterator[Any], show: Any) -> None:
        """Two ascending sequences of (key, value) must be the same."""
        left, right = next(stored, None), next(replayed, None)
        while len(self._errors) < MAX_ERRORS:
            if left is not None and (right is None or _ascending(left[0], right[0])):
                self._errors.append(f"{what} {show(left[0])}: stored, but no operation made it")
                left = next(stored, None)
            elif right is not None and (left is None or _ascending(right[0], left[0])):
                self._errors.append(f"{what} {show(right[0])}: missing")
                right = next(replayed, None)
            elif left is not None and right is not None:
                if left[1] != right[1]:
                    self._errors.append(f"{what} {show(left[0])}: stored with another value")
                self.rows += what == "state row"
                left, right = next(stored, None), next(replayed, None)
            else:
                return


def _ascending(one: Any, other: Any) -> bool:
    """True if `one` comes before `other`. A damaged key may even be of another type; it is then out of place."""
    return bool(one < other) if type(one) is type(other) else type(one).__name__ < type(other).__name__


def _show_key(raw: Any) -> str:
    try:
        return str(decode_key(raw))
    except (ValueError, TypeError):
        return repr(raw)


# --- The write-ahead log (https://www.sqlite.org/walformat.html)

_WAL_HEADER: Final = struct.Struct(">8I")
_FRAME_HEADER: Final = struct.Struct(">6I")
_WAL_MAGIC: Final = 0x377F0682  # the lowest bit says in which byte order checksums are computed


def _wal_faults(path: Path) -> list[str]:
    """Damage in the write-ahead log, which SQLite itself takes for the log's end and passes over in silence.

    Looked at only while no engine holds the directory: a running one has its log in memory and rewrites it.
    """
    log = path / (FILE_NAME + "-wal")
    if not log.is_file() or not log.stat().st_size or _is_in_use(path):
        return []
    raw = log.read_bytes()
    if len(raw) < _WAL_HEADER.size:
        return []  # Cut short while it was being made: nothing was committed into it.
    advice = (
        "if power failed while it was written, open the ledger once, which removes the unfinished rest; "
        "else blocks may be missing: compare the height with a checkpoint"
    )
    magic, _, page_bytes, _, salt_1, salt_2, check_1, check_2 = _WAL_HEADER.unpack_from(raw)
    order = ">" if magic & 1 else "<"
    checksum = _wal_checksum(raw[:24], (0, 0), order)
    if magic & ~1 != _WAL_MAGIC or checksum != (check_1, check_2):
        return [f"{log.name}: its header is damaged; {advice}"]
    frame_bytes = _FRAME_HEADER.size + page_bytes
    valid = True
    for offset in range(_WAL_HEADER.size, len(raw) - frame_bytes + 1, frame_bytes):
        _, _, frame_salt_1, frame_salt_2, *expected = _FRAME_HEADER.unpack_from(raw, offset)
        # Frames left over from an earlier round carry two other salts; a single one that fits is a damaged pair.
        if frame_salt_1 != salt_1 and frame_salt_2 != salt_2:
            valid = False
            continue
        checksum = _wal_checksum(raw[offset : offset + 8], checksum, order)
        checksum = _wal_checksum(raw[offset + _FRAME_HEADER.size : offset + frame_bytes], checksum, order)
        if not valid or list(checksum) != expected or (frame_salt_1, frame_salt_2) != (salt_1, salt_2):
            number = (offset - _WAL_HEADER.size) // frame_bytes
            return [f"{log.name}: frame {number} is damaged; {advice}"]
    return []


def _wal_checksum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for index in range(0, len(words), 2):
        first = (first + words[index] + second) & 0xFFFFFFFF
        second = (second + words[index + 1] + first) & 0xFFFFFFFF
    return first, second


def _is_in_use(path: Path) -> bool:
    try:
        descriptor = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
