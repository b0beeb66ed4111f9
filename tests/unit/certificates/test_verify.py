"""A certificate is true, or it is refused with the reason: nothing of it can be another consumer's, device's or time's.

Most forgeries here are signed anew by the broker itself, so that what refuses them is the proof and not the signature.
"""

from collections import Counter
from dataclasses import replace

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.certificate_world import (
    BROKER,
    CertificateWorld,
    demand_of,
    key_of,
    name_of,
    one_interval,
)
from support.ledger_world import INTERVAL_S, T0, admit, correct, genesis, issue, key, reading, register, rotate, seal
from support.schema import require

from broker.certificates.contents import totals_of
from broker.certificates.document import Certificate, Factor, GivenSlice, Withdrawn, read_certificate
from broker.certificates.verify import Verified, verify_certificate
from broker.ledger.merkle import leaf_hash
from broker.ledger.operations import AssetId, CorrectDemand, Issue, ReturnedSlice, Window, encode_operation
from broker.ledger.proofs import ProvenOperation
from broker.ledger.receipts import ProofFailed
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Carrier, KeyHolder, Role
from broker.protocol.sources import Source
from broker.service.pseudonyms import DAY_S, commitment

WORLD = one_interval()
TRUE = WORLD.certificate()
RAW = WORLD.seal(TRUE)


def check(world: CertificateWorld, certificate: Certificate, by: str = BROKER) -> Verified:
    return verify_certificate(world.seal(certificate, by), world.trust)


def refused(certificate: Certificate, world: CertificateWorld = WORLD, by: str = BROKER) -> str:
    with pytest.raises(ProtocolError) as caught:
        check(world, certificate, by)
    return str(caught.value)


def with_given(certificate: Certificate, *slices: GivenSlice) -> Certificate:
    interval = certificate.intervals[0]
    delivery = interval.deliveries[0]._replace(slices=slices)
    return replace(certificate, intervals=(interval._replace(deliveries=(delivery,)),))


def asset(device: str, start_s: int = T0, revision: int = 0) -> AssetId:
    return AssetId(device, Carrier.ELECTRICITY, start_s, revision)


# --- What is true


def test_a_true_certificate_verifies_with_nothing_but_the_trust_file() -> None:
    verified = verify_certificate(RAW, WORLD.trust)
    totals = verified.contents.certificate.totals
    assert (totals.demanded_wh, totals.delivered_wh, totals.unmatched_wh) == (300, 260, 40)
    assert [(total.source, total.energy_wh) for total in totals.by_source] == [(Source.SOLAR, 200), (Source.WIND, 60)]
    # 200 Wh at 48 g and 60 Wh at 12 g per kWh, in mg.
    assert totals.co2_mg == 200 * 48 + 60 * 12
    assert totals.without_factor_wh == 40
    assert verified.validator == "node"


def test_a_certificate_reads_back_as_it_was_written() -> None:
    assert read_certificate(RAW).certificate == TRUE


def test_it_is_provisional_until_the_market_clock_has_passed_the_correction_deadline() -> None:
    deadline_s = T0 + INTERVAL_S + WORLD.founded.correction_deadline_s
    for settled_s, expected in ((deadline_s - 1, True), (deadline_s, False)):
        assert check(WORLD, replace(TRUE, settled_s=settled_s)).contents.is_provisional is expected


@pytest.mark.parametrize(("window", "end_s"), [(Window.DAY, T0 + DAY_S), (Window.MONTH, T0 + 17 * DAY_S)])
def test_it_is_provisional_as_long_as_the_window_of_a_demand_is_open(window: Window, end_s: int) -> None:
    """T0 is the 14th of November."""
    world = delivering(T0, window=window)
    certificate = world.certificate()
    settled_s = end_s + WORLD.founded.correction_deadline_s
    assert check(world, replace(certificate, settled_s=settled_s - 1)).contents.is_provisional
    assert not check(world, replace(certificate, settled_s=settled_s)).contents.is_provisional


def test_a_whole_day_opens_by_its_day_key_and_a_part_of_a_day_by_the_keys_of_its_intervals() -> None:
    """What is disclosed opens the period and nothing else."""
    whole = WORLD.certificate(T0, T0 + DAY_S)
    assert (len(whole.day_keys), len(whole.interval_keys)) == (1, 0)
    assert (len(TRUE.day_keys), len(TRUE.interval_keys)) == (0, 1)
    assert check(WORLD, whole).contents.lines == check(WORLD, TRUE).contents.lines


# --- Altered bytes


@given(st.integers(0, len(RAW) - 1), st.integers(0, 7))
def test_altered_in_any_bit_it_fails(position: int, bit: int) -> None:
    altered = bytearray(RAW)
    altered[position] ^= 1 << bit
    with pytest.raises(ProtocolError):
        verify_certificate(bytes(altered), WORLD.trust)


def test_altered_in_any_byte_it_fails_with_the_reason() -> None:
    reasons = Counter(altered_at(position) for position in range(len(RAW)))
    assert sum(reasons.values()) == len(RAW)
    assert set(reasons) == {"signature", "other ledger", "encoding", "stranger", "other registration"}
    assert reasons["signature"] > len(RAW) * 3 / 4


def altered_at(position: int) -> str:
    """Why a certificate with that byte changed is refused."""
    altered = RAW[:position] + bytes([RAW[position] ^ 0x55]) + RAW[position + 1 :]
    with pytest.raises(ProtocolError) as caught:
        verify_certificate(altered, WORLD.trust)
    for reason, text in (
        ("other ledger", "it is about another ledger than test-ledger"),
        ("other registration", "it holds a registration that is not the one of broker"),
        ("stranger", "is not registered here"),
        ("encoding", "expected "),
        # The broker's over all of it, or a registrar's over what it states.
        ("signature", "does not fit: the certificate was changed after it was signed"),
        ("signature", "does not verify for registrar"),
    ):
        if text in str(caught.value):
            return reason
    raise AssertionError(f"byte {position}: {caught.value}")


@pytest.mark.parametrize("raw", [RAW + b"\x00", RAW[:-1], RAW[1:], b"", b"\xd2\x84"])
def test_bytes_that_are_no_certificate_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        verify_certificate(raw, WORLD.trust)


# --- Proofs


def test_swapped_proofs_fail() -> None:
    hashes = [TRUE.hashes[at : at + 32] for at in range(0, len(TRUE.hashes), 32)]
    hashes[3], hashes[4] = hashes[4], hashes[3]
    assert "do not lead to the root" in refused(replace(TRUE, hashes=b"".join(hashes)))
    other = one_interval()
    other.size += 1
    assert "do not lead to the root" in refused(replace(TRUE, hashes=other.certificate().hashes))
    assert "no whole hashes" in refused(replace(TRUE, hashes=TRUE.hashes[:-1]))


def test_places_of_operations_cannot_be_swapped() -> None:
    one, other = TRUE.issues
    swapped = (one._replace(leaf=other.leaf), other._replace(leaf=one.leaf))
    assert "do not lead to the root" in refused(replace(TRUE, issues=swapped))


def test_the_checkpoint_must_be_a_validators_of_this_ledger() -> None:
    stranger = one_interval()
    stranger.founded = genesis(currency="GBP")
    certificate = stranger.certificate()
    assert "another ledger" in refused(certificate, WORLD)
    assert "another ledger" in refused(replace(TRUE, root=certificate.root))


def test_a_certificate_of_another_ledger_fails_even_with_the_same_name_and_keys() -> None:
    stranger = one_interval()
    stranger.founded = genesis(currency="GBP")
    with pytest.raises(ProofFailed, match="another ledger than test-ledger"):
        verify_certificate(stranger.seal(stranger.certificate()), WORLD.trust)


# --- Stale


def test_a_checkpoint_older_than_a_known_one_is_stale() -> None:
    checkpoint = verify_certificate(RAW, WORLD.trust).checkpoint
    assert verify_certificate(RAW, WORLD.trust, checkpoint)
    with pytest.raises(ProofFailed, match="stale: height 1000, and the ledger was at 1001"):
        verify_certificate(RAW, WORLD.trust, replace(checkpoint, height=1_001))


def test_two_histories_of_one_ledger_are_told() -> None:
    checkpoint = verify_certificate(RAW, WORLD.trust).checkpoint
    with pytest.raises(ProofFailed, match="two histories"):
        verify_certificate(RAW, WORLD.trust, replace(checkpoint, root=b"x" * 32))


def test_without_the_close_of_its_last_interval_the_checkpoint_is_stale() -> None:
    without = tuple(proven for proven in TRUE.operations if proven != WORLD.close)
    assert "does not hold exactly one close" in refused(replace(TRUE, operations=without))
    early = one_interval()
    early.demand(T0 - INTERVAL_S, 5)
    early.closes(9_000, T0 - INTERVAL_S, 5, b"c" * 32)
    assert early.close is not None
    operations = tuple(sorted([*without, early.close]))
    assert "stale: it does not include the close" in refused(replace(TRUE, operations=operations))


def test_the_close_must_count_this_very_demand() -> None:
    world = one_interval()
    world.closes(9_000, T0, 300, b"another commitment of 32 bytes..")
    genuine, world.close_leaves = world.close_leaves, WORLD.close_leaves
    certificate = world.certificate()
    assert world.close_leaves != genuine
    assert "not among those that the shown close counts" in refused(certificate, world)


# --- Whose it is


def test_another_consumers_slices_fail() -> None:
    """As they stand on the ledger, and as if they had been delivered to this meter."""
    interval = TRUE.intervals[0]
    theirs = interval._replace(pseudonym=name_of(T0, meter="neighbours"))
    assert "pseudonym is that of another consumer" in refused(replace(TRUE, intervals=(theirs,)))
    given_to_them = one_interval()
    given_to_them.deliveries.clear()
    committed = commitment(key_of(T0), demand_of(T0, 300, meter="neighbours"))
    slices = (asset("solar-1"), 100, 300), (asset("wind-1"), 0, 60)
    given_to_them.deliver(500, T0, 300, committed, *slices, meter="neighbours")
    head = given_to_them.signed_head()
    forged = replace(TRUE, checkpoint=head.checkpoint, root=head.root)
    assert "do not lead to the root" in refused(forged)


def test_a_demand_that_the_meter_did_not_sign_fails() -> None:
    """The broker makes up a demand, commits to it on the ledger and certifies it."""
    world = one_interval()
    raw = bytearray(world.demands[T0][0])
    raw[-1] ^= 1
    world.demands[T0] = [bytes(raw)]
    committed = commitment(key_of(T0), bytes(raw))
    world.deliveries.clear()
    world.deliver(500, T0, 300, committed, (asset("solar-1"), 100, 300), (asset("wind-1"), 0, 60))
    world.closes(9_000, T0, 300, committed)
    assert "the meter did not sign the demand" in refused(world.certificate(), world)


def test_a_reading_that_the_meter_did_not_sign_fails() -> None:
    """Validators who looked away put it on the ledger."""
    world = one_interval()
    world.readings[0] = ProvenOperation(100, encode_operation(issue("solar-1", 900, by="wind-1")))
    with pytest.raises(ValueError, match="is not in"):
        world.certificate()
    forged = bytearray(WORLD.readings[0].operation)
    forged[-1] ^= 1
    world.readings[0] = ProvenOperation(100, bytes(forged))
    assert "the meter did not sign the reading" in refused(world.certificate(), world)


def test_a_deliver_of_another_interval_fails() -> None:
    interval = TRUE.intervals[0]
    later = interval._replace(number=interval.number + 1)
    day = WORLD.certificate(T0, T0 + DAY_S)
    assert "or of another interval" in refused(replace(day, intervals=(later,)))
    # With a key that is called another interval's: the ledger's own bytes say when it was.
    unmatched = later._replace(deliveries=(interval.deliveries[0]._replace(slices=()),))
    keys = tuple(one._replace(at=T0 + INTERVAL_S) for one in TRUE.interval_keys)
    totals = totals_of((), (), (300,), TRUE.factors)
    moved = replace(TRUE, intervals=(unmatched,), interval_keys=keys, to_s=T0 + 2 * INTERVAL_S, totals=totals)
    assert "stale: it does not include the close" in refused(moved)
    assert "outside the period" in refused(replace(TRUE, from_s=T0 + INTERVAL_S, to_s=T0 + 2 * INTERVAL_S))
    assert "outside the period" in refused(replace(TRUE, to_s=T0 + INTERVAL_S - 1))
    assert "listed twice" in refused(replace(TRUE, intervals=(interval, interval)))


def test_keys_of_other_intervals_open_nothing() -> None:
    assert "does not disclose the key" in refused(replace(TRUE, interval_keys=()))
    wrong = (TRUE.interval_keys[0]._replace(key=key_of(T0 + INTERVAL_S)),)
    assert "pseudonym is that of another" in refused(replace(TRUE, interval_keys=wrong))


# --- Which Wh


def test_double_listed_slices_fail() -> None:
    interval = TRUE.intervals[0]
    (delivery,) = interval.deliveries
    twice = replace(TRUE, intervals=(interval._replace(deliveries=(delivery, delivery)),))
    assert "listed twice" in refused(twice)
    one, other = delivery.slices
    assert "listed twice" in refused(with_given(TRUE, one, one, other))
    overlapping = (one._replace(to_wh=200), one._replace(from_wh=199), other)
    assert "are listed twice" in refused(with_given(TRUE, *overlapping))


def test_wh_that_two_intervals_list_fail() -> None:
    """Validators let them be delivered twice, for two demands of one day."""
    world = one_interval()
    later_s = T0 + INTERVAL_S
    committed = world.demand(later_s, 50)
    world.deliver(600, later_s, 50, committed, (asset("solar-1"), 250, 300), window=Window.DAY)
    world.closes(9_000, later_s, 50, committed)
    assert "Wh 250 to 300 of solar-1 are listed twice" in refused(world.certificate(T0, later_s + INTERVAL_S), world)


def test_the_same_operation_in_two_places_of_the_file_fails() -> None:
    doubled = (TRUE.operations[0], *TRUE.operations)
    assert "is listed twice" in refused(replace(TRUE, operations=doubled))
    again = (*TRUE.issues, TRUE.issues[0])
    assert "is listed twice" in refused(replace(TRUE, issues=again))


def test_slices_are_what_the_ledger_has_to_the_wh() -> None:
    one, other = TRUE.intervals[0].deliveries[0].slices
    assert "do not lead to the root" in refused(with_given(TRUE, one._replace(from_wh=101), other))
    assert "do not lead to the root" in refused(with_given(TRUE, one._replace(issue=1, from_wh=110), other))
    assert "an issue that it does not hold" in refused(with_given(TRUE, one._replace(issue=7), other))


def test_sums_that_do_not_add_up_fail() -> None:
    totals = TRUE.totals
    for wrong in (
        totals._replace(delivered_wh=261),
        totals._replace(demanded_wh=299),
        totals._replace(unmatched_wh=0),
        totals._replace(same_interval_wh=259),
        totals._replace(co2_mg=0),
        totals._replace(by_source=totals.by_source[:1]),
        totals._replace(by_source=(totals.by_source[0]._replace(source=Source.WIND), totals.by_source[1])),
    ):
        assert "the sums that it states are not those of its lines" in refused(replace(TRUE, totals=wrong))


def test_co2_follows_from_the_stated_factors() -> None:
    factors = tuple(Factor(number, mg * 2) for number, mg in TRUE.factors)
    assert "the sums" in refused(replace(TRUE, factors=factors))


def test_more_than_was_demanded_fails() -> None:
    world = one_interval()
    world.deliveries.clear()
    world.deliver(500, T0, 300, world.demand(T0, 300), (asset("solar-1"), 0, 301))
    assert "301 Wh are given for 300 Wh" in refused(replace(world.certificate(), totals=TRUE.totals), world)


def delivering(start_s: int, area: str = "north", window: Window = Window.INTERVAL) -> CertificateWorld:
    """A ledger that delivered what solar-1 made at `start_s` for the demand of T0."""
    world = CertificateWorld()
    world.state(0, register(BROKER))
    world.state(1, admit("solar-1"))
    world.read(100, issue("solar-1", 900, start_s))
    committed = world.demand(T0, 300)
    world.deliver(500, T0, 300, committed, (asset("solar-1", start_s), 0, 300), area=area, window=window)
    world.closes(9_000, T0, 300, committed)
    return world


def test_slices_outside_the_window_fail() -> None:
    for window, inside, outside in (
        (Window.INTERVAL, T0, T0 - INTERVAL_S),
        (Window.DAY, T0 + 3 * INTERVAL_S, T0 - INTERVAL_S),
        (Window.MONTH, T0 - 13 * DAY_S, T0 - 14 * DAY_S),
    ):
        world = delivering(inside, window=window)
        totals = check(world, world.certificate()).contents.certificate.totals
        assert totals.same_interval_wh == (300 if inside == T0 else 0)
        world = delivering(outside, window=window)
        assert f"is outside the {window.name.lower()} of the demand" in refused(world.certificate(), world)


def test_slices_outside_the_area_fail() -> None:
    world = delivering(T0, area="south")
    assert "solar-1 feeds north, the demand is in south" in refused(world.certificate(), world)


# --- Who made it


def test_a_device_that_no_registrar_admitted_fails() -> None:
    world = one_interval()
    world.statements[1] = ProvenOperation(1, encode_operation(admit("solar-1", by="alice")))
    assert "is not registered" in refused(world.certificate(), world)


def test_the_source_is_the_one_that_the_registrar_admitted() -> None:
    """Certifying coal as solar needs another admission, which then is not the one on the ledger."""
    coal = one_interval()
    coal.statements[1] = ProvenOperation(1, encode_operation(admit("solar-1", source=Source.COAL)))
    certificate = coal.certificate()
    assert certificate.totals.by_source[0].source is Source.WIND
    assert "do not lead to the root" in refused(replace(certificate, operations=TRUE.operations, totals=TRUE.totals))


def test_more_than_a_device_can_make_fails() -> None:
    world = delivering(T0)
    world.statements[1] = ProvenOperation(1, encode_operation(admit("solar-1", capacity_w=500)))
    assert "nothing that solar-1 can have made" in refused(world.certificate(), world)
    world.readings[0] = ProvenOperation(100, encode_operation(issue("solar-1", 275)))
    assert "300 Wh are more than solar-1 makes in an interval with 500 W" in refused(world.certificate(), world)


def test_before_its_commissioning_a_device_made_nothing() -> None:
    world = delivering(T0)
    world.statements[1] = ProvenOperation(1, encode_operation(admit("solar-1", commissioned_s=T0 + 1)))
    assert "nothing that solar-1 can have made" in refused(world.certificate(), world)


def test_wh_above_the_meters_count_are_told_as_carried_over() -> None:
    world = delivering(T0)
    world.readings[0] = ProvenOperation(100, encode_operation(issue("solar-1", 250)))
    assert check(world, world.certificate()).carried_wh == 50


def test_a_rotated_meter_key_serves_in_its_time() -> None:
    world = delivering(T0)
    handed_over = rotate("solar-1", "solar-1-new", holder=KeyHolder.DEVICE, from_s=T0)
    world.state(50, handed_over)
    assert "had another key by then" in refused(world.certificate(), world)
    by_the_new_key = Issue(seal(reading("solar-1", 900), "solar-1", with_key="solar-1-new"))
    world.readings[0] = ProvenOperation(100, encode_operation(by_the_new_key))
    assert check(world, world.certificate()).contents.lines


def test_a_rotation_that_the_holder_did_not_sign_fails() -> None:
    world = delivering(T0)
    world.state(50, rotate("solar-1", "solar-1-new", holder=KeyHolder.DEVICE, by="alice"))
    assert "is not registered" in refused(world.certificate(), world)


# --- Who says so


def test_somebody_elses_certificate_in_the_brokers_name_fails() -> None:
    assert "the signature of b1 does not fit" in refused(TRUE, by="b2")


def test_a_broker_that_no_registrar_registered_fails() -> None:
    world = one_interval()
    world.statements[0] = ProvenOperation(0, encode_operation(register(BROKER, by="alice")))
    assert "is not registered" in refused(world.certificate(), world)
    world.statements[0] = ProvenOperation(0, encode_operation(register(BROKER, role=Role.PROVIDER)))
    assert "not the one of broker b1" in refused(world.certificate(), world)
    assert "does not show that a registrar registered" in refused(
        replace(TRUE, operations=TRUE.operations[1:], closing=TRUE.closing._replace(operation=2))
    )


def test_a_broker_whose_key_was_rotated_signs_with_the_new_one() -> None:
    world = one_interval()
    world.state(60, rotate(BROKER, "b1-new"))
    certificate = world.certificate()
    assert check(world, certificate, by="b1-new")
    assert "the signature of b1 does not fit" in refused(certificate, world, by=BROKER)


def test_operations_that_prove_nothing_have_no_place_in_it() -> None:
    operations = tuple(sorted([*TRUE.operations, ProvenOperation(5, WORLD.readings[0].operation)]))
    assert "proves nothing" in refused(replace(TRUE, operations=operations, closing=TRUE.closing._replace(operation=4)))


# --- Corrections


def corrected() -> CertificateWorld:
    """The demand was 300 Wh, corrected to 150: the last 110 Wh of the solar slice went back."""
    world = one_interval()
    committed = world.demand(T0, 150, revision=1)
    returned = (ReturnedSlice(asset("solar-1"), 100, 190, 300),)
    operation = CorrectDemand(name_of(T0), T0, 1, 150, committed, returned)
    world.deliveries.append(ProvenOperation(700, encode_operation(operation)))
    world.ends[asset("solar-1"), 100] = 190
    return world


def test_a_demand_corrected_down_counts_with_what_was_returned_taken_off() -> None:
    world = corrected()
    totals = check(world, world.certificate()).contents.certificate.totals
    assert (totals.demanded_wh, totals.delivered_wh) == (150, 150)


def test_a_shown_correction_of_the_demand_cannot_be_passed_over() -> None:
    world = corrected()
    certificate = world.certificate()
    interval = certificate.intervals[0]
    first_only = (interval._replace(demands=interval.demands[:1]),)
    assert "not one more than the corrections" in refused(replace(certificate, intervals=first_only), world)
    other_amount = (interval._replace(demands=(interval.demands[0], interval.demands[1]._replace(energy_wh=160))),)
    assert "not the one on the ledger" in refused(replace(certificate, intervals=other_amount), world)


def test_a_return_of_what_is_not_listed_fails() -> None:
    world = corrected()
    certificate = world.certificate()
    operation = CorrectDemand(name_of(T0), T0, 1, 150, b"c" * 32, (ReturnedSlice(asset("wind-1"), 5, 6, 60),))
    changed = tuple(
        item._replace(operation=encode_operation(operation)) if item.leaf == 700 else item
        for item in certificate.operations
    )
    assert "that the certificate does not list" in refused(replace(certificate, operations=changed), world)


def test_a_withdrawal_shortens_the_slice_and_needs_the_correction_of_the_reading() -> None:
    world = one_interval()
    world.ends[asset("solar-1"), 100] = 150
    unexplained = world.certificate()
    assert unexplained.intervals[0].withdrawn == (Withdrawn(0, 100, 150),)
    assert "no correction of the reading is shown" in refused(unexplained, world)
    world.read(600, correct("solar-1", 150, revision=1))
    verified = check(world, world.certificate())
    assert verified.contents.certificate.totals.delivered_wh == 50 + 60


def test_a_withdrawal_from_nowhere_fails() -> None:
    interval = TRUE.intervals[0]._replace(withdrawn=(Withdrawn(0, 101, 150),))
    assert "a withdrawal from a slice that it does not have" in refused(replace(TRUE, intervals=(interval,)))


def test_the_proof_is_over_this_consumers_operations_only() -> None:
    """Nothing of other consumers is in it but hashes: what it holds are seven operations of the ledger."""
    assert len(TRUE.operations) + len(TRUE.issues) + len(TRUE.intervals[0].deliveries) == 7
    assert leaf_hash(WORLD.deliveries[0].operation) not in TRUE.hashes
    assert key("node").public.cose_key not in TRUE.hashes


# --- For programs by others


def test_a_certificate_follows_its_cddl() -> None:
    parts = cbor2.loads(RAW).value
    require("certificate-file", RAW, "file")
    require("certificate-header", parts[0], "header")
    require("origin-certificate", parts[2], "certificate")
    world = corrected()
    require("origin-certificate", cbor2.loads(world.seal(world.certificate())).value[2], "corrected")
