"""Rounds between the gates: when a broker may serve its neighbours and when it goes on. Pure; times are market time.

Between gate 1 and gate 2 neighbouring brokers go forward in step, so that what each of them decides depends on what was
announced and never on what arrived first:

- Round 0: a broker announces that it has cleared its own stock, and coarsely what is left.
- Odd rounds are for own consumers: once a broker has heard the round before from all its neighbours, has served the
  orders that they announced in it, and knows what came of its own, it sends its next orders and announces the round
  with their number.
- Even rounds are for passing on. What neighbours ordered in the round before and was not here is ordered from others.
  For its own consumers a broker orders nothing, so it need not know yet what comes of its orders that others pass on.
- A supplier serves the orders of a round when all its neighbours have announced that round and what they announced is
  here. So all orders of a round stand at the same counter, whoever was faster.

If all brokers have announced a round, all of them can serve it. Orders of an odd round are then answered, or passed on;
those of an even round are all answered, since three brokers are the longest path, and with them the ones that they pass
on. So all brokers can announce the next round: nobody waits in a circle.

A broker announces its `last` round when it wants nothing more, holds nothing that it might pass on, and has heard that
its neighbours want nothing more for their own consumers. What it might pass on could come only from them. It still
serves what is ordered of it.

Whoever does not keep up is waited for until the limit of the round, a moment of market time between the gates, and not
in the following rounds of the interval.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

LAST_ROUND: Final = 10
"""Rounds of orders between the gates at most. Each asks whom the one before showed to have something."""

GROUPS_FROM_ROUND: Final = 5
"""Before, only what lines of a single source lack is ordered, and passed on: everybody's groups come after those."""

CHOICES_FROM_ROUND: Final = 9
"""Before, only what lines lack is ordered: what contracts choose for a shortage comes after everybody's lines."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest announcement of a neighbour about one interval.

    `asked` is how many orders it has sent to this broker up to that round, `open_wh` what it may still order for its
    own consumers, and `open_before_wh` what that was in its round before.
    """

    round_number: int
    last: bool
    asked: int
    open_wh: int
    open_before_wh: int


def is_for_passing_on(round_number: int) -> bool:
    """True for the rounds in which neighbours' orders are passed on, false for those of own orders and round 0."""
    return round_number > 0 and round_number % 2 == 0


def round_limit_s(round_number: int, gate_1_s: int, gate_2_s: int) -> int:
    """Until when a round is waited for: the time between two gates (moments) is divided evenly, one part is left over.

    Rounds above LAST_ROUND are not waited for: their limit is that of LAST_ROUND.
    """
    return gate_1_s + (gate_2_s - gate_1_s) * (min(round_number, LAST_ROUND) + 1) // (LAST_ROUND + 2)


def next_round(round_number: int, market_time_s: int, gate_1_s: int, gate_2_s: int) -> int:
    """The round after that one. Rounds whose time is up already are left out: nobody could answer in them."""
    following = round_number + 1
    while following < LAST_ROUND and round_limit_s(following, gate_1_s, gate_2_s) <= market_time_s:
        following += 1
    return min(following, LAST_ROUND)


def missing(round_number: int, heard: Mapping[str, Heard | None], received: Mapping[str, int]) -> tuple[str, ...]:
    """The neighbours that have to be waited for before the orders of a round are served, by name.

    `heard` has all neighbours, `received` how many of each one's orders are here. Who did not announce the round before
    is not waited for: it fell behind and its time was up. Who is in a later round has had its orders of this one
    answered, so they are here.
    """
    waiting = []
    for neighbour, announced in sorted(heard.items()):
        if announced is None:
            if round_number == 0:
                waiting.append(neighbour)
        elif announced.round_number < round_number and not announced.last:
            if announced.round_number == round_number - 1:
                waiting.append(neighbour)
        elif received.get(neighbour, 0) < announced.asked and announced.round_number <= round_number:
            waiting.append(neighbour)
    return tuple(waiting)


def is_last(round_number: int, own_open_wh: int, under_way: int, heard: Mapping[str, Heard | None]) -> bool:
    """True if a broker that announces this round has nothing more to announce after it.

    `own_open_wh` is what it may still order for its own consumers, `under_way` how many orders it waits for or may
    still pass on. In round 0 it cannot know what its neighbours want.
    """
    if round_number >= LAST_ROUND:
        return True
    if round_number == 0 and heard:
        return False
    if own_open_wh or under_way:
        return False
    # What was said in the round before: this one's word may have come already, or not.
    return not any(
        one.open_wh if one.round_number < round_number else one.open_before_wh
        for one in heard.values()
        if one is not None
    )
