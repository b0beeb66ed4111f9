"""A year of half hours among a million consumers: small enough to send, quick enough to check at a desk.

`make test` takes a fortnight, `make test-long` the year. The size does not depend on the machine and is asserted for
both; the time is asserted for the year, as processor time by the two cores that share the work.
"""

import os
import random
import resource
import time
from dataclasses import dataclass

import pytest
from support.certificate_world import BROKER, CertificateWorld
from support.ledger_world import INTERVAL_S, T0, admit, issue, register

from broker.certificates.document import Certificate
from broker.certificates.workers import verify_on_all_processors
from broker.ledger.operations import AssetId
from broker.ledger.receipts import ProofFailed
from broker.protocol.messages import Carrier
from broker.protocol.sources import Source

FULL = os.environ.get("DENGEN_FULL") == "1"
INTERVALS = 48 * (365 if FULL else 14)
CONSUMERS = 1_000_000
DEVICES = 2_000
PLANTS = [
    (f"plant-{number}", source)
    for number, source in enumerate([Source.SOLAR] * 3 + [Source.WIND] * 3 + [Source.HYDRO] * 3)
]
OPERATIONS_OF_AN_INTERVAL = 2 * DEVICES + CONSUMERS + 1
"""An issue and a transfer for each device, which stand together at its begin; a delivery for each consumer; a close."""


@dataclass(frozen=True)
class Year:
    world: CertificateWorld
    certificate: Certificate
    raw: bytes


@pytest.fixture(scope="module")
def year() -> Year:
    """Two slices by night and three by day, each of another device."""
    chance = random.Random(1)
    world = CertificateWorld(size=1_000 + INTERVALS * OPERATIONS_OF_AN_INTERVAL)
    world.state(0, register(BROKER))
    for number, (name, source) in enumerate(PLANTS):
        world.state(10 + number, admit(name, source=source, capacity_w=10_000_000))
    for interval in range(INTERVALS):
        start_s = T0 + interval * INTERVAL_S
        first = 1_000 + interval * OPERATIONS_OF_AN_INTERVAL
        sources = [3, 6] + [0] * (16 <= interval % 48 < 36)
        slices = []
        for lowest, place in zip(sources, chance.sample(range(DEVICES), len(sources)), strict=True):
            name = PLANTS[lowest + chance.randrange(3)][0]
            world.read(first + 2 * place, issue(name, 3_000_000 + chance.randrange(1_000), start_s))
            from_wh = chance.randrange(2_000_000)
            slices.append((AssetId(name, Carrier.ELECTRICITY, start_s, 0), from_wh, from_wh + 100))
        demanded_wh = 100 * len(slices) + 3
        committed = world.demand(start_s, demanded_wh)
        place = first + 2 * DEVICES + chance.randrange(CONSUMERS)
        world.deliver(place, start_s, demanded_wh, committed, *slices)
    world.closes(world.size - 1, start_s, demanded_wh, committed)
    certificate = world.certificate(T0, T0 + INTERVALS * INTERVAL_S)
    return Year(world, certificate, world.seal(certificate))


def test_it_takes_at_most_two_kilobytes_a_half_hour(year: Year) -> None:
    assert len(year.raw) <= 2_000 * INTERVALS


def test_it_verifies_in_under_five_seconds_on_two_cores(year: Year) -> None:
    """The meters' signatures, two thirds of the work, are checked by both cores while one of them follows the proof."""
    before = _cpu_s()
    began_s = time.monotonic()
    verified = verify_on_all_processors(year.raw, year.world.trust)
    wall_s, (own_s, helpers_s) = (
        time.monotonic() - began_s,
        [now - then for now, then in zip(_cpu_s(), before, strict=True)],
    )
    assert verified.contents.certificate.totals.unmatched_wh == 3 * INTERVALS
    print(
        f"{INTERVALS} half hours, {len(year.raw) // INTERVALS} bytes each: {own_s + helpers_s:.2f} s of processor,"
        f" {own_s:.2f} s of them in the first process; {wall_s:.2f} s on the clock"
    )
    # Other tests run beside this one, so the clock says little: what two cores with nothing else to do would take.
    assert max(own_s, (own_s + helpers_s) / 2) < (5 if FULL else 1)


def test_a_signature_that_fails_is_found_wherever_it_is_checked(year: Year) -> None:
    """The last of them, by another process."""
    world = year.world
    last = max(range(len(world.readings)), key=lambda number: world.readings[number].leaf)
    reading = world.readings[last]
    world.readings[last] = reading._replace(operation=reading.operation[:-64] + bytes(64))
    try:
        certificate = world.certificate(T0, T0 + INTERVALS * INTERVAL_S)
    finally:
        world.readings[last] = reading
    assert certificate.issues[-1].signature == bytes(64)
    with pytest.raises(ProofFailed, match="the meter did not sign the reading"):
        verify_on_all_processors(world.seal(certificate), world.trust)


def _cpu_s() -> list[float]:
    """Processor time of this process, and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return [one.ru_utime + one.ru_stime for one in used]
