"""Certificates of intervals that are corrected: what was issued before is provisional and known as overtaken, what is
issued after says what the ledger has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.ledger_world import key

from broker.certificates.standing import Standing, standing_in
from broker.certificates.verify import Verified, verify_certificate
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.receipts import ProofFailed, verify_checkpoint
from broker.ledger.trust import read_trust, trust_of
from broker.protocol.messages import Quality
from broker.protocol.sources import Source
from broker.service.disclosure import check_disclosure, disclose
from broker.service.pseudonyms import day_of
from broker.service.store import BrokerStore
from simulation import audit
from simulation.world import INTERVAL_S, T0, ConsumerPlan, DevicePlan, Plan, World

CORRECTED_S = 3 * INTERVAL_S
"""How long after the end of an interval it is corrected: two more are closed by then."""

BEFORE_S, AFTER_S = T0 + 3 * INTERVAL_S, T0 + 7 * INTERVAL_S
PLAN = Plan(
    ("east",),
    "east",
    (
        ConsumerPlan("anna", "east", (("solar", 50), ("wind", 50)), (400, 300, 300)),
        ConsumerPlan("ben", "east", (("wind", 100),), (200, 100, 100)),
    ),
    (
        DevicePlan("mill", "ola", "east", Source.WIND, (500, 500, 500)),
        DevicePlan("roof", "ola", "east", Source.SOLAR, (300, 500, 500)),
        DevicePlan("farm", "uwe", "east", Source.WIND, (100, 0, 0)),
    ),
)
DAY_END_S = T0 + 2 * INTERVAL_S


class Run:
    """A world before its correction, with anna's certificate of the first day, and after it."""

    def __init__(self, folder: Path, plan: Plan = PLAN) -> None:
        self.world = World(plan, folder)

    def corrected(self, meter: str, energy_wh: int, **changes: object) -> "Run":
        value = self.world.meter_value(meter, T0, energy_wh, **({"revision": 1} | changes))
        self.world.send(meter, value, T0 + INTERVAL_S + CORRECTED_S)
        return self

    def run(self) -> tuple[bytes, bytes]:
        """Anna's certificates from before and after the correction; all that must hold of both is held."""
        books = self.world.run(BEFORE_S)
        audit.check(self.world, books)
        before = audit.check_certificates(self.world, books)
        assert self.standing(before["anna"]).faults == ()
        first = self.day("anna")
        assert self.verified(first).contents.is_provisional
        books = self.world.run(AFTER_S)
        audit.check(self.world, books)
        audit.check_certificates(self.world, books)
        second = self.day("anna")
        assert self.standing(second) == Standing(self.height, False, ())
        self._check_disclosure(self.verified(second))
        return first, second

    def day(self, meter: str) -> bytes:
        return audit.certificate_of(self.world, meter, "east", DAY_END_S)

    @property
    def height(self) -> int:
        return audit.head_of(self.world)[0]

    def verified(self, raw: bytes) -> Verified:
        return verify_certificate(raw, read_trust(json.dumps(trust_of(self.world.genesis))))

    def standing(self, raw: bytes) -> Standing:
        return standing_in(self.verified(raw), self.world.folder / "ledger")

    def given(self, raw: bytes, index: int = 0) -> dict[str, int]:
        """Wh of an interval by device."""
        contents = self.verified(raw).contents
        found: dict[str, int] = {}
        for line in contents.lines:
            if line.start_s == T0 + index * INTERVAL_S:
                device = contents.devices[line.device].admission.device
                found[device] = found.get(device, 0) + line.energy_wh
        return found

    def demanded_wh(self, raw: bytes) -> tuple[int, ...]:
        return self.verified(raw).contents.demanded_wh

    def _check_disclosure(self, verified: Verified) -> None:
        """The same day, opened to an auditor, says the same."""
        store = BrokerStore(self.world.brokers["east"].config.database)
        report = check_disclosure(
            disclose(store, self.world.genesis, "east", "anna", day_of(T0)), self.world.folder / "ledger"
        )
        store.close()
        assert report.faults == ()
        given: dict[tuple[int, str], int] = {}
        for interval in report.intervals:
            for delivery in interval.deliveries:
                place = interval.start_s, delivery.device
                given[place] = given.get(place, 0) + delivery.energy_wh
        contents = verified.contents
        listed: dict[tuple[int, str], int] = {}
        for line in contents.lines:
            place = line.start_s, contents.devices[line.device].admission.device
            listed[place] = listed.get(place, 0) + line.energy_wh
        assert given == listed
        assert [interval.demanded_wh for interval in report.intervals] == list(contents.demanded_wh)


def test_a_reading_corrected_down_takes_back_what_was_delivered(folder: Path) -> None:
    """Of the roof's 300 Wh anna had 200. It made 120, there is no other sun, and her wind line has its share."""
    run = Run(folder).corrected("roof", 120)
    first, second = run.run()
    assert run.given(first)["roof"] == 200
    assert run.given(second)["roof"] == 120
    (fault, *_) = run.standing(first).faults
    assert "of 200 Wh that roof made at 2026-01-31T23:00:00Z the ledger has 120" in fault
    assert "have the broker issue it anew" in fault
    totals = run.verified(second).contents.certificate.totals
    assert totals.unmatched_wh == run.verified(first).contents.certificate.totals.unmatched_wh + 80


def test_a_reading_corrected_down_is_made_good_from_another_device(folder: Path) -> None:
    """Anna had the farm's 100 Wh. It made 40, and of the mill there are more left."""
    run = Run(folder).corrected("farm", 40)
    first, second = run.run()
    assert run.given(first)["farm"] == 100
    assert run.given(second)["farm"] == 40
    assert run.given(second)["mill"] == run.given(first)["mill"] + 60
    assert sum(run.given(second).values()) == 400
    deliveries = run.verified(second).contents.certificate.intervals[0].deliveries
    assert len(deliveries) > 1
    assert run.verified(second).contents.certificate.intervals[0].withdrawn


def test_a_demand_corrected_down_gives_back_the_excess(folder: Path) -> None:
    run = Run(folder).corrected("anna", 150)
    first, second = run.run()
    assert run.demanded_wh(first) == (400, 300)
    assert run.demanded_wh(second) == (150, 300)
    assert sum(run.given(second).values()) == 150
    faults = run.standing(first).faults
    assert "the demand was corrected since height" in faults[0]
    assert "from 400 to 150 Wh" in faults[0]
    assert any("was taken back" in fault for fault in faults[1:])


def test_what_a_reading_corrected_up_adds_is_certified_as_that_revisions(folder: Path) -> None:
    """150 Wh of wind for 200 Wh of anna's and 200 Wh of ben's, then 450; and anna needed 100 Wh more."""
    mill = replace(PLAN.devices[0], energies_wh=(150, 500, 500))
    run = Run(folder, replace(PLAN, devices=(mill, PLAN.devices[1]))).corrected("mill", 450)
    more = run.world.meter_value("anna", T0, 500, revision=1)
    run.world.send("anna", more, T0 + 2 * INTERVAL_S + CORRECTED_S)
    first, second = run.run()
    assert run.demanded_wh(second) == (500, 300)
    assert run.given(second)["mill"] > run.given(first)["mill"]
    faults = run.standing(first).faults
    assert "from 400 to 500 Wh" in faults[0]
    assert "Wh delivered, and it lists" in faults[1]
    revisions = {asset.revision for asset in run.verified(second).contents.assets if asset.device == "mill"}
    assert revisions == {0, 1}
    used = {run.verified(second).contents.assets[line.issue] for line in run.verified(second).contents.lines}
    assert any(asset.revision == 1 for asset in used)


def test_a_missing_interval_is_left_out_then_estimated_and_then_measured(folder: Path) -> None:
    anna = replace(PLAN.consumers[0], energies_wh=())
    run = Run(folder, replace(PLAN, consumers=(PLAN.consumers[1], anna)))
    world = run.world
    for index, energy_wh in ((0, 0), (1, 300)):
        quality = Quality.MEASURED if energy_wh else Quality.MISSING
        start_s = T0 + index * INTERVAL_S
        world.send("anna", world.meter_value("anna", start_s, energy_wh, quality=quality), start_s + INTERVAL_S)
    run.corrected("anna", 320, quality=Quality.ESTIMATED)
    first, estimated = run.run()
    assert run.demanded_wh(first) == (300,)
    assert run.demanded_wh(estimated) == (320, 300)
    (fault,) = run.standing(first).faults
    assert "the ledger has a demand of 320 Wh, and it leaves this interval out" in fault
    world.send("anna", world.meter_value("anna", T0, 280, revision=2), AFTER_S + INTERVAL_S)
    books = world.run(AFTER_S + 3 * INTERVAL_S)
    audit.check(world, books)
    audit.check_certificates(world, books)
    measured = run.day("anna")
    assert run.demanded_wh(measured) == (280, 300)
    demands = run.verified(measured).contents.certificate.intervals[0].demands
    assert [(demand.revision, demand.quality) for demand in demands] == [
        (0, Quality.MISSING),
        (1, Quality.ESTIMATED),
        (2, Quality.MEASURED),
    ]
    assert "from 320 to 280 Wh" in run.standing(estimated).faults[0]


def test_who_has_a_later_checkpoint_knows_a_stale_certificate_without_the_ledger(folder: Path) -> None:
    run = Run(folder).corrected("roof", 120)
    first, second = run.run()
    ledger = EmbeddedLedger(folder / "ledger", run.world.genesis, "node", key("node"))
    sealed = ledger.checkpoint()
    ledger.close()
    assert sealed is not None
    trust = read_trust(json.dumps(trust_of(run.world.genesis)))
    known, _ = verify_checkpoint(sealed, trust)
    # By itself it is true: it says what was so at its height, and that it is provisional.
    assert verify_certificate(first, trust).contents.is_provisional
    with pytest.raises(ProofFailed, match="its checkpoint is stale"):
        verify_certificate(first, trust, known)
    assert verify_certificate(second, trust, known)


def test_after_the_deadline_it_is_settled_and_a_later_correction_leaves_it_as_it_is(folder: Path) -> None:
    run = Run(folder)
    run.world.genesis = replace(run.world.genesis, correction_deadline_s=INTERVAL_S)
    (folder / "genesis.cbor").write_bytes(run.world.genesis.to_bytes())
    run.corrected("roof", 120)
    books = run.world.run(T0 + 2 * INTERVAL_S)
    assert run.verified(audit.certificate_of(run.world, "anna", "east", T0 + INTERVAL_S)).contents.is_provisional
    run.world.run(T0 + 4 * INTERVAL_S)
    settled = run.day("anna")
    assert not run.verified(settled).contents.is_provisional
    assert run.standing(settled).is_settled
    books = run.world.run(AFTER_S)
    audit.check(run.world, books)
    assert run.standing(settled) == Standing(run.height, True, ())
    assert run.verified(run.day("anna")).contents.lines == run.verified(settled).contents.lines
