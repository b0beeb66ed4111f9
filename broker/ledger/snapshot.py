"""A ledger's state at one height as a file, and a ledger that goes on from it.

A snapshot holds what the rules and an engine need to go on: all state rows, the index of applied batches, the peaks of
the Merkle tree (in the head), the last block and the genesis. It does not hold the history: the blocks before, and the
Merkle nodes of their operations. So from a snapshot nothing can be verified or proven that happened before its height;
that takes a copy which has all blocks.

The same parts serve CometBFT's state sync: `metadata` is the manifest, and each chunk is below its limit of 16 MB.
Equal states give equal manifests and chunks on every node, since neither holds a signature.

File: MAGIC ‖ chunks one after the other ‖ tail ‖ SHA-256 of the tail ‖ its length (8 bytes, big-endian) ‖ MAGIC
Tail: CBOR [manifest, sealed last block, signed head or null], both as they are stored where the snapshot was taken.
Manifest: CBOR [1, genesis, head, rows digest, rows, batches, [[chunk's length, SHA-256] …]]
Chunk: CBOR [part, key, value, key, value …], a part after the other as in `Part`, keys ascending.

What restoring checks: every chunk's hash; that rows and keys are such; the rows digest; the books (`audit`); that the
last block is the one that the head names, has its state hash, tree size and root, and is sealed by a validator. What it
cannot check alone is that these rows are what the operations made, because the state hash is a chain over changes.
Compare the rows digest with one that a node with all blocks gives for this height; on CometBFT the validators sign it.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from broker.database_copy import flush_directory, flush_file, new_directory
from broker.ledger.audit import audit_store
from broker.ledger.chain import Head, block_id_of
from broker.ledger.merkle import peak_positions
from broker.ledger.opening import charter_of
from broker.ledger.receipts import SignedHead, verify_checkpoint, verify_signed_root
from broker.ledger.rows_digest import bucket_digests, rows_digest
from broker.ledger.state import ASSET, OWNED, AssetRow, decode_key, decode_row, table_bounds
from broker.ledger.store import FILE_NAME, SIGNED_HEAD, LedgerError, Store
from broker.ledger.trust import Trust
from broker.ledger.validator_set import sets_around
from broker.protocol import cbor, envelope
from broker.protocol.codec import Bytes, Many, Row, Unsigned
from broker.protocol.envelope import Signer
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.files import refused_by_system
from broker.protocol.limits import MAX_BLOCK_BYTES, MAX_BROKER_MESSAGE_BYTES
from broker.protocol.messages import HASH_BYTES, Block, Genesis

MAGIC: Final = b"dengen-snapshot\n"
BASE_FILE_NAME: Final = "base.snapshot"
"""The snapshot that a ledger directory began with. `ledger verify` begins there too."""

FORMAT: Final = 1
CHUNK_BYTES: Final = 8 * 2**20
"""A chunk is closed once it has so many bytes; the last item may go beyond, by a block at most."""

MAX_CHUNK_BYTES: Final = 16 * 10**6
"""CometBFT's limit of a chunk (https://docs.cometbft.com/v0.38/spec/p2p/legacy-docs/messages/state-sync)."""

MAX_CHUNKS: Final = 65_536
MAX_MANIFEST_BYTES: Final = 4 * 2**20
"""Room for so many chunks, half a terabyte; it is CometBFT's limit of a message with snapshots, too."""

MAX_TAIL_BYTES: Final = MAX_MANIFEST_BYTES + MAX_BLOCK_BYTES + MAX_BROKER_MESSAGE_BYTES

_LENGTH_BYTES: Final = 8
_HASH: Final = Bytes(HASH_BYTES, HASH_BYTES)
_MANIFEST: Final = Row(
    (
        Unsigned(),
        Bytes(1, MAX_BROKER_MESSAGE_BYTES),
        Bytes(1, 4_096),
        _HASH,
        Unsigned(),
        Unsigned(),
        Many(Row((Unsigned(maximum=MAX_CHUNK_BYTES), _HASH)), MAX_CHUNKS),
    )
)

Seal = Callable[[bytes, Trust], tuple[bytes, bytes | None]]
"""From the payload of the last block and the validators of its height: the sealed block, and the signed head if any."""


class SnapshotFault(Exception):
    """A snapshot that cannot be used. The text says why."""


class ChunkFault(SnapshotFault):
    """A chunk that is not the one that the manifest names; another copy of it may be."""


class Part(IntEnum):
    """What a chunk holds: state rows (key, row), applied batches (id, height), or the last block (height, payload)."""

    ROWS = 1
    BATCHES = 2
    BLOCK = 3


@dataclass(frozen=True, slots=True)
class ChunkName:
    """A chunk by length and hash."""

    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot holds and how each chunk is recognised."""

    genesis: Genesis
    head: Head
    rows_digest: bytes
    rows: int
    batches: int
    chunks: tuple[ChunkName, ...]

    @property
    def digest(self) -> bytes:
        """Names the snapshot: equal for equal ledgers."""
        return sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        return cbor.encode(
            [
                FORMAT,
                self.genesis.to_bytes(),
                self.head.to_bytes(),
                self.rows_digest,
                self.rows,
                self.batches,
                [[chunk.length, chunk.digest] for chunk in self.chunks],
            ]
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Manifest":
        """Raises SnapshotFault."""
        try:
            data = cbor.decode(raw, "snapshot manifest", MAX_MANIFEST_BYTES)
            if type(data) is not list or not data or data[0] != FORMAT:
                raise SnapshotFault(
                    f"it is no snapshot of format {FORMAT}, which alone this program reads; make it anew with"
                    " `energy-broker ledger snapshot` of this version"
                )
            _, genesis, head, digest, rows, batches, chunks = _MANIFEST.decode(data, "snapshot manifest")
            return cls(
                Genesis.from_bytes(genesis),
                Head.from_bytes(head),
                digest,
                rows,
                batches,
                tuple([ChunkName(length, chunk_digest) for length, chunk_digest in chunks]),
            )
        except (ProtocolError, ValueError) as error:
            raise SnapshotFault(f"its manifest does not hold: {error}") from error


# --- Making


def write_snapshot(store: Store, out: Path) -> Manifest:
    """Write a snapshot of the ledger that `store` shows to the new file `out`.

    The caller holds `store` in one read transaction. Raises SnapshotFault if there is nothing to take a snapshot of or
    `out` exists, OSError, sqlite3.Error; then `out` is not there.
    """
    genesis = Genesis.from_bytes(store.meta("genesis") or b"")
    head = Head.from_bytes(store.meta("head") or b"")
    last = store.last_block()
    if last is None:
        raise SnapshotFault("the ledger has no blocks yet; its genesis file is all there is to it")
    if out.exists():
        raise SnapshotFault(f"{out} exists already; give another name")
    unfinished = out.with_name(out.name + ".partial")
    counts = {Part.ROWS: 0, Part.BATCHES: 0}
    try:
        with unfinished.open("wb") as file:
            file.write(MAGIC)
            chunks = []
            for part, items in (
                (Part.ROWS, store.state_rows()),
                (Part.BATCHES, store.batch_rows()),
                (Part.BLOCK, iter([(head.height, envelope.parse(last[2]).payload)])),
            ):
                for count, chunk in _chunks(part, items):
                    file.write(chunk)
                    chunks.append(ChunkName(len(chunk), sha256(chunk).digest()))
                    if part in counts:
                        counts[part] += count
            digest = rows_digest(bucket_digests(store.state_rows()))
            manifest = Manifest(genesis, head, digest, counts[Part.ROWS], counts[Part.BATCHES], tuple(chunks))
            tail = cbor.encode([manifest.to_bytes(), last[2], store.meta(SIGNED_HEAD)])
            file.write(tail + sha256(tail).digest() + len(tail).to_bytes(_LENGTH_BYTES, "big") + MAGIC)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(out)
        flush_directory(out.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return manifest


def _chunks(part: Part, items: Iterable[tuple[Any, Any]]) -> Iterator[tuple[int, bytes]]:
    """(number of items, chunk) for these items; no chunk for none."""
    waiting: list[Any] = [int(part)]
    size = 0
    for key, value in items:
        waiting += (key, value)
        size += sum([len(item) + 5 if type(item) is bytes else 9 for item in (key, value)])
        if size >= CHUNK_BYTES:
            yield len(waiting) // 2, cbor.encode(waiting)
            waiting, size = [int(part)], 0
    if len(waiting) > 1:
        yield len(waiting) // 2, cbor.encode(waiting)


# --- Reading


class SnapshotFile:
    """An open snapshot file. Raises SnapshotFault if it is none, OSError."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb")
        try:
            self.manifest, self.sealed_block, self.signed_head = self._tail()
        except BaseException:
            self._file.close()
            raise
        self._offsets = [len(MAGIC)]
        for chunk in self.manifest.chunks:
            self._offsets.append(self._offsets[-1] + chunk.length)

    def close(self) -> None:
        self._file.close()

    def chunk(self, index: int) -> bytes:
        """A chunk as it stands in the file; `Restoring` checks it."""
        self._file.seek(self._offsets[index])
        return self._file.read(self.manifest.chunks[index].length)

    def _tail(self) -> tuple[Manifest, bytes, bytes | None]:
        end = self._file.seek(0, os.SEEK_END) - len(MAGIC) - _LENGTH_BYTES - HASH_BYTES
        self._file.seek(0)
        if self._file.read(len(MAGIC)) != MAGIC or end < len(MAGIC):
            raise SnapshotFault("it is no snapshot of a ledger")
        self._file.seek(end)
        digest, length = self._file.read(HASH_BYTES), int.from_bytes(self._file.read(_LENGTH_BYTES), "big")
        if self._file.read() != MAGIC or not 0 < length <= min(end - len(MAGIC), MAX_TAIL_BYTES):
            raise SnapshotFault("it is cut off; copy it again")
        self._file.seek(end - length)
        raw = self._file.read(length)
        if sha256(raw).digest() != digest:
            raise SnapshotFault("its end is damaged; copy it again")
        try:
            tail = cbor.decode(raw, "snapshot tail", MAX_TAIL_BYTES)
        except MalformedMessage as error:
            raise SnapshotFault(f"its end is none: {error}") from error
        if type(tail) is not list or [type(item) for item in tail[:2]] != [bytes, bytes] or len(tail) != 3:
            raise SnapshotFault("its end is none: expected [manifest, sealed block, signed head]")
        manifest, sealed_block, signed_head = tail
        if signed_head is not None and type(signed_head) is not bytes:
            raise SnapshotFault("its end is none: expected a signed head or null")
        return Manifest.from_bytes(manifest), sealed_block, signed_head


# --- Restoring


class Restoring:
    """Fills the new ledger file `file` from the chunks of `manifest`, one after the other.

    The file is no ledger until `finish`, which checks all of it: without its last block no engine opens it.
    """

    def __init__(self, manifest: Manifest, file: Path) -> None:
        self.manifest = manifest
        self._next = 0
        self._payload: bytes | None = None
        # Not durable: a file that was not finished is thrown away, and `finish` flushes it.
        self._store = Store.create(file, manifest.genesis.to_bytes(), manifest.head, durable=False)
        self._file = file

    def add(self, chunk: bytes) -> None:
        """The next chunk. Raises ChunkFault, and then nothing has changed; SnapshotFault if the snapshot is unsound."""
        if self._next >= len(self.manifest.chunks):
            raise ChunkFault(f"the snapshot has {len(self.manifest.chunks)} chunks only")
        named = self.manifest.chunks[self._next]
        if len(chunk) != named.length or sha256(chunk).digest() != named.digest:
            raise ChunkFault(f"chunk {self._next} is damaged; copy the snapshot again")
        try:
            part, *items = cbor.decode(chunk, f"chunk {self._next}", MAX_CHUNK_BYTES)
            pairs = list(zip(items[::2], items[1::2], strict=True))
            if part == Part.ROWS:
                for key, row in pairs:
                    decode_row(decode_key(key)[0], row)
                self._store.put_state(pairs)
            elif part == Part.BATCHES:
                self._store.put_batches(pairs)
            else:
                ((_, self._payload),) = pairs
        except (MalformedMessage, ValueError, TypeError, sqlite3.Error) as error:
            raise SnapshotFault(f"chunk {self._next} does not hold: {error}") from error
        self._next += 1

    def finish(self, seal: Seal) -> Head:
        """All chunks are there: check them together, and make the file a ledger.

        Raises SnapshotFault if anything does not fit; OSError.
        """
        head = self.manifest.head
        if self._next != len(self.manifest.chunks) or self._payload is None:
            raise SnapshotFault(f"only {self._next} of its {len(self.manifest.chunks)} chunks are there")
        try:
            _check_block(self._payload, head)
            nodes = list(zip(peak_positions(head.tree_size), head.peaks, strict=True))
            self._check_rows()
            sealed, signed_head = seal(self._payload, self._trust(self._payload))
            self._store.put_base(sorted(nodes), (head.height, head.block_id, sealed), signed_head, self.manifest.digest)
        except (ProtocolError, ValueError, TypeError, sqlite3.Error) as error:
            raise SnapshotFault(f"it does not hold: {error}") from error
        finally:
            self._store.close()
        flush_file(self._file)
        return head

    def abandon(self) -> None:
        """Close the file, which is no ledger."""
        self._store.close()

    def _trust(self, payload: bytes) -> Trust:
        """Who signs at that height."""
        genesis = self.manifest.genesis
        return Trust.at_head(genesis, *sets_around(self._store, charter_of(genesis), Block.from_payload(payload)))

    def _check_rows(self) -> None:
        if rows_digest(bucket_digests(self._store.state_rows())) != self.manifest.rows_digest:
            raise SnapshotFault("its rows are others than the rows digest stands for")
        if self._store.counts() != (self.manifest.rows, self.manifest.batches):
            raise SnapshotFault("it holds another number of rows or batches than it says")
        faults = audit_store(self._store).faults or tuple(_index_faults(self._store))
        if faults:
            raise SnapshotFault(f"its books do not balance: {faults[0]}")


def _index_faults(store: Store) -> Iterator[str]:
    """Every holder must stand in the index of holders, and nobody else: an engine finds holdings by it."""
    holders = 0
    for raw_key, raw in store.state_rows(*table_bounds(ASSET)):
        key, asset = decode_key(raw_key), decode_row(ASSET, raw)
        assert isinstance(asset, AssetRow)
        expected = [(OWNED, holder, *key[1:]) for holder in sorted({held.owner for held in asset.held})]
        holders += len(expected)
        yield from (
            f"{missing} is missing in the index" for missing, row in store.read(expected).items() if row is None
        )
    indexed = sum(1 for _ in store.state_rows(*table_bounds(OWNED)))
    if indexed != holders:
        yield f"the index of holders has {indexed} rows for {holders} holders"


def _check_block(payload: bytes, head: Head) -> None:
    block = Block.from_payload(payload)
    if sha256(payload).digest() != head.block_id:
        raise SnapshotFault("its last block is another one than its head names")
    checkpoint = head.checkpoint()
    if (block.height, block.state_hash, block.tree_size, block.root) != (
        head.height,
        head.state_hash,
        head.tree_size,
        checkpoint.root,
    ):
        raise SnapshotFault("its head does not agree with its last block")


# --- The embedded engine's files


def take_snapshot(path: Path, out: Path) -> Manifest:
    """A snapshot of the ledger in directory `path`, also while its engine runs. Raises LedgerError."""
    if not (path / FILE_NAME).is_file():
        raise LedgerError(path, f"holds no {FILE_NAME}; give the ledger's directory")
    try:
        store = Store.open_read_only(path / FILE_NAME)
        try:
            with store.snapshot():
                return write_snapshot(store, out)
        finally:
            store.close()
    except OSError as error:
        raise LedgerError(path, f"no snapshot can be taken: {refused_by_system(error)}") from error
    except SnapshotFault as error:
        raise LedgerError(path, f"no snapshot can be taken: {error}") from error
    except (ProtocolError, ValueError, sqlite3.Error) as error:
        raise LedgerError(
            path, f"no snapshot can be taken: {error}; run `energy-broker ledger verify` on the ledger"
        ) from error


def restore_snapshot(snapshot: Path, path: Path, expected_digest: bytes | None = None) -> Manifest:
    """Make the new ledger directory `path` from a snapshot file, which stays in it as BASE_FILE_NAME.

    `expected_digest` is the rows digest that somebody else has for that height. Raises LedgerError, CopyError; then
    nothing is left of the directory.
    """
    with new_directory(path) as directory:
        manifest = load_snapshot(snapshot, directory / FILE_NAME)
        if expected_digest is not None and manifest.rows_digest != expected_digest:
            raise LedgerError(
                snapshot,
                f"its rows digest is {manifest.rows_digest.hex()}, not the expected one; do not use this snapshot",
            )
        shutil.copyfile(snapshot, directory / BASE_FILE_NAME)
        flush_file(directory / BASE_FILE_NAME)
        return manifest


def load_snapshot(snapshot: Path, file: Path, sealers: Mapping[bytes, Signer] = MappingProxyType({})) -> Manifest:
    """Fill the new ledger file `file` from a snapshot file, with all checks. Raises LedgerError.

    `sealers` may have sealed its last block besides validators.
    """
    try:
        source = SnapshotFile(snapshot)
        try:
            restoring = Restoring(source.manifest, file)
            try:
                for index in range(len(source.manifest.chunks)):
                    restoring.add(source.chunk(index))
                restoring.finish(partial(_sealed_by_a_validator, source, sealers))
            finally:
                restoring.abandon()
        finally:
            source.close()
    except OSError as error:
        raise LedgerError(snapshot, f"cannot be restored: {refused_by_system(error)}") from error
    except (SnapshotFault, ProtocolError, sqlite3.Error) as error:
        raise LedgerError(
            snapshot, f"cannot be restored: {error}; give a file that `energy-broker ledger snapshot` wrote"
        ) from error
    return source.manifest


def _sealed_by_a_validator(
    source: SnapshotFile, sealers: Mapping[bytes, Signer], payload: bytes, trust: Trust
) -> tuple[bytes, bytes | None]:
    trust = replace(trust, validators={**trust.validators, **sealers})
    envelope.open_envelope(source.sealed_block, trust.ledger, trust.validators.get)
    if block_id_of(source.sealed_block) != sha256(payload).digest():
        raise SnapshotFault("its sealed block is another one than its last block")
    if source.signed_head is not None:
        signed = SignedHead.from_bytes(source.signed_head)
        checkpoint, _ = verify_checkpoint(signed.checkpoint, trust)
        # It names the genesis, too.
        verify_signed_root(signed.root, checkpoint.root, trust)
        if checkpoint != source.manifest.head.checkpoint():
            raise SnapshotFault("its checkpoint is signed for another head")
    return source.sealed_block, source.signed_head
