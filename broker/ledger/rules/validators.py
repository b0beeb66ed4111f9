"""Who signs blocks and checkpoints: changed by more than half of the registrars together, one step at a time. Pure."""

from broker.ledger.faults import Fault
from broker.ledger.opening import Charter, open_statement
from broker.ledger.operations import SetValidator
from broker.ledger.rules.step import Refused, Step
from broker.ledger.state import VALIDATORS, State, Validator, ValidatorsRow
from broker.protocol.envelope import Signer
from broker.protocol.keys import Algorithm, public_key_from_cose
from broker.protocol.messages import MAX_VALIDATORS, ValidatorChange


def validators_now(state: State, charter: Charter) -> ValidatorsRow:
    """The validators by name, as of that state: those of the genesis with power 1 each before any change."""
    row: ValidatorsRow | None = state.get((VALIDATORS, 0))
    if row is not None:
        return row
    return ValidatorsRow(0, tuple(sorted(Validator(named.name, named.key, 1) for named in charter.validators)))


def signers_now(state: State, charter: Charter) -> dict[bytes, Signer]:
    """The same by key id, for whoever checks their signatures. Raises MalformedMessage for a key that is none."""
    now = validators_now(state, charter).validators
    signers = [Signer(row.name, public_key_from_cose(row.cose_key)) for row in now]
    return {signer.key.key_id: signer for signer in signers}


def set_validator(step: Step, operation: SetValidator) -> None:
    """More than half of the registrars change one validator."""
    registrars = step.charter.registrars.get
    statements = [open_statement(raw, step.charter, registrars, ValidatorChange) for raw in operation.statements]
    change = statements[0][0]
    # A signature counts for what its registrar has read, not for something like it.
    if any(other != change for other, _ in statements):
        raise Refused(Fault.VALIDATOR_STATEMENTS, f"the registrars do not say the same about {change.name}")
    signers = {opened.sender for _, opened in statements}
    # Validators can halt a ledger; no single registrar decides who they are, however often it signs.
    if 2 * len(signers) <= len(step.charter.registrar_names):
        raise Refused(
            Fault.VALIDATOR_MAJORITY,
            f"{len(signers)} of {len(step.charter.registrar_names)} registrars have signed; more than half must",
        )
    now = validators_now(step.overlay, step.charter)
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
    step.overlay.put((VALIDATORS, 0), ValidatorsRow(change.sequence, tuple(sorted([*others, *changed]))))


def _moved_power(old: Validator | None, change: ValidatorChange) -> int:
    if old is None:
        return change.power
    # Another key is another voter.
    return abs(change.power - old.power) if old.cose_key == change.key else max(change.power, old.power)
