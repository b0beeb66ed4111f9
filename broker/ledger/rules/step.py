"""What every rule works with: the batch under way, market clocks, mandates, and how a guard refuses. Pure."""

from dataclasses import dataclass
from typing import Final

from broker.ledger.faults import Fault
from broker.ledger.opening import Charter
from broker.ledger.state import CLOCK, MANDATES, ClockRow, MandateSpan, MandatesRow, Overlay, State

_LONGEST_WINDOW_S: Final = 31 * 86_400


class Refused(Exception):
    """Raised by the guards; apply_batch adds the operation's index."""

    def __init__(self, code: Fault, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(slots=True)
class Step:
    """What every rule may look at: the overlay, the charter, and the party whose batch this is.

    `expired_to_s`: assets of intervals that begin then or earlier are past use for the submitter.
    `searched` counts the deliveries that this batch's corrections have looked through.
    """

    overlay: Overlay
    charter: Charter
    submitter: str
    is_broker: bool = False
    expired_to_s: int = 0
    searched: int = 0


def require_broker(step: Step) -> None:
    """For what only brokers do."""
    # Demands and market time are brokers' affairs; other parties write readings, transfers and statements.
    if not step.is_broker:
        raise Refused(Fault.NOT_A_BROKER, f"{step.submitter} is not registered as a broker")


def clock_of(state: State, party: str) -> int:
    """A broker's market clock: the end of the last interval that it closed; 0 before the first and for all others."""
    row: ClockRow | None = state.get((CLOCK, party))
    return 0 if row is None else row.time_s


def expired_to(charter: Charter, clock_s: int) -> int:
    """Up to which start of an interval assets are expired for a broker with this clock.

    A consumption's correction may return an asset until the deadline, and the longest window makes the asset up to a
    month older than the consumption; nothing can need it later than that.
    """
    return clock_s - charter.calendar.interval_s - _LONGEST_WINDOW_S - charter.correction_deadline_s


def mandates_of(state: State, device: str) -> tuple[MandateSpan, ...]:
    """The device's mandates in the order of time, ended ones included."""
    row: MandatesRow | None = state.get((MANDATES, device))
    return () if row is None else row.spans


def responsible_broker(state: State, device: str, start_s: int) -> str | None:
    """The broker that is mandated for what the device makes in the interval that begins at `start_s`."""
    for span in reversed(mandates_of(state, device)):
        if span.from_s <= start_s and (span.end_s is None or start_s < span.end_s):
            return span.broker
    return None


def is_settled(charter: Charter, start_s: int, clock_s: int) -> bool:
    """True if corrections of that interval come too late by this market clock."""
    return clock_s >= start_s + charter.calendar.interval_s + charter.correction_deadline_s
