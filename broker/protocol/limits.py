"""Every limit of the wire in one place, each with its reason. What is over its limit is refused before it is parsed."""

from typing import Final

MAX_INTEGER: Final = 2**53 - 1
"""Integers stay under 2^53, so that JSON and JavaScript readers of the same numbers cannot round them."""

MAX_NAME_CHARACTERS: Final = 63
"""A name is one level of a topic and one DNS label; 63 is the shorter of both limits."""

MAX_METER_MESSAGE_BYTES: Final = 1_024
"""A signed reading is about 130 bytes. Whatever a meter sends beyond this is not one of our messages."""

MAX_BROKER_MESSAGE_BYTES: Final = 65_536
"""Orders, answers, announcements and queries between brokers."""

MAX_BATCH_BYTES: Final = 524_288
"""One ledger batch; a broker splits what is larger."""

MAX_BATCH_OPERATIONS: Final = 4_096
"""Bounds the work of one all-or-nothing step."""

MAX_BLOCK_BYTES: Final = 2_097_152
"""One ledger block with its batches, and one page of blocks; mosquitto's message_size_limit must be at least this."""

CERTIFICATE_PART_BYTES: Final = 262_144
"""A certificate travels in parts of this size, so that a gateway holds little of it at a time."""

MAX_CERTIFICATE_PARTS: Final = 256
"""64 MB: more than a year of half hours has. What is longer is asked for in shorter periods."""

MAX_NESTING: Final = 16
"""Our deepest message nests six levels; a CBOR bomb nests thousands."""

MAX_REASON_CHARACTERS: Final = 400
"""A reason is a sentence for an operator, not a log."""

MAX_PATH_BROKERS: Final = 3
"""A request for energy passes through at most three brokers (no loops, bounded answer time)."""
