"""Why the ledger refuses: the closed set of faults, and the errors that carry them."""

from enum import StrEnum

from broker.ledger.state import Key
from broker.protocol.limits import MAX_REASON_CHARACTERS


class Fault(StrEnum):
    """Why a batch is refused. Each is raised by exactly one guard."""

    MALFORMED = "malformed"
    NOT_REGISTERED = "not_registered"
    NOT_A_BROKER = "not_a_broker"
    EXPIRED = "expired"
    ALREADY_APPLIED = "already_applied"
    STATEMENT = "statement"
    NAME_TAKEN = "name_taken"
    KEY_TAKEN = "key_taken"
    REGISTRAR_AS_PARTY = "registrar_as_party"
    DEVICE_TAKEN = "device_taken"
    KEY_RETIRED = "key_retired"
    ROTATION_OF_OLD_KEY = "rotation_of_old_key"
    ROTATION_SIGNER = "rotation_signer"
    ROTATION_TIMES = "rotation_times"
    REVOCATION_KEY = "revocation_key"
    REVOCATION_SIGNER = "revocation_signer"
    VALIDATOR_STATEMENTS = "validator_statements"
    VALIDATOR_MAJORITY = "validator_majority"
    VALIDATOR_SEQUENCE = "validator_sequence"
    VALIDATOR_KEY = "validator_key"
    VALIDATOR_KEY_TAKEN = "validator_key_taken"
    UNKNOWN_VALIDATOR = "unknown_validator"
    LAST_VALIDATOR = "last_validator"
    TOO_MANY_VALIDATORS = "too_many_validators"
    VALIDATOR_THIRD = "validator_third"
    UNKNOWN_OWNER = "unknown_owner"
    UNKNOWN_AREA = "unknown_area"
    UNKNOWN_DEVICE = "unknown_device"
    NOT_THE_OWNER = "not_the_owner"
    MANDATE_BROKER = "mandate_broker"
    MANDATE_BOUNDARY = "mandate_boundary"
    MANDATE_EXCLUSIVE = "mandate_exclusive"
    NO_MANDATE = "no_mandate"
    MANDATE_ENDED = "mandate_ended"
    MANDATE_PAST = "mandate_past"
    CARRIER = "carrier"
    READING_INTERVAL = "reading_interval"
    NOT_COMMISSIONED = "not_commissioned"
    REVISION = "revision"
    CORRECTION_REVISION = "correction_revision"
    TOO_MANY_REVISIONS = "too_many_revisions"
    TOO_MUCH_SEARCHED = "too_much_searched"
    QUALITY = "quality"
    NOTHING_TO_ISSUE = "nothing_to_issue"
    ABOVE_CAPACITY = "above_capacity"
    ISSUED_BEFORE = "issued_before"
    UNKNOWN_ASSET = "unknown_asset"
    EMPTY_SLICE = "empty_slice"
    NOT_HELD = "not_held"
    TOO_MANY_SLICES = "too_many_slices"
    ASSET_EXPIRED = "asset_expired"
    NOT_MANDATED = "not_mandated"
    MANDATE_TAKES_ONLY = "mandate_takes_only"
    UNKNOWN_RECEIVER = "unknown_receiver"
    TO_ITSELF = "to_itself"
    ORDER_MISSING = "order_missing"
    ORDER_NOT_NEEDED = "order_not_needed"
    ORDER_STATEMENT = "order_statement"
    ORDER_REQUESTER = "order_requester"
    ORDER_SUPPLIER = "order_supplier"
    ORDER_PATH = "order_path"
    ORDER_LOOP = "order_loop"
    ORDER_PARENT = "order_parent"
    ORDER_BROKER = "order_broker"
    ORDER_SOURCE = "order_source"
    ORDER_INTERVAL = "order_interval"
    ORDER_PRICE = "order_price"
    ORDER_EXPIRED = "order_expired"
    ORDER_CLOSED = "order_closed"
    ORDER_CONTENT = "order_content"
    ORDER_VOID = "order_void"
    ORDER_EXCEEDED = "order_exceeded"
    DEMAND_INTERVAL = "demand_interval"
    DEMAND_AREA = "demand_area"
    DEMAND_BROKER = "demand_broker"
    DEMAND_CHANGED = "demand_changed"
    OUTSIDE_WINDOW = "outside_window"
    OUTSIDE_AREA = "outside_area"
    DEMAND_EXCEEDED = "demand_exceeded"
    UNKNOWN_DEMAND = "unknown_demand"
    DEMAND_REVISION = "demand_revision"
    DEMAND_SETTLED = "demand_settled"
    RETURNED_AMOUNT = "returned_amount"
    RETURNED_SLICE = "returned_slice"
    TOO_MANY_RETURNED = "too_many_returned"
    CLOSE_INTERVAL = "close_interval"
    CLOSE_ORDER = "close_order"
    CLOSE_REVISION = "close_revision"
    CLOSE_LOWERED = "close_lowered"


class RuleViolation(Exception):
    """A batch that the rules refuse. `operation_index` is None where the batch as a whole is at fault."""

    def __init__(self, operation_index: int | None, code: Fault, reason: str) -> None:
        where = "batch" if operation_index is None else f"operation {operation_index}"
        super().__init__(f"{where} refused, {code}: {reason}")
        self.operation_index = operation_index
        self.code = code
        self.reason = reason[:MAX_REASON_CHARACTERS]


class LedgerInvariantBroken(Exception):
    """The books do not balance: a fault of this program, never of its input. The ledger must stop here."""

    def __init__(self, key: Key, row: object) -> None:
        super().__init__(f"the ledger's books do not balance at {key}: {row}; stop this node and report the fault")
        self.key = key
