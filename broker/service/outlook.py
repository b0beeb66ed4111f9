"""What this broker and its neighbours had left in the last weeks, and what that says about a new contract."""

from dataclasses import replace
from typing import Final

from broker.market.contracts import Contract
from broker.market.feasibility import LineFeasibility, feasibility
from broker.market.lots import Lot
from broker.protocol import messages
from broker.protocol.market_time import Interval
from broker.protocol.messages import Genesis, MessageType
from broker.service.neighbours import KEEP_HEARD_S
from broker.service.store import BrokerStore

DAYS: Final = KEEP_HEARD_S // 86_400


def contract_outlook(
    store: BrokerStore, genesis: Genesis, contract: Contract, day_wh: int, margin: int
) -> tuple[LineFeasibility, ...]:
    """By line, what could have been served of `day_wh` Wh a day, evenly used; empty while there is no history.

    From what was announced after each clearing, which is coarse and does not say whose energy it is: excluded and
    preferred providers are not looked at.
    """
    left_over: dict[Lot, int] = {}
    starts = set()
    for start_s, broker, payload in store.heard_of(MessageType.STOCK):
        starts.add(start_s)
        for offer in messages.Stock.from_payload(payload).offers:
            left_over[Lot(offer.source, start_s, broker, offer.price)] = offer.energy_wh
    if not starts:
        return ()
    interval_s = genesis.interval_s
    first = min(starts)
    consumption = []
    for number, start_s in enumerate(range(first, max(starts) + interval_s, interval_s)):
        # Whole Wh that add up to the day's: what was used by now, less what was used before.
        used_wh = day_wh * (number + 1) * interval_s // 86_400 - day_wh * number * interval_s // 86_400
        consumption.append((Interval(start_s, start_s + interval_s), used_wh))
    anyone = replace(contract, excluded_providers=(), preferred_providers=())
    return feasibility(anyone, consumption, left_over, margin)
