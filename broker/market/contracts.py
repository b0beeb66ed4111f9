"""Contracts: from which sources a consumer's electricity must come, and what has been delivered under them so far.

Besides its lines a contract says at what price, from which providers, and how close in time (`Window`) it takes energy.

A contract is a list of lines, each a source or a group of sources with its share in ppm (parts per million); all shares
together are exactly 1 000 000, because what a person leaves open becomes a line `any`. `make_contract` is the door for
everything that people type: it refuses what makes no sense with a sentence that says what to do. A changed contract is
a new version with its own `valid_from_s`; its history starts afresh, and so does every accounting period (UTC month).
A version applies to the intervals that begin at `valid_from_s` or later and before `valid_until_s`.

The provider's side of the bargain is in `terms`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from broker.market.windows import DAY_S, EPOCH_DAY, Window
from broker.protocol import cbor
from broker.protocol.codec import Choice, Field, Many, Name, Row, Unsigned, decode_fields, encode_fields, is_name
from broker.protocol.errors import MalformedMessage
from broker.protocol.limits import MAX_INTEGER, MAX_METER_MESSAGE_BYTES
from broker.protocol.messages import MAX_LINES, NO_LINE
from broker.protocol.sources import Source, SourceGroup, line_from_label, source_from_label

WHOLE_PPM: Final = 1_000_000
"""All shares of a contract together."""

MAX_PREFERRED_PROVIDERS: Final = 8
"""Bounds the contract's size; a longer list prefers nobody."""

MAX_EXCLUDED_PROVIDERS: Final = 32
"""Bounds the contract's size; who trusts fewer providers than that names a source, not a list."""


class ContractError(Exception):
    """A contract that cannot be accepted. `problem` says what is wrong, `remedy` what to do about it."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


class ShortageChoice(IntEnum):
    """What to do with Wh that no line can be filled with. The number is the code in a stored contract."""

    UNMATCHED = 0
    ANY = 1
    SUBSTITUTES = 2

    @property
    def label(self) -> str:
        """The name in configs and pages, for example `unmatched`."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a contract: `share_ppm` of the consumption comes from `target`."""

    target: Source | SourceGroup
    share_ppm: int


@dataclass(frozen=True, slots=True)
class PriceCeiling:
    """Energy of `source` is taken up to `highest_price` µ-currency per kWh."""

    source: Source
    highest_price: int


@dataclass(frozen=True, slots=True)
class Contract:
    """One version of a consumer's contract, as `make_contract` makes it.

    `substitutes` are taken in their order, only with ShortageChoice.SUBSTITUTES. `highest_price` is in µ-currency per
    kWh and holds for every source, None for no limit; `price_ceilings` hold besides it, by source code, each source
    once. `preferred_providers` stand in their order of preference; `excluded_providers` by name. `valid_until_s` is
    the first moment at which the version does not apply any more, None while it has no end.
    """

    valid_from_s: int
    lines: tuple[Line, ...]
    shortage: ShortageChoice
    substitutes: tuple[Source, ...] = ()
    highest_price: int | None = None
    preferred_providers: tuple[str, ...] = ()
    area: str = field(kw_only=True)
    excluded_providers: tuple[str, ...] = ()
    price_ceilings: tuple[PriceCeiling, ...] = ()
    window: Window = Window.INTERVAL
    valid_until_s: int | None = None

    @property
    def is_plain(self) -> bool:
        """True if any energy of the right source and the same interval will do, whoever made it at whatever price."""
        return (
            self.window is Window.INTERVAL
            and self.highest_price is None
            and not self.price_ceilings
            and not self.excluded_providers
            and not self.preferred_providers
        )

    def highest_price_of(self, source: Source) -> int | None:
        """The most that is paid for energy of this source, in µ-currency per kWh; None for no limit."""
        limits = [ceiling.highest_price for ceiling in self.price_ceilings if ceiling.source is source]
        if self.highest_price is not None:
            limits.append(self.highest_price)
        return min(limits, default=None)

    @property
    def shares_ppm(self) -> tuple[int, ...]:
        """The share of each line, in contract order."""
        return tuple([line.share_ppm for line in self.lines])

    def line_for(self, source: Source) -> int:
        """The index of the line that energy of `source` counts for when it comes as a substitute.

        The most exact line wins: that source itself, then its group, then `any`. NO_LINE if no line covers the source.
        """
        best = NO_LINE
        best_size = len(Source) + 1
        for index, line in enumerate(self.lines):
            covered = line.target.sources if isinstance(line.target, SourceGroup) else (line.target,)
            if source in covered and len(covered) < best_size:
                best, best_size = index, len(covered)
        return best


@dataclass(frozen=True, slots=True)
class History:
    """Wh delivered since the contract version and the accounting period began: for each line, and altogether.

    `total` is larger than the sum of `by_line` by the substitutes that stand in no line. Raises ValueError if it is
    smaller, or anything is negative.
    """

    by_line: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        if sum(self.by_line) > self.total or min(self.by_line, default=0) < 0:
            raise ValueError(f"a history of {self.by_line} Wh by line cannot add up to {self.total} Wh")

    @classmethod
    def empty(cls, contract: Contract) -> "History":
        """Nothing delivered yet."""
        return cls((0,) * len(contract.lines), 0)

    def plus(self, *delivered: tuple[int, int]) -> "History":
        """This history after more was delivered, as (line, energy_wh); NO_LINE stands for outside all lines."""
        by_line = list(self.by_line)
        total_wh = self.total
        for line, energy_wh in delivered:
            total_wh += energy_wh
            if line != NO_LINE:
                by_line[line] += energy_wh
        return History(tuple(by_line), total_wh)


@lru_cache(maxsize=64)
def period_start(time_s: int) -> int:
    """The start of the accounting period that contains `time_s`: the first second of its UTC month."""
    first = datetime.fromtimestamp(time_s, UTC).date().replace(day=1)
    return (first.toordinal() - EPOCH_DAY) * DAY_S


def history_start(contract: Contract, interval_start_s: int) -> int:
    """From when deliveries count in the history that decides an interval: version or period, whichever is later."""
    return max(contract.valid_from_s, period_start(interval_start_s))


def make_contract(
    valid_from_s: int,
    shares: Iterable[tuple[str | Source | SourceGroup, int]],
    shortage: ShortageChoice,
    *,
    area: str,
    substitutes: Iterable[str | Source] = (),
    highest_price: int | None = None,
    preferred_providers: Iterable[str] = (),
    excluded_providers: Iterable[str] = (),
    price_ceilings: Iterable[tuple[str | Source, int]] = (),
    window: Window = Window.INTERVAL,
    valid_until_s: int | None = None,
) -> Contract:
    """A contract from what a person chose: (source or group, share in ppm) in their order.

    Shares below 1 000 000 ppm together are completed by `any`, in a line at the end or in the `any` line that is there.
    Raises ContractError.
    """
    lines = _complete(_lines(shares))
    chosen = _substitutes(shortage, substitutes)
    preferred = _providers("preferred", preferred_providers, MAX_PREFERRED_PROVIDERS)
    excluded = _providers("excluded", excluded_providers, MAX_EXCLUDED_PROVIDERS)
    both = sorted(set(preferred) & set(excluded))
    if both:
        raise ContractError(f"{both[0]} is preferred and excluded", "name it in one of the two lists")
    if not is_name(area):
        raise ContractError(f"{area!r} is no name", "use the registered name of an area: a-z, 0-9 and -")
    if type(valid_from_s) is not int or not 0 <= valid_from_s <= MAX_INTEGER:
        raise ContractError(f"valid from {valid_from_s!r}", "give UTC epoch seconds, which begin in 1970")
    if valid_until_s is not None and (
        type(valid_until_s) is not int or not valid_from_s < valid_until_s <= MAX_INTEGER
    ):
        raise ContractError(
            f"valid from {valid_from_s} until {valid_until_s!r}",
            "give an end after the beginning, or leave it out for a contract without end",
        )
    if highest_price is not None:
        _check_price("highest price", highest_price)
    return Contract(
        valid_from_s,
        lines,
        shortage,
        chosen,
        highest_price,
        preferred,
        area=area,
        excluded_providers=tuple(sorted(excluded)),
        price_ceilings=_ceilings(price_ceilings, lines, chosen, shortage, highest_price),
        window=window,
        valid_until_s=valid_until_s,
    )


def _providers(what: str, names: Iterable[str], most: int) -> tuple[str, ...]:
    providers = tuple(names)
    if len(providers) > most or len(set(providers)) != len(providers):
        raise ContractError(
            f"{len(providers)} {what} providers, or one of them twice", f"name each once, at most {most}"
        )
    for name in providers:
        if not is_name(name):
            raise ContractError(f"{name!r} is no name", "use the registered name of a provider: a-z, 0-9 and -")
    return providers


def _check_price(what: str, price: object) -> None:
    if type(price) is not int or not 0 <= price <= MAX_INTEGER:
        raise ContractError(
            f"{what} {price!r}", "give a whole number of µ-currency per kWh, or leave it out for no limit"
        )


def _ceilings(
    ceilings: Iterable[tuple[str | Source, int]],
    lines: tuple[Line, ...],
    substitutes: tuple[Source, ...],
    shortage: ShortageChoice,
    highest_price: int | None,
) -> tuple[PriceCeiling, ...]:
    """By source code. One that can never matter was meant for something else, so it is refused."""
    wanted = set(Source) if shortage is ShortageChoice.ANY else set(substitutes)
    for line in lines:
        wanted.update(line.target.sources if isinstance(line.target, SourceGroup) else (line.target,))
    by_source: dict[Source, int] = {}
    for name, price in ceilings:
        try:
            source = name if isinstance(name, Source) else source_from_label(name)
        except ValueError as error:
            raise ContractError(str(error), "name a single source with each price ceiling") from None
        _check_price(f"the price ceiling of {source.label} is", price)
        if source in by_source:
            raise ContractError(f"{source.label} has two price ceilings", "give one for each source")
        if source not in wanted:
            raise ContractError(
                f"{source.label} has a price ceiling, but no line or substitute takes it", "leave the ceiling out"
            )
        if highest_price is not None and price > highest_price:
            raise ContractError(
                f"the price ceiling of {source.label}, {price}, is above the highest price {highest_price}",
                "raise the highest price, which holds for every source, or lower the ceiling",
            )
        by_source[source] = price
    return tuple([PriceCeiling(source, by_source[source]) for source in sorted(by_source)])


def _lines(shares: Iterable[tuple[str | Source | SourceGroup, int]]) -> list[Line]:
    lines: list[Line] = []
    for name, share_ppm in shares:
        target = _target(name)
        if type(share_ppm) is not int or share_ppm <= 0:
            raise ContractError(
                f"the share of {target.label} is {share_ppm!r} ppm",
                "give a whole number above 0, or leave the line out",
            )
        if any(line.target == target for line in lines):
            raise ContractError(f"{target.label} stands in two lines", "put its whole share into one line")
        lines.append(Line(target, share_ppm))
    return lines


def _complete(lines: list[Line]) -> tuple[Line, ...]:
    total_ppm = sum(line.share_ppm for line in lines)
    if total_ppm > WHOLE_PPM:
        raise ContractError(
            f"the shares add up to {total_ppm} ppm ({total_ppm / 10_000:g} %)",
            f"lower them until they are {WHOLE_PPM} ppm (100 %) or less; what is left open becomes a line any",
        )
    if total_ppm < WHOLE_PPM:
        open_ppm = WHOLE_PPM - total_ppm
        for index, line in enumerate(lines):
            if line.target is SourceGroup.ANY:
                lines[index] = Line(SourceGroup.ANY, line.share_ppm + open_ppm)
                break
        else:
            lines.append(Line(SourceGroup.ANY, open_ppm))
    return tuple(lines)


def _target(name: str | Source | SourceGroup) -> Source | SourceGroup:
    if isinstance(name, (Source, SourceGroup)):
        return name
    try:
        return line_from_label(name)
    except ValueError as error:
        raise ContractError(str(error), "use one of these names in the line") from None


def _substitutes(shortage: ShortageChoice, names: Iterable[str | Source]) -> tuple[Source, ...]:
    substitutes: list[Source] = []
    for name in names:
        try:
            source = name if isinstance(name, Source) else source_from_label(name)
        except ValueError as error:
            raise ContractError(str(error), "name single sources as substitutes, in the order to try them") from None
        if source in substitutes:
            raise ContractError(f"substitute {source.label} is named twice", "name each substitute once")
        substitutes.append(source)
    if substitutes and shortage is not ShortageChoice.SUBSTITUTES:
        raise ContractError(
            f"substitutes are named, but the shortage choice is {shortage.label}", "choose substitutes or name none"
        )
    if not substitutes and shortage is ShortageChoice.SUBSTITUTES:
        raise ContractError("the shortage choice is substitutes, but none is named", "name at least one, or choose any")
    return tuple(substitutes)


@dataclass(frozen=True, slots=True)
class _Target:
    """A source or group as its number; the two sets of numbers do not meet."""

    def encode(self, value: Any) -> Any:
        return int(value)

    def decode(self, data: Any, where: str) -> Source | SourceGroup:
        if type(data) is int:
            for closed_set in (Source, SourceGroup):
                if data in closed_set._value2member_map_:
                    return closed_set(data)
        raise MalformedMessage(where, "the number of a source or group")


_FIELDS: Final[tuple[Field, ...]] = (
    Field(0, "valid_from_s", Unsigned()),
    Field(1, "lines", Many(Row((_Target(), Unsigned(WHOLE_PPM, minimum=1)), Line), MAX_LINES, minimum=1)),
    Field(2, "shortage", Choice(ShortageChoice)),
    Field(3, "substitutes", Many(Choice(Source), len(Source))),
    Field(4, "highest_price", Unsigned(), optional=True),
    Field(5, "preferred_providers", Many(Name(), MAX_PREFERRED_PROVIDERS)),
    Field(6, "area", Name()),
    Field(7, "excluded_providers", Many(Name(), MAX_EXCLUDED_PROVIDERS), optional=True),
    Field(8, "price_ceilings", Many(Row((Choice(Source), Unsigned()), PriceCeiling), len(Source)), optional=True),
    Field(9, "window", Choice(Window), optional=True),
    Field(10, "valid_until_s", Unsigned(), optional=True),
)

_UNSAID: Final[dict[int, Any]] = {7: (), 8: (), 9: int(Window.INTERVAL)}
"""What is not in the bytes where it has this value. So a contract that says nothing of it keeps its hash for good."""


def contract_bytes(contract: Contract) -> bytes:
    """The contract as deterministic CBOR: what is stored, signed and hashed."""
    data = encode_fields(_FIELDS, contract)
    return cbor.encode({key: value for key, value in data.items() if value != _UNSAID.get(key)})


def contract_from_bytes(raw: bytes) -> Contract:
    """Read what `contract_bytes` wrote. Raises MalformedMessage, or ContractError where the contract makes no sense."""
    values = decode_fields(_FIELDS, cbor.decode(raw, "contract", MAX_METER_MESSAGE_BYTES), "contract")
    valid_from_s, lines, shortage, substitutes, highest_price, preferred, area, excluded, ceilings, window, end_s = (
        values
    )
    contract = make_contract(
        valid_from_s,
        [(line.target, line.share_ppm) for line in lines],
        shortage,
        area=area,
        substitutes=substitutes,
        highest_price=highest_price,
        preferred_providers=preferred,
        excluded_providers=excluded or (),
        price_ceilings=[(ceiling.source, ceiling.highest_price) for ceiling in ceilings or ()],
        window=window or Window.INTERVAL,
        valid_until_s=end_s,
    )
    if contract.lines != lines:
        raise MalformedMessage("contract.lines", f"shares that add up to {WHOLE_PPM} ppm")
    if contract_bytes(contract) != raw:
        raise MalformedMessage("contract", "excluded providers by name, ceilings by source, nothing that goes unsaid")
    return contract


def contract_hash(contract: Contract) -> bytes:
    """SHA-256 of `contract_bytes`: stands in receipts, so that a consumer can prove which contract applied."""
    return sha256(contract_bytes(contract)).digest()
