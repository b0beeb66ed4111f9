"""A ledger's directory: one process holds it, and what it stores must agree with the genesis before it is used."""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from broker.ledger.chain import Head, block_id_of, first_head
from broker.ledger.merkle import node_position
from broker.ledger.opening import charter_of
from broker.ledger.store import FILE_NAME, FORMAT, LOCK_NAME, SEALERS, LedgerError, Store, other_format
from broker.ledger.validator_set import signers_ever
from broker.ledger.wal import log_fault
from broker.protocol import cbor, envelope
from broker.protocol.codec import Bytes, Many, Name, Row
from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.keys import public_key_from_cose
from broker.protocol.messages import Block, Genesis

_RESTORE: Final = "run `energy-broker ledger verify` on it and restore it from a copy"


def locked(path: Path) -> int:
    """Hold the directory for this process; returns the lock's descriptor. Raises LedgerError if another one has it.

    The lock goes with the process, so a killed one leaves nothing behind.
    """
    descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LedgerError(path, "in use by another process; stop that one first") from None
    return descriptor


def in_use(path: Path) -> bool:
    """True if a process holds the directory."""
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


def opened_store(path: Path, genesis: Genesis) -> Store:
    """The directory's file, made if it is not there yet.

    Raises sqlite3.Error, and LedgerError if SQLite would silently drop commits that other commits had followed.
    """
    file = path / FILE_NAME
    damage = log_fault(path)
    if damage is not None and damage.commits > 1:
        raise LedgerError(path, f"{damage.what} and committed blocks stand behind it; {_RESTORE}")
    if file.exists():
        store = Store.open(file)
        if store.has_schema():
            # What a commit that was cut off has left in the log must not stand behind the next one.
            store.empty_log()
            return store
        store.close()  # Killed while it was being made: nothing was in it yet.
    return Store.create(file, genesis.to_bytes(), first_head(genesis))


def checked_head(
    path: Path, store: Store, genesis: Genesis, sealers: Mapping[bytes, Signer] = MappingProxyType({})
) -> Head:
    """The stored head, once it agrees with genesis and last block.

    Somebody who was a validator at some time must have sealed that, or one of `sealers`. Raises LedgerError;
    `verify_ledger` checks all.
    """
    if store.meta("format") != bytes((FORMAT,)):
        raise LedgerError(path, other_format(store.meta("format")))
    if store.meta("genesis") != genesis.to_bytes():
        raise LedgerError(path, f"founded on another genesis than the given one of {genesis.ledger}; check the path")
    try:
        head = Head.from_bytes(store.meta("head") or b"")
        checkpoint = head.checkpoint()
        last = store.last_block()
        if last is None:
            if head != first_head(genesis):
                raise LedgerError(path, f"the head says height {head.height}, but there are no blocks; {_RESTORE}")
            return head
        height, block_id, raw = last
        signers = {**sealers, **signers_ever(store, charter_of(genesis))}
        opened = envelope.open_envelope(raw, genesis.ledger, signers.get)
    except (ProtocolError, ValueError) as error:
        raise LedgerError(path, f"the head does not hold: {error}; {_RESTORE}") from error
    block = opened.message
    if (
        not isinstance(block, Block)
        or (height, block_id, block_id_of(raw)) != (head.height, head.block_id, head.block_id)
        or (block.height, block.state_hash, block.tree_size, block.root)
        != (head.height, head.state_hash, head.tree_size, checkpoint.root)
    ):
        raise LedgerError(path, f"the head does not agree with block {height}; {_RESTORE}")
    _check_nodes(path, store, head)
    return head


def read_sealers(store: Store) -> dict[bytes, Signer]:
    """The keys, besides validators', under which this copy's node has sealed blocks. Raises MalformedMessage."""
    raw = store.meta(SEALERS)
    if raw is None:
        return {}
    named = Many(Row((Name(), Bytes(1, 256))), 1_024).decode(cbor.decode(raw, SEALERS, 2**20), SEALERS)
    signers = [Signer(name, public_key_from_cose(cose_key)) for name, cose_key in named]
    return {signer.key.key_id: signer for signer in signers}


def _check_nodes(path: Path, store: Store, head: Head) -> None:
    """The stored Merkle nodes must end in the head's peaks: proofs are made of them, and the tree grows on them."""
    first_leaf = 0
    for peak in head.peaks:
        level = (head.tree_size - first_leaf).bit_length() - 1
        try:
            stored = store.merkle_node(node_position(level, first_leaf >> level))
        except IndexError as error:
            raise LedgerError(path, f"{error}; {_RESTORE}") from error
        if stored != peak:
            raise LedgerError(path, f"the Merkle nodes up to leaf {first_leaf} are not the head's; {_RESTORE}")
        first_leaf += 1 << level
