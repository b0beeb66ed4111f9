"""The Merkle tree of RFC 9162 (section 2.1) with SHA-256, over the ledger's operations in the order applied.

`Frontier` grows the tree and keeps only the roots of its full subtrees, so appending and the root cost O(log n) and
nothing is kept of the past. Proofs are made from the list of leaf hashes and checked without it.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Final

EMPTY_ROOT: Final = sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """HASH(0x00 ‖ data)."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """HASH(0x01 ‖ left ‖ right)."""
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """A growing tree: its size and the roots (`peaks`) of its full subtrees, the largest first."""

    __slots__ = ("peaks", "size")

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self.peaks = list(peaks)
        if len(self.peaks) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} full subtrees, got {len(self.peaks)}")

    def append(self, data: bytes) -> None:
        """Add one leaf with this data."""
        digest = leaf_hash(data)
        below = self.size
        # Each one-bit at the low end of the size is a full subtree as large as what was just made: they join.
        while below & 1:
            digest = node_hash(self.peaks.pop(), digest)
            below >>= 1
        self.peaks.append(digest)
        self.size += 1

    def root(self) -> bytes:
        """The root over all leaves so far."""
        if not self.peaks:
            return EMPTY_ROOT
        digest = self.peaks[-1]
        for peak in reversed(self.peaks[:-1]):
            digest = node_hash(peak, digest)
        return digest

    def copy(self) -> "Frontier":
        return Frontier(self.size, self.peaks)


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root over these leaf hashes."""
    if not leaves:
        return EMPTY_ROOT
    level = list(leaves)
    # Joining neighbours level by level, the odd one carried up, gives the same tree as splitting at powers of two.
    while len(level) > 1:
        joined = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            joined.append(level[-1])
        level = joined
    return level[0]


def inclusion_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The path from leaf `index` to the root over these leaf hashes (section 2.1.3.1). Raises IndexError."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} is not in a tree of {len(leaves)} leaves")
    path: list[bytes] = []
    low, high = 0, len(leaves)
    while high - low > 1:
        middle = low + (1 << (high - low - 1).bit_length() - 1)
        if index < middle:
            path.append(root_of(leaves[middle:high]))
            high = middle
        else:
            path.append(root_of(leaves[low:middle]))
            low = middle
    path.reverse()
    return path


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """True if `path` proves that the leaf hash `leaf` stands at `index` in the tree of `size` leaves with this root.

    The algorithm of section 2.1.3.2.
    """
    if not 0 <= index < size:
        return False
    node, last = index, size - 1
    digest = leaf
    for sibling in path:
        if last == 0:
            return False
        if node & 1 or node == last:
            digest = node_hash(sibling, digest)
            # A node at the right edge without a sibling moves up unchanged until it is a right child.
            while not node & 1 and node:
                node >>= 1
                last >>= 1
        else:
            digest = node_hash(digest, sibling)
        node >>= 1
        last >>= 1
    return last == 0 and digest == root
