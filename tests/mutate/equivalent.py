"""Mutants that no test can find, because they behave like the original; each with the reason.

A name here that no longer stands for a mutant makes `test_mutants.py` fail, so the list cannot outlive its reasons.
"""

from typing import Final

RULES: Final = "broker/ledger/rules/"
EQUIVALENT: Final[dict[str, str]] = {
    RULES + "closing.py close edge: edge 1 of operation.end_s <= clock_s": (
        "the interval that ends at the clock is the one that set it, so it has a row and this is not its first close"
    ),
    RULES + "delivery.py deliver condition: asset.start_s != start_s of asset.start_s != start_s and (not same_w": (
        "the same interval is in every window; this only spares nearly all deliveries the call"
    ),
    RULES + "generation.py _checked condition: device is None of device is None or opened.sender != readi": (
        "a meter's key is written together with its device, so whoever signs for a device that is not there is another"
    ),
    RULES + "generation.py _cut_delivered return: if not left_wh": (
        "with nothing left to withdraw the loop would go on and cut 0 Wh from each further slice"
    ),
    RULES
    + "keys.py require_serving condition: retired_from_s is not None of retired_from_s is not None and grace_unt": (
        "a rotation writes both times together; the type checker asks for both"
    ),
    RULES
    + "keys.py require_serving condition: grace_until_s is not None of retired_from_s is not None and grace_unt": (
        "a rotation writes both times together; the type checker asks for both"
    ),
    RULES + "keys.py rotate_key condition: old is None of old is None or statement.old_key_id != c": (
        "a holder's current key is on record, so one that is not on record is not the current one"
    ),
    RULES + "keys.py revoke_key condition: row is None of row is None or not is_key_of(overlay, st": (
        "what is not on record is nobody's key either; the type checker asks for it"
    ),
    RULES + "transfer.py _require_mandate condition: device is None of device is None or device.owner != operat": (
        "the asset was found before, and there is no asset without its device"
    ),
    RULES + "validators.py changed_set condition: change.power of change.power and len(others) >= MAX_VALI": (
        "whoever takes a validator off a set of the largest size leaves fewer than that many others"
    ),
}
