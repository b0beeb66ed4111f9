"""What brokers say to each other about energy: whom to ask for how much, how to share out, and where a talk stands.

Theory of operation. A broker that lacks Wh of a source after its own clearing (the *requester*) sends an order to a
neighbour (the *supplier*): the first change request. The supplier puts a transfer under that order on the ledger: the
second. It answers *done*, but that is only a hint: the requester believes what it sees in the ledger's feed, and then
delivers to its consumers: the third. Messages get lost and come twice, and either side may be killed at any moment:

- Both sides store what they are about to send before they send it, and send the same bytes again. An order's id is a
  hash of what it is for, so a requester that is restarted asks with the same id and cannot order twice.
- The supplier answers an order that comes again as it answered before (`supplier_answer`), or not yet.
- The requester asks another neighbour for the same Wh only after a refusal or a void: an order that is merely
  unanswered (ASKED), of which not all has come that was said (COMING), or that the supplier asks others for
  (PASSED_ON) may still be served. Whose time is up (`broker.market.rounds`) is voided first.
- An order ends on the ledger, by the requester's void of it or close of the interval. After that the ledger refuses
  transfers under it, so both sides know from the feed alone, and in the same order, whether it was served.

The two tables below hold every event that can come in every state, including those that come late and change nothing.
What a peer can send is in the table for every state, so no message of a peer can raise. What is not in the table cannot
happen while this broker and the ledger follow the rules: it raises IllegalTransition, with nothing changed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import sha256
from typing import Final

from broker.market.mix import apportion
from broker.protocol import cbor
from broker.protocol.messages import ORDER_ID_BYTES, AnswerStatus
from broker.protocol.sources import Source, SourceGroup


class RequesterState(Enum):
    """Where an order stands for the broker that sent it."""

    ASKED = auto()
    """Sent, perhaps several times; the Wh may still come."""
    PASSED_ON = auto()
    """The supplier gave what it had, or nothing, and asks others for the rest: that may still come."""
    COMING = auto()
    """Something stands on the ledger or is said to; the last word or some of what was promised is yet to come."""
    REFUSED = auto()
    """The supplier says that nothing will come; others may be asked."""
    SEEN = auto()
    """A transfer under the order stands on the ledger, and no more is expected. The rest may be asked of others."""
    VOID = auto()
    """Ended on the ledger before anything came; nothing can come any more."""

    @property
    def is_open(self) -> bool:
        """True while Wh may come that nobody else must be asked for."""
        return self in (RequesterState.ASKED, RequesterState.PASSED_ON, RequesterState.COMING)


class RequesterEvent(Enum):
    """What can happen to an order at the requester."""

    SENT_AGAIN = auto()
    ANSWERED_PASSED_ON = auto()
    """The supplier asks others; all that it gave by itself is seen."""
    ANSWERED_DONE = auto()
    """The supplier says how much it gave in all, or before passing on, and not all of that is seen yet."""
    ANSWERED_REFUSED = auto()
    PART_SEEN = auto()
    """A block of the feed holds a transfer under the order; the supplier's last word or further Wh may follow."""
    ALL_SEEN = auto()
    """The feed shows all that was ordered, all that the supplier says it gave, or an end after some came."""
    END_SEEN = auto()
    """A block of the feed holds our void of the order, or our close of its interval, and nothing had come."""


class SupplierState(Enum):
    """Where an order stands for the broker that received it."""

    RECEIVED = auto()
    """Stored; waits for the next apportioning."""
    PASSED_ON = auto()
    """Given what was here, or nothing, and others are asked for the rest."""
    REFUSED = auto()
    SUBMITTED = auto()
    """The batch with the transfer is stored and on its way to the ledger; nothing more will be given."""
    COMMITTED = auto()
    """The transfer stands on the ledger."""
    DEAD = auto()
    """No transfer was made and none can be made any more; its slices are back in stock."""


class SupplierEvent(Enum):
    """What can happen to an order at the supplier."""

    RECEIVED_AGAIN = auto()
    GRANTED = auto()
    """It got something, the batch is stored, and nobody is asked for more."""
    ASKED_OTHERS = auto()
    """Others are, or will be, asked for what the apportioning could not give."""
    DECLINED = auto()
    """It got nothing and will not, or it asks for what cannot be given."""
    BATCH_COMMITTED = auto()
    BATCH_REFUSED = auto()
    END_SEEN = auto()
    """A block of the feed holds the requester's void of the order, or its close of the interval."""


class IllegalTransition(Exception):
    """An event that cannot come in this state, unless this broker or the ledger breaks the rules."""

    def __init__(self, state: Enum, event: Enum) -> None:
        super().__init__(
            f"{event.name.lower()} cannot happen to an order that is {state.name.lower()}; "
            "check the ledger with `energy-broker ledger verify` and report this with the broker's log"
        )
        self.state = state
        self.event = event


_REQUESTER_TABLE: Final[Mapping[tuple[RequesterState, RequesterEvent], RequesterState]] = {
    (RequesterState.ASKED, RequesterEvent.SENT_AGAIN): RequesterState.ASKED,
    (RequesterState.ASKED, RequesterEvent.ANSWERED_PASSED_ON): RequesterState.PASSED_ON,
    (RequesterState.ASKED, RequesterEvent.ANSWERED_DONE): RequesterState.COMING,
    (RequesterState.ASKED, RequesterEvent.ANSWERED_REFUSED): RequesterState.REFUSED,
    (RequesterState.ASKED, RequesterEvent.PART_SEEN): RequesterState.COMING,
    (RequesterState.ASKED, RequesterEvent.ALL_SEEN): RequesterState.SEEN,
    (RequesterState.ASKED, RequesterEvent.END_SEEN): RequesterState.VOID,
    # What the supplier gives after all others have answered comes in parts, and then its last word.
    (RequesterState.PASSED_ON, RequesterEvent.SENT_AGAIN): RequesterState.PASSED_ON,
    (RequesterState.PASSED_ON, RequesterEvent.ANSWERED_PASSED_ON): RequesterState.PASSED_ON,
    (RequesterState.PASSED_ON, RequesterEvent.ANSWERED_DONE): RequesterState.COMING,
    (RequesterState.PASSED_ON, RequesterEvent.ANSWERED_REFUSED): RequesterState.REFUSED,
    (RequesterState.PASSED_ON, RequesterEvent.PART_SEEN): RequesterState.PASSED_ON,
    (RequesterState.PASSED_ON, RequesterEvent.ALL_SEEN): RequesterState.SEEN,
    (RequesterState.PASSED_ON, RequesterEvent.END_SEEN): RequesterState.VOID,
    # A promise is a hint only. Who refuses after something came means the rest; who promised and gave nothing is void.
    (RequesterState.COMING, RequesterEvent.SENT_AGAIN): RequesterState.COMING,
    (RequesterState.COMING, RequesterEvent.ANSWERED_PASSED_ON): RequesterState.PASSED_ON,
    (RequesterState.COMING, RequesterEvent.ANSWERED_DONE): RequesterState.COMING,
    (RequesterState.COMING, RequesterEvent.ANSWERED_REFUSED): RequesterState.SEEN,
    (RequesterState.COMING, RequesterEvent.PART_SEEN): RequesterState.COMING,
    (RequesterState.COMING, RequesterEvent.ALL_SEEN): RequesterState.SEEN,
    (RequesterState.COMING, RequesterEvent.END_SEEN): RequesterState.VOID,
    # A supplier may change its mind while the order is firm. The ledger counts; Wh beyond need become stock.
    (RequesterState.REFUSED, RequesterEvent.ANSWERED_PASSED_ON): RequesterState.REFUSED,
    (RequesterState.REFUSED, RequesterEvent.ANSWERED_DONE): RequesterState.REFUSED,
    (RequesterState.REFUSED, RequesterEvent.ANSWERED_REFUSED): RequesterState.REFUSED,
    (RequesterState.REFUSED, RequesterEvent.PART_SEEN): RequesterState.SEEN,
    (RequesterState.REFUSED, RequesterEvent.ALL_SEEN): RequesterState.SEEN,
    (RequesterState.REFUSED, RequesterEvent.END_SEEN): RequesterState.VOID,
    # The answer usually comes after the block, and again after each resend; a further transfer may follow.
    (RequesterState.SEEN, RequesterEvent.ANSWERED_PASSED_ON): RequesterState.SEEN,
    (RequesterState.SEEN, RequesterEvent.ANSWERED_DONE): RequesterState.SEEN,
    (RequesterState.SEEN, RequesterEvent.ANSWERED_REFUSED): RequesterState.SEEN,
    (RequesterState.SEEN, RequesterEvent.PART_SEEN): RequesterState.SEEN,
    (RequesterState.SEEN, RequesterEvent.ALL_SEEN): RequesterState.SEEN,
    (RequesterState.SEEN, RequesterEvent.END_SEEN): RequesterState.SEEN,
    # Late answers. A transfer cannot follow the end: the ledger refuses it.
    (RequesterState.VOID, RequesterEvent.ANSWERED_PASSED_ON): RequesterState.VOID,
    (RequesterState.VOID, RequesterEvent.ANSWERED_DONE): RequesterState.VOID,
    (RequesterState.VOID, RequesterEvent.ANSWERED_REFUSED): RequesterState.VOID,
    (RequesterState.VOID, RequesterEvent.END_SEEN): RequesterState.VOID,
}

_SUPPLIER_TABLE: Final[Mapping[tuple[SupplierState, SupplierEvent], SupplierState]] = {
    (SupplierState.RECEIVED, SupplierEvent.RECEIVED_AGAIN): SupplierState.RECEIVED,
    (SupplierState.RECEIVED, SupplierEvent.GRANTED): SupplierState.SUBMITTED,
    (SupplierState.RECEIVED, SupplierEvent.ASKED_OTHERS): SupplierState.PASSED_ON,
    (SupplierState.RECEIVED, SupplierEvent.DECLINED): SupplierState.REFUSED,
    (SupplierState.RECEIVED, SupplierEvent.END_SEEN): SupplierState.DEAD,
    (SupplierState.PASSED_ON, SupplierEvent.RECEIVED_AGAIN): SupplierState.PASSED_ON,
    # The last of the others has answered: something is still on its way to the ledger, stands there, or nothing came.
    (SupplierState.PASSED_ON, SupplierEvent.GRANTED): SupplierState.SUBMITTED,
    (SupplierState.PASSED_ON, SupplierEvent.BATCH_COMMITTED): SupplierState.COMMITTED,
    (SupplierState.PASSED_ON, SupplierEvent.DECLINED): SupplierState.REFUSED,
    # What others still give for it becomes stock.
    (SupplierState.PASSED_ON, SupplierEvent.END_SEEN): SupplierState.DEAD,
    (SupplierState.REFUSED, SupplierEvent.RECEIVED_AGAIN): SupplierState.REFUSED,
    (SupplierState.REFUSED, SupplierEvent.END_SEEN): SupplierState.REFUSED,
    (SupplierState.SUBMITTED, SupplierEvent.RECEIVED_AGAIN): SupplierState.SUBMITTED,
    (SupplierState.SUBMITTED, SupplierEvent.BATCH_COMMITTED): SupplierState.COMMITTED,
    (SupplierState.SUBMITTED, SupplierEvent.BATCH_REFUSED): SupplierState.DEAD,
    # The feed shows blocks in order: once it shows the end, the batch was not applied before and cannot be after.
    (SupplierState.SUBMITTED, SupplierEvent.END_SEEN): SupplierState.DEAD,
    (SupplierState.COMMITTED, SupplierEvent.RECEIVED_AGAIN): SupplierState.COMMITTED,
    # A batch that was sent again before its block was seen: its id is applied, so its result is committed again.
    (SupplierState.COMMITTED, SupplierEvent.BATCH_COMMITTED): SupplierState.COMMITTED,
    (SupplierState.COMMITTED, SupplierEvent.END_SEEN): SupplierState.COMMITTED,
    (SupplierState.DEAD, SupplierEvent.RECEIVED_AGAIN): SupplierState.DEAD,
    (SupplierState.DEAD, SupplierEvent.BATCH_REFUSED): SupplierState.DEAD,
    (SupplierState.DEAD, SupplierEvent.END_SEEN): SupplierState.DEAD,
}


def next_requester_state(state: RequesterState, event: RequesterEvent) -> RequesterState:
    """Where an order stands after `event`. Raises IllegalTransition."""
    try:
        return _REQUESTER_TABLE[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None


def next_supplier_state(state: SupplierState, event: SupplierEvent) -> SupplierState:
    """Where an order stands after `event`. Raises IllegalTransition."""
    try:
        return _SUPPLIER_TABLE[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None


def supplier_answer(state: SupplierState) -> AnswerStatus | None:
    """What to answer an order in this state, whenever it comes; None while it is not decided."""
    match state:
        case SupplierState.COMMITTED:
            return AnswerStatus.DONE
        case SupplierState.PASSED_ON:
            return AnswerStatus.PASSED_ON
        case SupplierState.REFUSED | SupplierState.DEAD:
            return AnswerStatus.REFUSED
        case SupplierState.RECEIVED | SupplierState.SUBMITTED:
            return None


def order_id_for(
    requester: str, source: Source, start_s: int, round_number: int, neighbour: str, parent: bytes = b""
) -> bytes:
    """The id of the order that `requester` sends to `neighbour` for a source, interval and round: 16 bytes.

    `parent` is what tells an order that is passed on from others, empty for one of its own. The id is the same after a
    restart, so that asking again is never ordering twice.
    """
    named = cbor.encode(["dengen order", requester, int(source), start_s, round_number, neighbour, parent])
    return sha256(named).digest()[:ORDER_ID_BYTES]


_RESEND_AFTER_S: Final = (1, 2, 4, 8, 15, 30)


def next_resend_s(attempts: int, jitter: int) -> float:
    """Seconds to wait for an answer after that many sends (1 for the first) before the same bytes are sent again.

    `jitter`, from 0 to 255, comes from outside at random: it takes off up to half of the wait, so that brokers that
    lost the same server do not all come back at once.
    """
    longest_s = _RESEND_AFTER_S[min(max(attempts, 1), len(_RESEND_AFTER_S)) - 1]
    return longest_s * (512 - jitter) / 512


@dataclass(frozen=True, slots=True)
class NeighbourOffer:
    """What a neighbour announced to have of a source: coarse, and from its last clearing, so only a hint."""

    neighbour: str
    source: Source
    energy_wh: int
    price: int


@dataclass(frozen=True, slots=True)
class PlannedOrder:
    """An order to send. There is at most one per neighbour and source in a plan."""

    neighbour: str
    source: Source
    energy_wh: int
    highest_price: int


def plan_orders(
    shortages: Mapping[Source, int],
    group_shortage_wh: Mapping[SourceGroup, int],
    neighbours: Sequence[str],
    offers: Sequence[NeighbourOffer],
    highest_price: Mapping[Source, int],
    asked: Collection[tuple[str, Source]] = (),
    trust_ppm: Mapping[str, int] | None = None,
    through: Sequence[NeighbourOffer] = (),
    expected_wh: Mapping[tuple[str, Source], int] | None = None,
    promised_wh: Mapping[tuple[str, Source], int] | None = None,
) -> tuple[PlannedOrder, ...]:
    """Whom to ask for what is short, by neighbour name and source. Every short Wh is asked of one neighbour only.

    `shortages` and `group_shortage_wh` are a clearing's, less what is still coming. `asked` are the (neighbour, source)
    who gave less than was asked of them for this interval and are not asked again. Single sources come first. Each
    shortage goes to the cheapest of `offers` first, then the next, as far as each goes; of two at one price to the one
    that promised it the day before, as far as that goes (`promised_wh`, less what has come), then to the one from which
    more can be expected: what it announced times `trust_ppm`, the part of earlier orders that it gave (all, if not
    known). Then come the offers `through` neighbours, of what they could pass on from others, in the same way.
    What nothing of that covers goes to one who announced the source, else to who promised most of it, else to who the
    day before expected to have most of it left (`expected_wh`), else to who is trusted most: announcements are coarse,
    and none at all is no refusal. A group takes whichever source is announced cheapest; without any announcement one
    source is asked for, and the next one in the next round. Offers above `highest_price` (µ-currency per kWh by source;
    a source that it lacks is not asked for) are left alone.
    """
    trust = {neighbour: (trust_ppm or {}).get(neighbour, 1_000_000) for neighbour in neighbours}
    tiers = [
        {(offer.neighbour, offer.source): _Left(offer.price, offer.energy_wh) for offer in tier}
        for tier in (offers, through)
    ]
    direct = tiers[0]
    promised = dict(promised_wh or {})
    # Also what is used up was announced coarsely.
    heard_of = {candidate for tier in tiers for candidate in tier}
    planned_wh: dict[tuple[str, Source], int] = {}
    wanted: list[tuple[tuple[Source, ...], int]] = [((source,), shortages[source]) for source in sorted(shortages)]
    wanted.extend([(group.sources, group_shortage_wh[group]) for group in sorted(group_shortage_wh)])
    for sources, short_wh in wanted:
        candidates = [
            (neighbour, source)
            for source in sources
            if source in highest_price
            for neighbour in sorted(neighbours)
            if (neighbour, source) not in asked
        ]
        covered_wh: dict[tuple[str, Source], int] = {}
        for tier in tiers:
            ranked = []
            for candidate in candidates:
                left = tier.get(candidate)
                if left is not None and left.energy_wh and left.price <= highest_price[candidate[1]]:
                    expected = left.energy_wh * trust[candidate[0]]
                    ranked.append((left.price, 1, -expected, candidate[1], candidate[0]))
                    if tier is direct and promised.get(candidate):
                        ranked.append((left.price, 0, -expected, candidate[1], candidate[0]))
            for _, unpromised, _, source, neighbour in sorted(ranked):
                left = tier[neighbour, source]
                part_wh = min(short_wh, left.energy_wh)
                if not unpromised:
                    part_wh = min(part_wh, promised[neighbour, source])
                    promised[neighbour, source] -= part_wh
                if part_wh:
                    left.energy_wh -= part_wh
                    short_wh -= part_wh
                    covered_wh[neighbour, source] = covered_wh.get((neighbour, source), 0) + part_wh
        silent = [
            (
                (neighbour, source) not in heard_of,
                -promised.get((neighbour, source), 0),
                -(expected_wh or {}).get((neighbour, source), 0),
                -trust[neighbour],
                -covered_wh.get((neighbour, source), 0),
                source,
                neighbour,
            )
            for neighbour, source in candidates
            if (neighbour, source) not in direct or direct[neighbour, source].price <= highest_price[source]
        ]
        if short_wh and silent:
            *_, source, neighbour = min(silent)
            covered_wh[neighbour, source] = covered_wh.get((neighbour, source), 0) + short_wh
        for candidate, part_wh in covered_wh.items():
            planned_wh[candidate] = planned_wh.get(candidate, 0) + part_wh
    return tuple(
        [
            PlannedOrder(neighbour, source, energy_wh, highest_price[source])
            for (neighbour, source), energy_wh in sorted(planned_wh.items())
        ]
    )


@dataclass(slots=True)
class _Left:
    """What is left of an offer while a plan is made."""

    price: int
    energy_wh: int


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """A neighbour's order that waits to be apportioned. `passes_on`: it is for what somebody else ordered of it."""

    order_id: bytes
    requester: str
    source: Source
    energy_wh: int
    highest_price: int
    passes_on: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What an order gets: (price, Wh) in `parts`, cheapest first; or none, and a `reason` for the requester."""

    order_id: bytes
    parts: tuple[tuple[int, int], ...]
    reason: str | None = None

    @property
    def energy_wh(self) -> int:
        return sum([energy_wh for _, energy_wh in self.parts])


def grants(
    orders: Sequence[OpenOrder],
    offered: Mapping[Source, Mapping[int, int]],
    promised_wh: Mapping[tuple[str, Source], int] | None = None,
) -> tuple[Grant, ...]:
    """Share out what is left after own clearing, in proportion to the orders; one grant per order, in their order.

    What was promised to a requester the day before (`promised_wh`, less what it has been given) comes first: up to
    that, its orders are served before all of them share the rest. It is for the requester's own consumers, not for
    orders that pass others on. If there is less than was promised, that is shared in proportion to the promises.

    `offered` has Wh by source and asked price (µ-currency per kWh); no order gets any above its highest price. How much
    each gets is decided from the dearest Wh down, since fewest take those: so none is left that somebody would take.
    Which they are is decided from the cheapest up, lower limits first. Ties go by requester name and then id, and the
    order of arrival changes nothing.
    """
    granted: dict[bytes, Grant] = {}
    for source in Source:
        of_source = sorted([order for order in orders if order.source is source], key=_tie_key)
        if of_source:
            wh_at = {price: energy_wh for price, energy_wh in sorted(offered.get(source, {}).items()) if energy_wh}
            granted.update(_grants_of_source(source, of_source, wh_at, promised_wh or {}))
    return tuple([granted[order.order_id] for order in orders])


def _grants_of_source(
    source: Source,
    orders: Sequence[OpenOrder],
    wh_at: Mapping[int, int],
    promised_wh: Mapping[tuple[str, Source], int],
) -> dict[bytes, Grant]:
    """`wh_at` is by price, cheapest first."""
    amounts_wh = dict.fromkeys([order.order_id for order in orders], 0)
    left_wh = dict(wh_at)
    for wants_wh in (
        _promised_parts(source, orders, promised_wh),
        {order.order_id: order.energy_wh for order in orders},
    ):
        for price in reversed(wh_at):
            takers = [order for order in orders if order.highest_price >= price]
            wanted_wh = [wants_wh[order.order_id] - amounts_wh[order.order_id] for order in takers]
            shares_wh = apportion(min(left_wh[price], sum(wanted_wh)), wanted_wh)
            left_wh[price] -= sum(shares_wh)
            for order, share_wh in zip(takers, shares_wh, strict=True):
                amounts_wh[order.order_id] += share_wh
    left_wh = dict(wh_at)
    parts: dict[bytes, list[tuple[int, int]]] = {order_id: [] for order_id in amounts_wh}
    missing_wh = dict(amounts_wh)
    # Whoever pays less than another must get the cheaper Wh, or those that both would take run out.
    for limit in sorted({order.highest_price for order in orders}):
        takers = [order for order in orders if order.highest_price == limit]
        for price in left_wh:
            wanted_wh = [missing_wh[order.order_id] for order in takers]
            shares_wh = apportion(min(left_wh[price], sum(wanted_wh)), wanted_wh)
            left_wh[price] -= sum(shares_wh)
            for order, share_wh in zip(takers, shares_wh, strict=True):
                missing_wh[order.order_id] -= share_wh
                if share_wh:
                    parts[order.order_id].append((price, share_wh))
    return {
        order.order_id: Grant(
            order.order_id,
            tuple(parts[order.order_id]),
            None if amounts_wh[order.order_id] else _reason_of_none(source, order, orders, wh_at),
        )
        for order in orders
    }


def _promised_parts(
    source: Source, orders: Sequence[OpenOrder], promised_wh: Mapping[tuple[str, Source], int]
) -> dict[bytes, int]:
    """How much of each order comes before all share; of several of one requester, in proportion to them."""
    parts_wh = dict.fromkeys([order.order_id for order in orders], 0)
    for requester in sorted({order.requester for order in orders}):
        own = [order for order in orders if order.requester == requester and not order.passes_on]
        energies_wh = [order.energy_wh for order in own]
        firm_wh = min(promised_wh.get((requester, source), 0), sum(energies_wh))
        for order, part_wh in zip(own, apportion(firm_wh, energies_wh), strict=True):
            parts_wh[order.order_id] = part_wh
    return parts_wh


def _reason_of_none(source: Source, order: OpenOrder, orders: Sequence[OpenOrder], wh_at: Mapping[int, int]) -> str:
    if not wh_at:
        return f"no {source.label} left in this interval"
    cheapest = next(iter(wh_at))
    if cheapest > order.highest_price:
        return f"{source.label} costs {cheapest} µ/kWh here, above the order's highest price {order.highest_price}"
    takers = [other for other in orders if other.highest_price >= cheapest]
    return f"no {source.label} left after sharing out among {len(takers)} orders"


def _tie_key(order: OpenOrder) -> tuple[str, bytes]:
    return order.requester, order.order_id
