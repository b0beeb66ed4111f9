"""Which Modbus requests to send for a set of values: as few as the meter allows. Pure.

A request costs a turn-around on the bus, 10 to 500 ms with real meters, while a register more in the same request costs
2 ms at 9600 baud. So values near each other are read together, within the meter's limits.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from meter_agent.profiles import RequestLimits


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """`count` registers from `address` on, read with `function_code`. A value's place, or a whole request."""

    function_code: int
    address: int
    count: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.count

    def contains(self, other: "Span") -> bool:
        """True if a reply to this request carries `other`."""
        return self.function_code == other.function_code and self.address <= other.address and other.end <= self.end

    def cut(self, other: "Span", words: tuple[int, ...]) -> tuple[int, ...]:
        """The registers of `other` out of `words`, the reply to this request."""
        first = other.address - self.address
        return words[first : first + other.count]


class SpanTooLong(ValueError):
    """A value that needs more registers at once than the meter gives."""


def plan_requests(values: Iterable[Span], limits: RequestLimits) -> tuple[Span, ...]:
    """The requests that together carry all `values`, sorted by function code and address.

    A value is never split over two requests, because its registers may change in between. Raises SpanTooLong.
    """
    requests: list[Span] = []
    for value in sorted(set(values)):
        if value.count > limits.max_registers:
            raise SpanTooLong(f"{value.count} registers at {value.address}, the meter gives {limits.max_registers}")
        joined = _joined(requests[-1], value, limits) if requests else None
        if joined is None:
            requests.append(value)
        else:
            requests[-1] = joined
    return tuple(requests)


def _joined(request: Span, value: Span, limits: RequestLimits) -> Span | None:
    """One request for both, or None where the meter does not allow it."""
    if request.function_code != value.function_code or value.address - request.end > limits.max_gap:
        return None
    end = max(request.end, value.end)
    if end - request.address > limits.max_registers:
        return None
    # Only what lies between the two is new to the request; a value's own registers are wanted whatever the list says.
    if any(first < value.address and request.end <= last for first, last in limits.forbidden):
        return None
    return Span(request.function_code, request.address, end - request.address)
