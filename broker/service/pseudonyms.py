"""How a consumer appears on the ledger: a pseudonym that changes every interval. Pure.

k_day = HMAC(secret, day), k_interval = HMAC(k_day, interval), pseudonym = HMAC(k_interval, meter key id), all
HMAC-SHA-256 (RFC 2104). The secret belongs to consumer and broker; disclosing one k_day opens one day and no other.
The demand itself stays off the ledger behind a commitment that is salted from the same interval key.
"""

import hmac
from hashlib import sha256
from typing import Final

from broker.protocol.messages import PSEUDONYM_BYTES

SECRET_BYTES: Final = 32
DAY_KEY_BYTES: Final = 32
DAY_S: Final = 86_400


def day_of(start_s: int) -> int:
    """The UTC day number of an interval."""
    return start_s // DAY_S


def day_key(secret: bytes, day: int) -> bytes:
    """k_day: opens all intervals of that UTC day."""
    return hmac.digest(secret, b"day" + day.to_bytes(8, "big"), "sha256")


def interval_key(k_day: bytes, start_s: int) -> bytes:
    """k_interval: opens one interval."""
    return hmac.digest(k_day, b"interval" + start_s.to_bytes(8, "big"), "sha256")


def pseudonym(k_interval: bytes, meter_key_id: bytes) -> bytes:
    """The 16-byte name under which the meter's demand of that interval stands on the ledger."""
    return hmac.digest(k_interval, b"pseudonym" + meter_key_id, "sha256")[:PSEUDONYM_BYTES]


def commitment(k_interval: bytes, signed_demand: bytes) -> bytes:
    """SHA-256 over a salt of the interval and the signed demand: binds the broker to the demand without showing it."""
    salt = hmac.digest(k_interval, b"commitment", "sha256")
    return sha256(salt + signed_demand).digest()
