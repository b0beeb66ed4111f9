"""An attacker who has a copy of the ledger and wants to know which deliveries went to the same household.

`python -m simulation.linkage` runs a market of recorded households and prints how far each way of linking gets. What
the attacker works with is in `Sighting`, all of it read from the ledger's blocks; who a pseudonym was is used only to
count its right guesses. The households are made of recorded days of one home (deploy/demo/data): 18 pairs of days that
followed each other, each at two sizes, so that many look alike. Their contracts are six tariffs, as brokers offer them.

The attacker guesses, for each delivery of an interval, which delivery of the interval before went to the same household
(`guess`). Pure guessing is right once in as many times as there are candidates. Links between intervals further apart
are not easier than that, and a chain of links breaks at its first wrong one.
"""

import csv
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any, Final

from support.ledger_world import key

from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.operations import Deliver, Transfer, decode_operation
from broker.market.contracts import ShortageChoice
from broker.protocol.envelope import parse
from broker.protocol.messages import Batch, Block, MessageType
from broker.protocol.sources import Source
from broker.service.store import BrokerStore
from simulation.world import INTERVAL_S, T0, ConsumerPlan, DevicePlan, Plan, World

DATA: Final = Path(__file__).parents[2] / "deploy" / "demo" / "data"
SEED: Final = 20_260_131
SIZES_PERCENT: Final = (100, 55)
TARIFFS: Final[tuple[tuple[tuple[str, int], ...], ...]] = (
    (("solar", 60), ("any", 40)),
    (("wind", 100),),
    (("renewable", 100),),
    (("solar", 40), ("wind", 30), ("hydro", 30)),
    (("hydro", 50), ("any", 50)),
    (("any", 100),),
)


# --- The market


def recorded_plan(intervals: int) -> Plan:
    """36 households at two brokers, and devices that now and then make too little; energies from the recorded weeks."""
    weeks = [_recorded(week) for week in ("spring", "summer", "winter")]
    consumers = []
    for number in range(36):
        size, pair = divmod(number, 18)
        week, day = divmod(pair, 6)
        consumption, _ = weeks[week]
        energies = [energy * SIZES_PERCENT[size] // 100 for energy in consumption[day * 48 : (day + 2) * 48]]
        consumers.append(
            ConsumerPlan(
                f"home-{number:02}",
                ("east", "west")[number % 2],
                TARIFFS[number % len(TARIFFS)] if number % 4 else TARIFFS[number // 4 % len(TARIFFS)],
                tuple(energies[:intervals]),
                ShortageChoice.ANY,
            )
        )
    sun = [sum(generation[index + 96 * half] for _, generation in weeks for half in range(3)) for index in range(96)]
    wind = [2_500 + 60 * abs(index % 60 - 30) for index in range(96)]
    devices = []
    for broker in ("east", "west"):
        for source, name, energies in (
            (Source.SOLAR, "roof", [2 * energy for energy in sun]),
            (Source.SOLAR, "field", sun),
            (Source.WIND, "mill", wind),
            (Source.HYDRO, "dam", [1_200 + 10 * index for index in range(96)]),
            (Source.NATURAL_GAS, "burner", [9_000] * 96),
        ):
            devices.append(
                DevicePlan(f"{name}-{broker}", f"owner-{broker}", broker, source, tuple(energies[:intervals]))
            )
    return Plan(("east", "west"), "east", tuple(consumers), tuple(devices))


def _recorded(week: str) -> tuple[list[int], list[int]]:
    """Consumption and generation of a recorded week in Wh; the source has mean kW over half hours."""
    with (DATA / f"{week}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    consumption, generation = ([int(Decimal(row[column]) * 500) for row in rows] for column in ("GC", "GG"))
    return consumption, generation


# --- What the ledger shows


@dataclass(frozen=True, slots=True)
class Sighting:
    """One pseudonym of one interval, with all that an observer of the ledger can say about it.

    `place` is its first delivery: (height, number of the batch in the block); `rank` its place there among the
    deliveries of that batch, from 0 to 1. `lines` are shares by (source, contract line), `providers` by device, in
    permille. `price` is the mean over its Wh, in µ-currency per kWh, as the transfers before it say.
    """

    start_s: int
    broker: bytes
    pseudonym: bytes
    place: tuple[int, int]
    rank: Fraction
    demanded_wh: int
    lines: dict[tuple[int, int], int]
    providers: dict[str, int]
    price: int


@dataclass(slots=True)
class _Gathered:
    first: Deliver
    place: tuple[int, int]
    rank: Fraction
    by_line: dict[tuple[int, int], int]
    by_device: dict[str, int]
    paid: int
    energy_wh: int


def sightings(world: World) -> list[Sighting]:
    """Everything that was delivered, by interval, broker and pseudonym, from the blocks of a stopped world."""
    sources = {device.device: int(device.source) for device in world.plan.devices}
    prices: dict[str, int] = {}
    found: dict[tuple[int, bytes, bytes], _Gathered] = {}
    for place, batch_key, operations in _batches(world):
        deliveries = [operation for operation in operations if isinstance(operation, Deliver)]
        for operation in operations:
            if isinstance(operation, Transfer):
                prices[operation.asset.device] = operation.price
        for number, delivery in enumerate(deliveries):
            rank = Fraction(number, max(1, len(deliveries) - 1))
            name = (delivery.start_s, batch_key, delivery.pseudonym)
            one = found.setdefault(name, _Gathered(delivery, place, rank, defaultdict(int), defaultdict(int), 0, 0))
            for item in delivery.slices:
                energy_wh = item.to_wh - item.from_wh
                one.by_line[sources[item.asset.device], item.line] += energy_wh
                one.by_device[item.asset.device] += energy_wh
                one.paid += prices.get(item.asset.device, 0) * energy_wh
                one.energy_wh += energy_wh
    return [
        Sighting(
            start_s,
            batch_key,
            pseudonym,
            one.place,
            one.rank,
            one.first.demanded_wh,
            {line: 1_000 * energy_wh // one.energy_wh for line, energy_wh in one.by_line.items()},
            {device: 1_000 * energy_wh // one.energy_wh for device, energy_wh in one.by_device.items()},
            one.paid // one.energy_wh if one.energy_wh else 0,
        )
        for (start_s, batch_key, pseudonym), one in found.items()
    ]


def deliveries_of_batches(world: World) -> Iterator[list[Deliver]]:
    """The deliveries of each batch on the ledger, in their order."""
    for _, _, operations in _batches(world):
        yield [operation for operation in operations if isinstance(operation, Deliver)]


def _batches(world: World) -> Iterator[tuple[tuple[int, int], bytes, list[object]]]:
    """((height, number), key id of the sender, operations) of every batch."""
    ledger = EmbeddedLedger(world.folder / "ledger", world.genesis, "node", key("node"))
    try:
        for height, raw in enumerate(ledger.blocks(1), start=1):
            for number, raw_batch in enumerate(Block.from_payload(parse(raw).payload).batches):
                parsed = parse(raw_batch)
                operations = Batch.from_payload(parsed.payload).operations
                yield (height, number), parsed.key_id, [decode_operation(operation) for operation in operations]
    finally:
        ledger.close()


def truth(world: World) -> dict[tuple[int, bytes], str]:
    """Which meter stood behind a pseudonym; known to the brokers only."""
    known = {}
    for process in world.brokers.values():
        store = BrokerStore(process.config.database)
        for row in store.all_messages(MessageType.DEMAND):
            if row.pseudonym is not None:
                known[row.start_s, row.pseudonym] = row.meter
        store.close()
    return known


# --- The attack

Distance = Callable[[Sighting, Sighting], int]
"""How unlike two sightings of neighbouring intervals are, in one respect."""


def _bits(one: Sighting, other: Sighting) -> int:
    return (int.from_bytes(one.pseudonym, "big") ^ int.from_bytes(other.pseudonym, "big")).bit_count()


def _value(one: Sighting, other: Sighting) -> int:
    return abs(int.from_bytes(one.pseudonym, "big") - int.from_bytes(other.pseudonym, "big"))


def _order(one: Sighting, other: Sighting) -> int:
    return int(1_000_000 * abs(one.rank - other.rank))


def _amount(one: Sighting, other: Sighting) -> int:
    """Relative difference in permille, so that 100 and 200 Wh are as far apart as 1 000 and 2 000."""
    larger = max(one.demanded_wh, other.demanded_wh, 1)
    return 1_000 * abs(one.demanded_wh - other.demanded_wh) // larger


def _unlike(one: Mapping[Any, int], other: Mapping[Any, int]) -> int:
    return sum(abs(one.get(name, 0) - other.get(name, 0)) for name in one.keys() | other.keys())


def _lines(one: Sighting, other: Sighting) -> int:
    return _unlike(one.lines, other.lines)


def _providers(one: Sighting, other: Sighting) -> int:
    return _unlike(one.providers, other.providers)


def _price(one: Sighting, other: Sighting) -> int:
    return abs(one.price - other.price)


def _all(one: Sighting, other: Sighting) -> int:
    return _amount(one, other) + _lines(one, other) + _providers(one, other)


WAYS: Final[dict[str, Distance]] = {
    "pseudonym, bits in common": _bits,
    "pseudonym, as a number": _value,
    "order in the batch": _order,
    "amount": _amount,
    "contract lines and sources": _lines,
    "provider": _providers,
    "price": _price,
    "amount, lines and provider": _all,
}
"""Ways of linking that compare candidates of the same batch only, so that time says nothing."""


@dataclass(frozen=True, slots=True)
class Score:
    """Right guesses of all guesses. `expected` is what guessing blindly among the same candidates would get."""

    guesses: int
    right: int
    expected: Fraction
    rounds: int

    @property
    def bound(self) -> int:
        """What blind guessing exceeds less than twice in a thousand times: three standard deviations above.

        Each round pairs the candidates of one batch with those of the next. Blindly paired, the number of right pairs
        in a round has a variance of at most 1 (fixed points of a random permutation).
        """
        return int(self.expected) + 1 + isqrt(9 * self.rounds)


def attack(found: Sequence[Sighting], known: dict[tuple[int, bytes], str], distance: Distance) -> Score:
    """Link each sighting with one of the interval before, at the same broker and in the same round of deliveries.

    A broker delivers an interval in rounds: from its own stock, from neighbours, at gate 2. Which round a pseudonym
    first appears in is what time tells; `attack_by_time` uses it, here it is held fixed.
    """
    by_round: dict[tuple[bytes, int, int], list[Sighting]] = defaultdict(list)
    rounds: dict[tuple[bytes, int], list[tuple[int, int]]] = defaultdict(list)
    for one in sorted(found, key=lambda item: item.place):
        places = rounds[one.broker, one.start_s]
        if one.place not in places:
            places.append(one.place)
        by_round[one.broker, one.start_s, places.index(one.place)].append(one)
    chance = random.Random(SEED)
    guesses = right = pairs = 0
    expected = Fraction()
    for (broker, start_s, number), targets in by_round.items():
        candidates = by_round.get((broker, start_s - INTERVAL_S, number))
        if not candidates:
            continue
        pairs += 1
        names = {known[one.start_s, one.pseudonym] for one in candidates}
        for target, guessed in zip(targets, _matched(targets, candidates, distance, chance), strict=True):
            guesses += 1
            meter = known[target.start_s, target.pseudonym]
            expected += Fraction(meter in names, len(candidates))
            right += guessed is not None and known[guessed.start_s, guessed.pseudonym] == meter
    return Score(guesses, right, expected, pairs)


def attack_by_time(found: Sequence[Sighting], known: dict[tuple[int, bytes], str]) -> Score:
    """Link by the round of deliveries alone: guess blindly, but among those of the same round."""
    numbered = {}
    rounds: dict[tuple[bytes, int], list[tuple[int, int]]] = defaultdict(list)
    by_interval: dict[tuple[bytes, int], list[Sighting]] = defaultdict(list)
    for one in sorted(found, key=lambda item: item.place):
        places = rounds[one.broker, one.start_s]
        if one.place not in places:
            places.append(one.place)
        numbered[one.start_s, one.pseudonym] = places.index(one.place)
        by_interval[one.broker, one.start_s].append(one)
    guesses = pairs = 0
    right, expected = Fraction(), Fraction()
    for (broker, start_s), targets in by_interval.items():
        candidates = by_interval.get((broker, start_s - INTERVAL_S))
        if not candidates:
            continue
        pairs += 1
        for target in targets:
            meter = known[target.start_s, target.pseudonym]
            same = [
                one for one in candidates if numbered[one.start_s, one.pseudonym] == numbered[start_s, target.pseudonym]
            ]
            guesses += 1
            expected += Fraction(any(known[one.start_s, one.pseudonym] == meter for one in candidates), len(candidates))
            # The mean over all blind guesses, rather than one of them.
            if same:
                right += Fraction(any(known[one.start_s, one.pseudonym] == meter for one in same), len(same))
    return Score(guesses, int(right), expected, pairs)


def _matched(
    targets: Sequence[Sighting], candidates: Sequence[Sighting], distance: Distance, chance: random.Random
) -> list[Sighting | None]:
    """Who belongs to whom: the likest pair first, each candidate once. Ties are decided by chance, not by order."""
    pairs = [
        (distance(target, candidate), chance.random(), index, number)
        for index, target in enumerate(targets)
        for number, candidate in enumerate(candidates)
    ]
    matched: list[Sighting | None] = [None] * len(targets)
    taken: set[int] = set()
    for _, _, index, number in sorted(pairs):
        if matched[index] is None and number not in taken:
            matched[index] = candidates[number]
            taken.add(number)
    return matched


def as_sent(found: Sequence[Sighting], known: dict[tuple[int, bytes], str]) -> list[Sighting]:
    """What the ledger would show if deliveries stood in the order of meters instead of pseudonyms."""
    by_place: dict[tuple[int, int], list[Sighting]] = defaultdict(list)
    for one in found:
        by_place[one.place].append(one)
    sent = []
    for together in by_place.values():
        together.sort(key=lambda one: known[one.start_s, one.pseudonym])
        last = max(1, len(together) - 1)
        sent += [replace(one, rank=Fraction(number, last)) for number, one in enumerate(together)]
    return sent


def run_recorded(folder: Path, intervals: int) -> tuple[World, list[Sighting], dict[tuple[int, bytes], str]]:
    """Let the market happen; what the ledger shows of it, and who was who."""
    world = World(recorded_plan(intervals), folder, SEED)
    world.run()
    return world, sightings(world), truth(world)


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="dengen-linkage-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        _, found, known = run_recorded(folder, 96)
    finally:
        shutil.rmtree(folder)
    starts = {one.start_s for one in found}
    print(f"{len(found)} deliveries in {len(starts)} intervals from {T0}")
    scores = {name: attack(found, known, distance) for name, distance in WAYS.items()}
    scores["round of deliveries (time)"] = attack_by_time(found, known)
    for name, score in scores.items():
        rate, blind = score.right / score.guesses, float(score.expected) / score.guesses
        print(f"{name:28} {score.right:5} of {score.guesses}  {rate:6.1%}  chance {blind:6.1%}  bound {score.bound}")


if __name__ == "__main__":
    main()
