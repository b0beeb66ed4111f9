"""Limits of the ledger's own queues and pages, each with its reason. Sizes on the wire stand in `protocol.limits`."""

from typing import Final

MAX_QUEUED_BATCHES: Final = 1_024
"""Batches that wait for the next commit. Beyond it the submitter is told to come again; it keeps its batch anyway."""

MAX_QUEUED_BYTES: Final = 64 * 2**20
"""The same queue in bytes, because batches differ in size by a factor of a thousand."""

MAX_BLOCK_BATCHES: Final = 1_024
"""What the Block message can carry."""

BLOCK_HEAD_BYTES: Final = 1_024
"""Room in a block for everything but its batches: header, hashes, signature and heads of byte strings."""

BATCH_HEAD_BYTES: Final = 5
"""The longest head of one batch's byte string inside a block."""

MAX_SLICES_OF_DELIVERY: Final = 1_024
"""Slices in one deliver operation; a demand that draws on more assets is split over several operations."""

MAX_HELD_SLICES: Final = 256
"""Held slices of one asset. Every move searches them, so an owner who shreds an asset must not slow everyone down."""

MAX_REVISION: Final = 63
"""Corrections of one device's interval. Each looks at the assets of all of them; a meter that needs more is broken."""

MAX_WITHDRAWN_SLICES: Final = 1_024
"""Delivered slices that one correction withdraws. What it leaves is carried to the device's next issues."""

MAX_SEARCHED_DELIVERIES: Final = 16_384
"""Deliveries from one asset among which a correction looks for the newest; where there are more, it is carried."""

MAX_SEARCHED_BY_BATCH: Final = 65_536
"""The same for all corrections of a batch together: a second or two. A broker splits what is over it."""

MAX_RETURNED_SLICES: Final = 4_096
"""Held slices of one asset that deliveries were returned to. More than MAX_HELD_SLICES, because one faulty converter
corrects all consumers of an asset at once, and a correction of consumption must not be refused for that."""

MAX_EXPIRED_ASSETS: Final = 4_096
"""Assets that one close expires, so that a broker which comes back after months does not stop everyone at once."""

CACHED_ROWS: Final = 16_384
"""State rows in each of two cache generations; about 15 MB in all. What is hot (assets, totals) is far fewer."""

MAX_HOLDINGS_ON_PAGE: Final = 4_096
"""What the Page message can carry; about 300 kB."""

MAX_BLOCKS_ON_PAGE: Final = 4_096
"""What the Page message can carry. Small blocks come to that before they come to its bytes."""

MAX_VIEWS: Final = 64
"""Heights at which holdings are being paged out, each with an open file and SQLite's two megabytes. Clients that begin
at one height share it. A client more gets no answer, asks again, and finds a place when another has its last page.
"""

MAX_VIEW_AGE: Final = 8_192
"""Blocks after which a view is dropped, because SQLite's log grows behind it: about a gigabyte at full speed. A client
that needs longer for its pages starts again.
"""

MAX_PENDING_BATCHES: Final = 1_024
"""Batches of a client without an answer. Beyond it the broker must wait, since it only fills the ledger's queue."""

MAX_WATCHED_HEIGHTS: Final = 1_024
"""Heights for which a client remembers what was signed, to compare it with what others were shown."""

MAX_WATCHED_BYTES: Final = 16 * 2**20
"""The same in bytes, since a block may have two million; the oldest are forgotten first."""

MAX_EARLY_BLOCKS: Final = 64
"""Blocks that a client keeps while it fetches the ones before them."""

RESEND_AFTER_S: Final = 2.0
"""After so long without an answer a client sends again. A commit takes milliseconds; a reconnect resends at once."""

MAX_INTRODUCTION_BYTES: Final = 4_096
"""A broker's first batch, with its own registration inside. It is decoded before anybody is known to have signed it."""

RESEND_TO_NEW_NODE_S: Final = 0.2
"""The same where a checkpoint shows that a node has come up which may have missed what was sent before."""

MAX_WAITING_QUERIES: Final = 64
"""Queries that wait until the engine has fetched their answer from elsewhere."""

MAX_CHANGES_ON_PAGE: Final = 1_024
"""Changes of validators in one answer; a ledger sees a few in a year."""

MAX_DEVICES_ASKED: Final = 16
"""Devices about which a client asks at a time; each question and answer is a signed message of its own."""

DEVICE_TIMEOUT_S: Final = 30.0
"""How long a client asks about a device: longer than a node needs to restart. A ledger node of an earlier version never
answers."""

MAX_PROOF_REQUESTS: Final = 64
"""Proofs that a client waits for at a time."""

PROOF_TIMEOUT_S: Final = 60.0
"""How long a client asks for a proof again and again: longer than a node needs to restart."""
