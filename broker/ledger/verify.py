"""Re-derives a ledger from its genesis and compares everything that is stored with it.

The history is replayed into a second ledger file (`replay`), with the same rules that the engine uses and none of its
stored results. Then every stored row, the index of batches, the head and the file's own schema are compared with the
derived ones. Memory stays bounded, however long the history is.

A ledger that was restored from a snapshot has no blocks before it. There the replay begins with the snapshot, which is
checked as on restoring, and the report says from which height on the ledger was verified.

What it cannot know is whether the history goes on: a copy cut off after a whole block is a sound, shorter ledger.
Compare the reported height and block id with a checkpoint that others have seen.
"""

import fcntl
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from broker.ledger.certificate import CERTIFICATE_NAME, MAX_CERTIFICATE_BYTES, Certificate, Proven
from broker.ledger.chain import Head, genesis_hash
from broker.ledger.directory import in_use, read_sealers
from broker.ledger.merkle import nodes_in
from broker.ledger.opening import charter_of
from broker.ledger.receipts import SignedHead, verify_checkpoint, verify_signed_root
from broker.ledger.replay import CannotResume, HistoryFault, Replay, first_mark
from broker.ledger.rules.validators import validators_now
from broker.ledger.signatures import MAX_HELPERS, Helpers
from broker.ledger.snapshot import BASE_FILE_NAME, Manifest, load_snapshot
from broker.ledger.state import decode_key
from broker.ledger.store import BASE, FILE_NAME, FORMAT, NETWORK, SEALERS, SIGNED_HEAD, LedgerError, Store
from broker.ledger.trust import Trust
from broker.ledger.validator_set import sets_around
from broker.ledger.wal import log_fault
from broker.protocol import envelope
from broker.protocol.errors import ProtocolError
from broker.protocol.files import read_file, reason_of
from broker.protocol.messages import Block, Genesis

MAX_ERRORS: Final = 100
"""More errors than these say nothing new."""

WORK_FILE_NAME: Final = "replayed.sqlite3"

_DAMAGED_LOG: Final = (
    "if power failed while it was written, start the ledger once, which removes the unfinished rest or refuses to; else"
    " blocks may be missing: compare the height with a checkpoint"
)

_ROWS_AT_ONCE: Final = 1_000
_HELP_FROM_BYTES: Final = 4 * 2**20
"""A smaller ledger is verified before another process has even started."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked, and what is wrong. `genesis_hash` and `block_id` are for comparing with what others hold.

    `base_height` is the height of the snapshot that the ledger began with: 0, unless it was restored from one.
    `certified_height` is the height up to which a certificate of a network's validators proves the blocks, 0 without.
    `resumed_height` is the height up to which an earlier run had checked the blocks, 0 if this one checked all.
    `started_over` says why what an earlier run left was of no use, None if it was, or if there was none.
    """

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
    base_height: int
    certified_height: int
    resumed_height: int
    started_over: str | None

    @property
    def ok(self) -> bool:
        return not self.errors


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a verification is: blocks checked, blocks stored, operations checked; then rows compared."""

    height: int
    stored_height: int
    operations: int
    rows: int


def verify_ledger(
    path: Path,
    *,
    resume: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    helpers: int | None = None,
    certificate: Path | None = None,
) -> VerifyReport:
    """Check the ledger in directory `path`, also while an engine runs on it.

    With a directory `resume`, work is kept there: a later run goes on from it, whatever ended this one. `progress` is
    called after each block. `helpers` processes check signatures ahead of the rules, 0 for none, by default one for
    each further core. `certificate` is a network's (`energy-broker ledger certify`); by default the one that a node has
    put beside the ledger. It proves the blocks up to its own under whatever seal.

    Whatever is wrong with its content stands in the report. Raises LedgerError only where there is nothing to check: no
    ledger file, or one whose genesis cannot be read; or where another run uses the directory `resume`.
    """
    file = path / FILE_NAME
    if not file.is_file():
        raise LedgerError(path, f"holds no {FILE_NAME}; give the ledger's directory")
    # Before the ledger, so that a node which goes on meanwhile cannot have put a later one here.
    proof = _certificate(certificate or path / CERTIFICATE_NAME, needed=certificate is not None)
    errors = []
    damage = None if in_use(path) else log_fault(path)
    if damage is not None:
        errors.append(f"{damage.what}; {_DAMAGED_LOG}")
    try:
        store = Store.open_read_only(file)
    except sqlite3.Error as error:
        raise LedgerError(path, f"SQLite cannot open it: {error}; restore the ledger from a copy") from error
    try:
        genesis = _genesis(path, store)
        signatures = Helpers(path, _helpers_for(path) if helpers is None else helpers)
        try:
            with _work_directory(resume) as work:
                check = _Verification(store, path, genesis, errors, signatures, progress or (lambda _: None), proof)
                return check.run(work / WORK_FILE_NAME, keep=resume is not None)
        finally:
            signatures.close()
    finally:
        store.close()


def _genesis(path: Path, store: Store) -> Genesis:
    try:
        genesis = Genesis.from_bytes(store.meta("genesis") or b"")
        charter_of(genesis)
    except (sqlite3.Error, ProtocolError, ValueError, TypeError) as error:
        raise LedgerError(path, f"its genesis cannot be read ({error}); restore the ledger from a copy") from error
    return genesis


def _certificate(file: Path, needed: bool) -> Certificate | None:
    """Raises LedgerError for a file that is none."""
    if not needed and not file.is_file():
        return None
    try:
        return Certificate.from_bytes(read_file(file, MAX_CERTIFICATE_BYTES))
    except (OSError, ProtocolError) as error:
        raise LedgerError(
            file, f"no certificate of a network: {reason_of(error)}; get one with `energy-broker ledger certify`"
        ) from error


def _helpers_for(path: Path) -> int:
    stored_bytes = sum(file.stat().st_size for file in path.glob(FILE_NAME + "*"))
    return min(len(os.sched_getaffinity(0)) - 1, MAX_HELPERS) if stored_bytes >= _HELP_FROM_BYTES else 0


@contextmanager
def _work_directory(resume: Path | None) -> Iterator[Path]:
    if resume is None:
        with tempfile.TemporaryDirectory(prefix="ledger-verify-") as scratch:
            yield Path(scratch)
        return
    resume.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(resume / "verify.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield resume
    except BlockingIOError:
        raise LedgerError(resume, "another verification works there; wait for it or give another directory") from None
    finally:
        os.close(descriptor)


class _Verification:
    """One verification: the replay, then the comparison."""

    def __init__(
        self,
        stored: Store,
        path: Path,
        genesis: Genesis,
        errors: list[str],
        helpers: Helpers,
        progress: Callable[[Progress], None],
        certificate: Certificate | None,
    ) -> None:
        self._stored = stored
        self._base_file = path / BASE_FILE_NAME
        self._certificate = certificate
        self._proven: Proven | None = None
        self._base: Manifest | None = None
        self._genesis = genesis
        self._errors = errors
        self._helpers = helpers
        self._progress = progress
        self._rows = 0

    def run(self, work: Path, keep: bool) -> VerifyReport:
        replay, resumed_height, started_over = None, 0, None
        try:
            with self._stored.snapshot():
                self._errors += [f"SQLite: {fault}" for fault in self._stored.integrity_faults()]
                self._proven = self._proven_by(self._certificate)
                base = self._stored.meta(BASE)
                if base is None and keep and work.exists():
                    try:
                        replay = Replay.resumed(self._genesis, work, self._stored, self._helpers)
                        resumed_height = replay.mark.head.height
                    except CannotResume as reason:
                        started_over = str(reason)
                if replay is None:
                    for file in work.parent.glob(work.name + "*"):
                        file.unlink()
                    if base is None:
                        replay = Replay.begun(self._genesis, work, keep, self._helpers)
                    else:
                        replay = self._begun_with_snapshot(base, work)
                replay.proven = self._proven
                self._check(replay)
        except HistoryFault as fault:
            self._errors.append(str(fault))
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            self._errors.append(f"SQLite cannot read on: {error}")
        finally:
            if replay is not None:
                replay.rows.close()
        mark = first_mark(self._genesis) if replay is None else replay.mark
        return VerifyReport(
            self._genesis.ledger,
            genesis_hash(self._genesis),
            mark.head.height,
            mark.head.block_id,
            mark.head.state_hash,
            mark.head.checkpoint().root,
            mark.batches,
            mark.operations,
            self._rows,
            tuple(self._errors[:MAX_ERRORS]),
            0 if self._base is None else self._base.head.height,
            0 if self._proven is None or self._errors else self._proven.height,
            resumed_height,
            started_over,
        )

    def _proven_by(self, certificate: Certificate | None) -> Proven | None:
        """Up to where a certificate proves the blocks, once the replay has checked it. Raises HistoryFault."""
        if certificate is None:
            return None
        height = self._stored.height_of_block(certificate.block_id)
        if height is None:
            raise HistoryFault(
                f"the network's certificate is of block {certificate.block_id.hex()}, which is not here: this copy was"
                " cut off, or is of another history"
            )
        try:
            sealers = read_sealers(self._stored)
        except (ProtocolError, ValueError, TypeError) as error:
            raise HistoryFault(f"meta {SEALERS}: {error}") from error
        return Proven(height, certificate, sealers)

    def _begun_with_snapshot(self, digest: bytes, work: Path) -> Replay:
        """Begin with the rows of the snapshot that the ledger was restored from. Raises HistoryFault, sqlite3.Error."""
        try:
            base = load_snapshot(self._base_file, work, {} if self._proven is None else self._proven.sealers)
        except LedgerError as error:
            raise HistoryFault(f"the snapshot that it began with: {error.reason}") from error
        if base.digest != digest or base.genesis != self._genesis:
            raise HistoryFault("the snapshot that it began with is another one than is on record")
        self._base = base
        replay = Replay.begun_at(self._genesis, Store.open(work, durable=False), base.head, self._helpers)
        # Of what was before the snapshot the file holds its last block and the peaks of the tree, and nothing else.
        self._compare("block", _by_height(self._stored, base.head), _by_height(replay.rows, base.head), str)
        end = nodes_in(base.head.tree_size)
        self._compare("Merkle nodes", iter(self._stored.node_rows(0, end)), iter(replay.rows.node_rows(0, end)), str)
        return replay

    def _check(self, replay: Replay) -> None:
        stored, derived = self._stored, replay.rows
        height = stored.height()
        replay.run(
            stored,
            lambda mark: self._progress(Progress(mark.head.height, height, mark.operations, 0)),
            self._complain,
        )
        meta = {"format": bytes((FORMAT,)), "genesis": self._genesis.to_bytes(), "head": replay.mark.head.to_bytes()}

        if self._base is not None:
            meta[BASE] = self._base.digest

        def rows_compared(count: int) -> None:
            self._rows += count
            self._progress(Progress(replay.mark.head.height, height, replay.mark.operations, self._rows))

        self._compare("state row", stored.state_rows(), derived.state_rows(), _show_key, rows_compared)
        self._compare("batch", stored.batch_rows(), derived.batch_rows(), lambda raw: raw.hex())
        # Nobody but a validator can make the signed head again, so it is checked instead of compared; and where the
        # network stands is for CometBFT to compare.
        own_meta = (row for row in stored.meta_rows() if row[0] not in (SIGNED_HEAD, NETWORK, SEALERS))
        self._compare("meta", own_meta, iter(sorted(meta.items())), str)
        self._check_signed_head(stored.meta(SIGNED_HEAD), replay.mark.head, derived)
        # A trigger, a view or another index would change what a reader sees without changing any row.
        self._compare("declaration", iter(stored.schema()), iter(derived.schema()), str)

    def _complain(self, fault: str) -> None:
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(fault)

    def _check_signed_head(self, raw: bytes | None, head: Head, derived: Store) -> None:
        """A validator's signatures of the head: only a copy that was made without a key may lack them."""
        if raw is None:
            return
        try:
            trust = self._trust_at_head(derived)
            signed = SignedHead.from_bytes(raw)
            checkpoint, _ = verify_checkpoint(signed.checkpoint, trust)
            verify_signed_root(signed.root, checkpoint.root, trust)
        except (ProtocolError, TypeError) as error:
            self._errors.append(f"meta {SIGNED_HEAD}: {error}")
            return
        if checkpoint != head.checkpoint():
            self._errors.append(f"meta {SIGNED_HEAD}: signs height {checkpoint.height}, another head than the stored")

    def _trust_at_head(self, derived: Store) -> Trust:
        """Who may have signed the head."""
        charter = charter_of(self._genesis)
        last = self._stored.last_block()
        if last is None:
            return Trust.of(charter.ledger, genesis_hash(self._genesis), validators_now(derived, charter), {})
        block = Block.from_payload(envelope.parse(last[2]).payload)
        trust = Trust.at_head(self._genesis, *sets_around(derived, charter, block))
        if self._proven is not None:
            trust = replace(trust, validators={**trust.validators, **self._proven.sealers_of(block.height)})
        return trust

    def _compare(
        self,
        what: str,
        stored: Iterator[tuple[Any, Any]],
        derived: Iterator[tuple[Any, Any]],
        show: Callable[[Any], str],
        report: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Two sequences of (key, value), ascending by key, must be the same."""
        while (part := list(islice(stored, _ROWS_AT_ONCE))) == (same := list(islice(derived, _ROWS_AT_ONCE))):
            if not part:
                return
            report(len(part))
        stored, derived = chain(part, stored), chain(same, derived)
        left, right = next(stored, None), next(derived, None)
        while len(self._errors) < MAX_ERRORS:
            if left is not None and (right is None or _ascending(left[0], right[0])):
                self._errors.append(f"{what} {show(left[0])}: stored, but no operation made it")
                left = next(stored, None)
            elif right is not None and (left is None or _ascending(right[0], left[0])):
                self._errors.append(f"{what} {show(right[0])}: missing")
                right = next(derived, None)
            elif left is not None and right is not None:
                if left[1] != right[1]:
                    self._errors.append(f"{what} {show(left[0])}: stored with another value")
                report(1)
                left, right = next(stored, None), next(derived, None)
            else:
                return


def _by_height(store: Store, head: Head) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
    """The stored blocks up to a head."""
    return ((height, (block_id, raw)) for height, block_id, raw in store.blocks(upto=head.height))


def _ascending(one: Any, other: Any) -> bool:
    """True if `one` comes before `other`. A damaged key may even be of another type; it is then out of place."""
    return bool(one < other) if type(one) is type(other) else type(one).__name__ < type(other).__name__


def _show_key(raw: Any) -> str:
    try:
        return str(decode_key(raw))
    except (ValueError, TypeError):
        return repr(raw)
