"""Makes proofs from a ledger file, in O(log n) reads each. Every engine and `energy-broker ledger prove` use it.

No key is needed: the stored head carries a validator's signatures, which serve all proofs under it.
"""

from collections.abc import Iterable, Iterator

from broker.ledger.chain import Head
from broker.ledger.limits import MAX_CHANGES_ON_PAGE
from broker.ledger.merkle import consistency_proof, hashes_from, inclusion_proof, multiproof
from broker.ledger.opening import party_signer
from broker.ledger.proofs import MAX_OPERATIONS, MAX_PROOF_BYTES, ConsistencyProof, OperationsProof, ProvenOperation
from broker.ledger.receipts import ProofFailed, SignedHead, consistency_receipt, inclusion_receipt
from broker.ledger.store import SIGNED_HEAD, Store
from broker.ledger.validator_set import changes_since
from broker.protocol import envelope
from broker.protocol.messages import Batch, Block, Checkpoint, QueryKind


class Prover:
    """Proofs under the head of `store`, as of the moment it is made; make another one after a commit.

    Raises ProofFailed where that head carries no signature. Damage in the file shows as IndexError, ValueError or
    MalformedMessage, or as a proof that does not check: `prove` checks what it made.
    """

    def __init__(self, store: Store, ledger: str) -> None:
        self._store = store
        self._ledger = ledger
        self._head = Head.from_bytes(store.meta("head") or b"")
        signed = store.meta(SIGNED_HEAD)
        if signed is None:
            raise ProofFailed(
                "the head is not signed here: no commit was made yet, or this copy was made without a validator's key; "
                "prove on a validator's copy"
            )
        self._signed = SignedHead.from_bytes(signed)
        self._hash_of = hashes_from(store.merkle_node)
        self._sizes: dict[int, int] = {}

    @property
    def checkpoint(self) -> bytes:
        """The sealed Checkpoint that the proofs end in."""
        return self._signed.checkpoint

    def operations(self, indices: Iterable[int]) -> OperationsProof:
        """The proof of these operations, by their indices among all. Raises ProofFailed for one that is not there."""
        wanted = sorted(set(indices))
        size = self._head.tree_size
        if not wanted or len(wanted) > MAX_OPERATIONS:
            raise ProofFailed(f"a proof is of 1 to {MAX_OPERATIONS} operations, not of {len(wanted)}")
        if wanted[0] < 0 or wanted[-1] >= size:
            raise ProofFailed(f"there are {size} operations on the ledger, counted from 0; {wanted[-1]} is not one")
        receipt = None
        if len(wanted) == 1:
            path = inclusion_proof(wanted[0], size, self._hash_of)
            receipt = inclusion_receipt(self._signed.root, wanted[0], size, path)
        return OperationsProof(
            self._ledger,
            tuple(ProvenOperation(index, raw) for index, raw in self._operations_at(wanted)),
            tuple(multiproof(wanted, size, self._hash_of)),
            self._signed.checkpoint,
            self._signed.root,
            receipt,
        )

    @property
    def signed_head(self) -> SignedHead:
        """The head that the proofs end in, with its signatures."""
        return self._signed

    def multiproof(self, indices: Iterable[int]) -> list[bytes]:
        """The hashes which lead from any number of operations to the head (`merkle.multiproof`)."""
        return multiproof(indices, self._head.tree_size, self._hash_of)

    def consistency(self, first_size: int) -> bytes:
        """The receipt that the tree of `first_size` operations begins the head's. Raises ProofFailed."""
        size = self._head.tree_size
        if not 0 < first_size <= size:
            raise ProofFailed(f"the ledger holds {size} operations: ask for the time when it held 1 to {size}")
        return consistency_receipt(
            self._signed.root, first_size, size, consistency_proof(first_size, size, self._hash_of)
        )

    def consistency_with(self, older: bytes) -> ConsistencyProof:
        """The proof that the head goes on from a sealed checkpoint. Raises ProofFailed or MalformedMessage."""
        checkpoint = Checkpoint.from_payload(envelope.parse(older).payload)
        return ConsistencyProof(self._ledger, older, self._signed.checkpoint, self.consistency(checkpoint.tree_size))

    def index_of(self, height: int, number: int) -> int:
        """The index among all of operation `number`, counted from 0, of block `height`. Raises ProofFailed."""
        first, end = self._span(height)
        if not 0 <= number < end - first:
            raise ProofFailed(f"block {height} holds {end - first} operations, counted from 0; {number} is not one")
        return first + number

    def indices_of_batch(self, batch_id: bytes) -> range:
        """The indices of all operations of a batch. Raises ProofFailed for one that is not on the ledger."""
        height = self._store.height_of(batch_id)
        if height is not None:
            first, _ = self._span(height)
            for raw in self._block(height).batches:
                parsed = envelope.parse(raw)
                operations = len(Batch.from_payload(parsed.payload).operations)
                sender = party_signer(self._store, parsed.key_id)
                if sender is not None and envelope.message_id(parsed, self._ledger, sender.name) == batch_id:
                    return range(first, first + operations)
                first += operations
        raise ProofFailed(f"no batch {batch_id.hex()} stands on the ledger")

    # --- inside

    def _block(self, height: int) -> Block:
        raw = self._store.block(height)
        if raw is None:
            raise ProofFailed(f"block {height} is not stored here; the ledger is at height {self._head.height}")
        return Block.from_payload(envelope.parse(raw).payload)

    def _span(self, height: int) -> tuple[int, int]:
        """The indices `[first, end)` of a block's operations."""
        block = self._block(height)
        operations = sum(len(Batch.from_payload(envelope.parse(raw).payload).operations) for raw in block.batches)
        return block.tree_size - operations, block.tree_size

    def _height_of(self, index: int) -> int:
        """The block that holds the operation at `index`: the first whose tree is larger."""
        low, high = 1, self._head.height
        while low < high:
            middle = (low + high) // 2
            if middle not in self._sizes:
                self._sizes[middle] = self._block(middle).tree_size
            if self._sizes[middle] > index:
                high = middle
            else:
                low = middle + 1
        return low

    def _operations_at(self, indices: list[int]) -> Iterator[tuple[int, bytes]]:
        """(index, bytes) of operations by ascending index; each block is read once."""
        first, end = 0, 0
        operations: list[bytes] = []
        for index in indices:
            if index >= end:
                height = self._height_of(index)
                block = self._block(height)
                operations = [
                    operation
                    for raw in block.batches
                    for operation in Batch.from_payload(envelope.parse(raw).payload).operations
                ]
                first, end = block.tree_size - len(operations), block.tree_size
            if not first <= index < end:
                raise ProofFailed(f"operation {index} is not where block sizes say; verify this copy of the ledger")
            yield index, operations[index - first]


def _first_of(changes: Iterator[bytes]) -> tuple[bytes, ...]:
    """As many as fit a page; who asked goes on from there."""
    found: list[bytes] = []
    size = 0
    for raw in changes:
        size += len(raw)
        if found and (size > MAX_PROOF_BYTES // 2 or len(found) == MAX_CHANGES_ON_PAGE):
            break
        found.append(raw)
    return tuple(found)


def prove(store: Store, ledger: str, kind: QueryKind, place: int) -> tuple[bytes, ...]:
    """What a party that asks over MQTT is given, as the entries of a page. Raises ProofFailed where there is no proof.

    OPERATION: the OperationsProof of the operation at `place`. CONSISTENCY: the sealed checkpoint of the head, and the
    receipt that it goes on from the tree of `place` operations. VALIDATORS: the changes after the sequence `place`.
    """
    if kind is QueryKind.VALIDATORS:
        return _first_of(changes_since(store, place))
    prover = Prover(store, ledger)
    if kind is QueryKind.OPERATION:
        return (prover.operations([place]).to_bytes(),)
    return prover.checkpoint, prover.consistency(place)
