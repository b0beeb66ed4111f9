"""Runs in an environment of its own with `scitt-cose` (COSE Receipts by others): verifies receipts and Merkle proofs.

Reads one JSON list on standard input and writes one on standard output. A request is {"receipt", "operation", "pem"},
answered with "index size root" or "refused: " and why; or {"first", "second", "first_root", "second_root", "path"},
answered "consistent" or "refused". All values are hex; sizes are eight bytes, a path is its hashes in a row.
"""

import json
import sys

from scitt_cose import merkle, receipt


def answer(request: dict[str, str]) -> str:
    given = {name: bytes.fromhex(value) for name, value in request.items()}
    if "receipt" in given:
        result = receipt.verify_receipt(
            given["receipt"], leaf_entry_hex=given["operation"].hex(), log_public_key_pem=given["pem"]
        )
        if not result.ok:
            return f"refused: {'; '.join(result.errors)}"
        return f"{result.leaf_index} {result.tree_size} {result.root}"
    path = [given["path"][start : start + 32].hex() for start in range(0, len(given["path"]), 32)]
    holds = merkle.verify_consistency(
        given["first_root"].hex(),
        given["second_root"].hex(),
        int.from_bytes(given["first"], "big"),
        int.from_bytes(given["second"], "big"),
        path,
    )
    return "consistent" if holds else "refused"


if __name__ == "__main__":
    json.dump([answer(request) for request in json.load(sys.stdin)], sys.stdout)
