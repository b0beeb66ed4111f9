"""Mutants that no test can find, because they behave like the original; each with the reason.

A name here that no longer stands for a mutant makes `test_mutants.py` fail, so the list cannot outlive its reasons.
"""

from typing import Final

EQUIVALENT: Final[dict[str, str]] = {
    "broker/ledger/rules/closing.py close edge: the edge of operation.end_s <= clock_s": (
        "the interval that ends at the clock is the one that set it, so it has a row and this is not its first close"
    ),
    "broker/ledger/rules/delivery.py deliver condition: asset.start_s != start_s": (
        "the same interval is in every window; this only spares nearly all deliveries the call"
    ),
    "broker/ledger/rules/generation.py _checked condition: device is None": (
        "a meter's key is written together with its device, so whoever signs for a device that is not there is another"
    ),
}
