"""Follows a ledger's validators without its state: from a trusted set on, by what the registrars signed. Pure.

A change counts where more than half of the registrars signed it for exactly the set before (`sequence`) and the rules
allow it. So changes carry their own authority: whoever hands them over can leave out the newest ones and nothing else.
Against that helps a newer trust file, or anybody who has seen the ledger since.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from broker.ledger.opening import Charter
from broker.ledger.operations import OperationCode, SetValidator, decode_operation, encode_operation, operation_code
from broker.ledger.receipts import ProofFailed
from broker.ledger.rules.step import Refused
from broker.ledger.rules.validators import changed_set, first_set, signers_of
from broker.ledger.state import VALIDATOR_CHANGES, State, ValidatorChangeRow, ValidatorsRow
from broker.protocol import envelope
from broker.protocol.envelope import Signer
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import Batch, Block, ValidatorChange

_HEAD: Final = bytes((0x82, OperationCode.SET_VALIDATOR))
"""How every encoded set_validator operation begins."""


def sets_after(
    now: ValidatorsRow, operations: Iterable[bytes], ledger: str, registrars: Mapping[bytes, Signer]
) -> list[ValidatorsRow]:
    """The sets that these encoded set_validator operations lead to, one after the other from `now` on.

    Operations that `now` has taken in already are passed over; a gap or anything unsound raises ProofFailed,
    MalformedMessage, UnknownKey or BadSignature.
    """
    found: list[ValidatorsRow] = []
    for raw in operations:
        operation = decode_operation(raw)
        if not isinstance(operation, SetValidator):
            raise MalformedMessage("change of validators", "a set_validator operation")
        statements = [_statement(sealed, ledger, registrars) for sealed in operation.statements]
        if statements[0][0].sequence <= now.sequence:
            continue
        try:
            now = changed_set(now, statements, len({signer.name for signer in registrars.values()}))
        except Refused as refused:
            raise ProofFailed(f"a change of validators does not hold: {refused.reason}") from refused
        found.append(now)
    return found


def changes_in(batches: Iterable[bytes]) -> list[bytes]:
    """The set_validator operations in these batches, encoded. Raises MalformedMessage for a batch that is none."""
    found = []
    for raw in batches:
        if _HEAD in raw:  # Nearly all batches need no second look.
            operations = Batch.from_payload(envelope.parse(raw).payload).operations
            found += [each for each in operations if operation_code(each) == OperationCode.SET_VALIDATOR]
    return found


def sets_around(state: State, charter: Charter, last: Block) -> tuple[ValidatorsRow, ValidatorsRow]:
    """The validators before and after the last block of `state`. Raises ProtocolError for changes that are unsound.

    Those before it sealed it; both may have signed the head that it led to.
    """
    first = first_set(charter.validators)
    sets = [first, *sets_after(first, changes_since(state, 0), charter.ledger, charter.registrars)]
    changed = len(changes_in(last.batches))
    return sets[max(0, len(sets) - 1 - changed)], sets[-1]


def sequence_of(operation: SetValidator) -> int:
    """Which change this claims to be; nothing of it is verified. Raises MalformedMessage."""
    return ValidatorChange.from_payload(envelope.parse(operation.statements[0]).payload).sequence


def changes_since(state: State, sequence: int) -> Iterator[bytes]:
    """The changes after that sequence as encoded operations, ascending."""
    for key in list(state.scan((VALIDATOR_CHANGES,), sequence + 1, MAX_INTEGER)):
        row: ValidatorChangeRow = state.get(key)
        yield encode_operation(SetValidator(row.statements))


def signers_ever(state: State, charter: Charter) -> dict[bytes, Signer]:
    """Everybody who was a validator at some time up to now, by key id. Raises ProtocolError for changes unsound."""
    first = first_set(charter.validators)
    found: dict[bytes, Signer] = {}
    for row in (first, *sets_after(first, changes_since(state, 0), charter.ledger, charter.registrars)):
        found |= signers_of(row)
    return found


def _statement(sealed: bytes, ledger: str, registrars: Mapping[bytes, Signer]) -> tuple[ValidatorChange, str]:
    opened = envelope.open_envelope(sealed, ledger, registrars.get)
    if not isinstance(opened.message, ValidatorChange):
        raise MalformedMessage("change of validators", f"no {opened.message.TYPE.name.lower()} inside")
    return opened.message, opened.sender
