"""Snapshots of a node for others, and a new node's start from one of theirs: CometBFT's state sync.

A snapshot is the file of `ledger.snapshot`, named by the height of CometBFT at which it was taken: its manifest is the
metadata, its chunks are the chunks. Nobody who offers one is believed: block id and rows digest in the manifest must
give the app hash that CometBFT's light client has verified for that height, the rows must give the rows digest, and
each chunk must have the hash that the manifest names.
"""

import logging
import os
import sqlite3
import threading
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Final

from broker.database_copy import flush_directory
from broker.ledger.chain import block_id_of
from broker.ledger.cometbft import abci
from broker.ledger.rows_digest import app_hash_of
from broker.ledger.snapshot import (
    BASE_FILE_NAME,
    FORMAT,
    ChunkFault,
    Manifest,
    Restoring,
    Seal,
    SnapshotFault,
    SnapshotFile,
    write_snapshot,
)
from broker.ledger.store import FILE_NAME, LedgerError, Store
from broker.protocol.messages import Genesis

LOG: Final = logging.getLogger("ledger-node")

KEPT_SNAPSHOTS: Final = 2
"""So that one that others are fetching does not go while the next is being written."""

FOLDER_NAME: Final = "snapshots"
_SUFFIX: Final = ".snapshot"
_RESTORED_NAME: Final = "state-sync.sqlite3"


class SnapshotShelf:
    """The snapshots of the ledger in directory `path`; one thread writes the next one beside the node's work."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path / FOLDER_NAME
        self._open: dict[int, SnapshotFile] = {}
        self._writing: threading.Thread | None = None
        self._altered: str | None = None
        self._folder.mkdir(exist_ok=True)
        for left_over in self._folder.glob("*.partial"):
            left_over.unlink()

    def close(self) -> None:
        """Wait for a snapshot that is being written, and close all."""
        self.wait()
        for file in self._open.values():
            file.close()

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._writing is not None:
            self._writing.join()

    def check(self) -> None:
        """Raises LedgerError if the last snapshot has shown that rows were altered on this node's disk."""
        if self._altered is not None:
            raise LedgerError(self._path, self._altered)

    def take(self, network_height: int, rows_digest: bytes) -> None:
        """Begin a snapshot of what is committed now, whose rows have this digest.

        Returns once its moment is fixed. One that is still being written is not disturbed; this one is left out then.
        """
        if self._writing is not None and self._writing.is_alive():
            LOG.warning("no snapshot at %d: the last one is still being written", network_height)
            return
        begun = threading.Event()
        self._writing = threading.Thread(target=self._write, args=(network_height, rows_digest, begun))
        self._writing.start()
        begun.wait()

    def listed(self) -> tuple[abci.Snapshot, ...]:
        """What others may fetch, the newest first."""
        heights = self._heights()
        for height in [height for height in self._open if height not in heights]:
            self._open.pop(height).close()
        found = []
        for height in reversed(heights):
            file = self._file(height)
            if file is not None:
                manifest = file.manifest
                found.append(abci.Snapshot(height, FORMAT, len(manifest.chunks), manifest.digest, manifest.to_bytes()))
        return tuple(found)

    def chunk(self, height: int, file_format: int, index: int) -> bytes:
        """One chunk, empty if it is not there any more."""
        file = self._file(height) if file_format == FORMAT else None
        return file.chunk(index) if file is not None and index < len(file.manifest.chunks) else b""

    def _heights(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*" + _SUFFIX))

    def _name(self, height: int) -> Path:
        return self._folder / f"{height}{_SUFFIX}"

    def _file(self, height: int) -> SnapshotFile | None:
        if height not in self._open:
            try:
                self._open[height] = SnapshotFile(self._name(height))
            except (SnapshotFault, OSError) as error:
                LOG.warning("snapshot %d cannot be given to others: %s", height, error)
                return None
        return self._open[height]

    def _write(self, network_height: int, rows_digest: bytes, begun: threading.Event) -> None:
        try:
            self._name(network_height).unlink(missing_ok=True)  # from before a crash; perhaps not whole
            with closing(Store.open_read_only(self._path / FILE_NAME)) as store, store.snapshot():
                store.meta("head")  # The first read fixes the moment.
                begun.set()
                manifest = write_snapshot(store, self._name(network_height))
        except (SnapshotFault, sqlite3.Error, OSError) as error:
            LOG.warning("no snapshot at %d: %s", network_height, error)
            return
        finally:
            begun.set()
        if manifest.rows_digest != rows_digest:
            self._name(network_height).unlink()
            self._altered = (
                f"its rows at block {network_height} of the network are others than those that were written; the disk"
                " is damaged, or somebody changed the file: restore this node from another one's snapshot"
            )
            return
        for height in self._heights()[:-KEPT_SNAPSHOTS]:
            self._name(height).unlink()


class StateSync:
    """A new node's ledger while it is being filled from one snapshot. Raises SnapshotFault for one that is unsound."""

    def __init__(self, path: Path, genesis: Genesis, snapshot: abci.Snapshot, app_hash: bytes) -> None:
        manifest = Manifest.from_bytes(snapshot.metadata)
        if manifest.genesis != genesis:
            raise SnapshotFault("it belongs to another ledger")
        if app_hash_of(manifest.head.block_id, manifest.rows_digest) != app_hash:
            raise SnapshotFault("it is not what the validators have signed for its height")
        if len(manifest.chunks) != snapshot.chunks:
            raise SnapshotFault("it has another number of chunks than was said")
        self.manifest = manifest
        self.network_height = snapshot.height
        self._path = path
        self._next = 0
        remove_left_over(path)
        self._restoring = Restoring(manifest, path / _RESTORED_NAME)

    def abandon(self) -> None:
        """Throw away what has come."""
        self._restoring.abandon()
        remove_left_over(self._path)

    def add(self, request: abci.ApplySnapshotChunkRequest) -> abci.ApplySnapshotChunkResponse:
        """Take in the next chunk, and say what CometBFT is to do."""
        if request.index != self._next:
            return abci.ApplySnapshotChunkResponse(abci.ChunkResult.RETRY_SNAPSHOT)
        try:
            self._restoring.add(request.chunk)
        except ChunkFault as fault:
            LOG.warning("chunk %d of %s is refused: %s", request.index, request.sender, fault)
            return abci.ApplySnapshotChunkResponse(abci.ChunkResult.RETRY, (request.index,), (request.sender,))
        self._next += 1
        return abci.ApplySnapshotChunkResponse(abci.ChunkResult.ACCEPT)

    @property
    def complete(self) -> bool:
        """True once all chunks are there."""
        return self._next == len(self.manifest.chunks)

    def finish(self, seal: Seal, notes: dict[str, bytes]) -> None:
        """Check the whole and put it in the place of the empty ledger, whose store must be closed.

        Raises SnapshotFault, and then the empty ledger is still there; sqlite3.Error, OSError.
        """
        restored = self._path / _RESTORED_NAME
        head = self._restoring.finish(seal)
        with closing(Store.open(restored)) as store:
            store.write({}, {}, [], [], head, [], notes)
            base = self._path / BASE_FILE_NAME
            base.unlink(missing_ok=True)
            with store.snapshot():
                write_snapshot(store, base)
        os.replace(restored, self._path / FILE_NAME)
        flush_directory(self._path)


def sealed_last_block(payload: bytes, sealed: bytes) -> bytes:
    """The block as this node seals it. Raises SnapshotFault if that is another block than `payload`."""
    if block_id_of(sealed) != sha256(payload).digest():
        raise SnapshotFault("its last block is not written as blocks are")
    return sealed


def remove_left_over(path: Path) -> None:
    """Remove what a state sync that did not come to its end has left in directory `path`."""
    for left_over in path.glob(_RESTORED_NAME + "*"):
        left_over.unlink()
