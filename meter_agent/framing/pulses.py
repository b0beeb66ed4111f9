"""Pulses of an S0 output: a count of edges as energy, and what is kept of it over a restart. Pure.

A meter's plate says how many pulses it gives for a kWh, so a pulse is a fraction of energy: the *count* is kept, and
turned into mWh as a whole, rounded down, so that no remainder is lost however odd the number. A pulse is 30 ms long at
least, and so is the pause behind it (EN 62053-31): edges closer than a debounce time are the contact's.

Nobody counts while nobody listens. So a count goes on only if the agent was away for a moment: it was stopped in good
order, the machine has not been restarted, and not more than LONGEST_GAP_S have passed. Else a new count starts, under
another serial number, by which the interval maker knows that what was before and what comes after do not connect:
the interval in between is missing, and not wrong.
"""

import json
from dataclasses import dataclass
from typing import Final

LONGEST_GAP_S: Final = 30
"""How long a restart may take for the count to go on; pulses of that time are not counted."""

MAX_STATE_BYTES: Final = 512

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class PulseCount:
    """A count since it was begun. `serial_number` is its name."""

    serial_number: str
    pulses: int


@dataclass(frozen=True, slots=True)
class StoredCount:
    """A count as it was put down: `boot` is the machine's start, `boot_time_s` the seconds since then."""

    count: PulseCount
    boot: str
    boot_time_s: float
    pulses_per_kwh: int


def energy_mwh(pulses: int, pulses_per_kwh: int) -> int:
    """All pulses as mWh, rounded down."""
    return pulses * 1_000_000 // pulses_per_kwh


def encode_state(stored: StoredCount) -> bytes:
    """The contents of a state file."""
    fields = {
        "version": _VERSION,
        "serial_number": stored.count.serial_number,
        "pulses": stored.count.pulses,
        "boot": stored.boot,
        "boot_time_s": stored.boot_time_s,
        "pulses_per_kwh": stored.pulses_per_kwh,
    }
    return json.dumps(fields).encode("ascii") + b"\n"


def decode_state(raw: bytes) -> StoredCount | None:
    """What was stored; None for anything that `encode_state` did not make."""
    try:
        fields = json.loads(raw[:MAX_STATE_BYTES])
    except ValueError:
        return None
    match fields:
        case {
            "version": 1,
            "serial_number": str() as serial_number,
            "pulses": int() as pulses,
            "boot": str() as boot,
            "boot_time_s": int() | float() as boot_time_s,
            "pulses_per_kwh": int() as pulses_per_kwh,
        } if pulses >= 0:
            return StoredCount(PulseCount(serial_number, pulses), boot, boot_time_s, pulses_per_kwh)
    return None


def resumed(stored: StoredCount | None, boot: str, boot_time_s: float, pulses_per_kwh: int) -> PulseCount | None:
    """The count to go on with, or None if a new one must start."""
    if stored is None or stored.boot != boot or stored.pulses_per_kwh != pulses_per_kwh:
        return None
    return stored.count if 0 <= boot_time_s - stored.boot_time_s <= LONGEST_GAP_S else None
