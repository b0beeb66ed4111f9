"""Who signs blocks and checkpoints: changed by more than half of the registrars together, one step at a time. Pure."""

from collections.abc import Iterable, Sequence

from broker.ledger.faults import Fault
from broker.ledger.opening import Charter, open_statement
from broker.ledger.operations import SetValidator
from broker.ledger.rules.step import Refused, Step
from broker.ledger.state import VALIDATOR_CHANGES, VALIDATORS, State, Validator, ValidatorChangeRow, ValidatorsRow
from broker.protocol.envelope import Signer
from broker.protocol.keys import Algorithm, public_key_from_cose
from broker.protocol.messages import MAX_VALIDATORS, NamedKey, ValidatorChange


def first_set(named: Iterable[NamedKey]) -> ValidatorsRow:
    """The validators of a genesis: power 1 each."""
    return ValidatorsRow(0, tuple(sorted(Validator(each.name, each.key, 1) for each in named)))


def validators_now(state: State, charter: Charter) -> ValidatorsRow:
    """The validators by name, as of that state: those of the genesis before any change."""
    row: ValidatorsRow | None = state.get((VALIDATORS, 0))
    return first_set(charter.validators) if row is None else row


def signers_of(row: ValidatorsRow) -> dict[bytes, Signer]:
    """The same by key id, for whoever checks their signatures. Raises MalformedMessage for a key that is none."""
    signers = [Signer(validator.name, public_key_from_cose(validator.cose_key)) for validator in row.validators]
    return {signer.key.key_id: signer for signer in signers}


def signers_now(state: State, charter: Charter) -> dict[bytes, Signer]:
    """`signers_of` the validators as of that state."""
    return signers_of(validators_now(state, charter))


def set_validator(step: Step, operation: SetValidator) -> None:
    """More than half of the registrars change one validator."""
    registrars = step.charter.registrars.get
    opened = [open_statement(raw, step.charter, registrars, ValidatorChange) for raw in operation.statements]
    statements = [(change, said.sender) for change, said in opened]
    now = changed_set(validators_now(step.overlay, step.charter), statements, len(step.charter.registrar_names))
    step.overlay.put((VALIDATORS, 0), now)
    # Kept as it was signed, so that whoever joins later can follow the registrars from the genesis to now.
    step.overlay.put((VALIDATOR_CHANGES, now.sequence), ValidatorChangeRow(operation.statements))


def changed_set(
    now: ValidatorsRow, statements: Sequence[tuple[ValidatorChange, str]], registrars: int
) -> ValidatorsRow:
    """The validators after a change: its statements, each with the registrar whose signature holds, of so many.

    Whoever follows a ledger without its state uses this as well. Raises Refused.
    """
    change = statements[0][0]
    # A signature counts for what its registrar has read, not for something like it.
    if any(other != change for other, _ in statements):
        raise Refused(Fault.VALIDATOR_STATEMENTS, f"the registrars do not say the same about {change.name}")
    signers = {sender for _, sender in statements}
    # Validators can halt a ledger; no single registrar decides who they are, however often it signs.
    if 2 * len(signers) <= registrars:
        raise Refused(
            Fault.VALIDATOR_MAJORITY,
            f"{len(signers)} of {registrars} registrars have signed; more than half must",
        )
    # Each change is meant for the set that the registrars had before them, and counts once.
    if change.sequence != now.sequence + 1:
        raise Refused(
            Fault.VALIDATOR_SEQUENCE, f"the next change has sequence {now.sequence + 1}, not {change.sequence}"
        )
    # CometBFT's validators sign with Ed25519.
    if public_key_from_cose(change.key).algorithm is not Algorithm.ED25519:
        raise Refused(Fault.VALIDATOR_KEY, f"the key of {change.name} is not an Ed25519 key")
    old = next((validator for validator in now.validators if validator.name == change.name), None)
    others = [validator for validator in now.validators if validator.name != change.name]
    # A removal that removes nobody is a name misspelt.
    if old is None and change.power == 0:
        raise Refused(Fault.UNKNOWN_VALIDATOR, f"{change.name} is no validator")
    # One key with two names would vote twice.
    if change.power and any(validator.cose_key == change.key for validator in others):
        raise Refused(Fault.VALIDATOR_KEY_TAKEN, f"the key of {change.name} is another validator's")
    # Without validators nobody could make the block that brings in the next one.
    if change.power == 0 and not others:
        raise Refused(Fault.LAST_VALIDATOR, f"{change.name} is the last validator")
    # Every block carries a signature of each.
    if change.power and len(others) >= MAX_VALIDATORS:
        raise Refused(Fault.TOO_MANY_VALIDATORS, f"there are {MAX_VALIDATORS} validators already")
    # Whoever followed the ledger before the change must recognise the set after it: a light client trusts a new set
    # that a third of the old one has signed. Among three or fewer no single change could be that small.
    moved = _moved_power(old, change)
    total = sum(validator.power for validator in now.validators)
    if len(now.validators) > 3 and 3 * moved >= total:
        raise Refused(
            Fault.VALIDATOR_THIRD, f"the change moves a power of {moved} of {total}; take steps of less than a third"
        )
    changed = [Validator(change.name, change.key, change.power)] if change.power else []
    return ValidatorsRow(change.sequence, tuple(sorted([*others, *changed])))


def _moved_power(old: Validator | None, change: ValidatorChange) -> int:
    if old is None:
        return change.power
    # Another key is another voter.
    return abs(change.power - old.power) if old.cose_key == change.key else max(change.power, old.power)
