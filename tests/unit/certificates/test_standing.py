"""A certificate beside a copy of the ledger: what was taken back since or left out is found, and named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.broker_on_disk import DiskBroker
from support.certificate_world import BROKER, METER, name_of, trust_in
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    T0,
    World,
    asset,
    batch,
    correct,
    genesis,
    issue,
    key,
    revoke,
    rotate,
    take,
)

from broker.certificates.build import CertificateError
from broker.certificates.contents import totals_of
from broker.certificates.document import Certificate, read_certificate, seal_certificate
from broker.certificates.gather import issue_certificate
from broker.certificates.standing import Standing, settled_until_s, standing_in
from broker.certificates.verify import verify_certificate
from broker.cli import main
from broker.ledger.backup import backup_ledger
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.operations import CorrectDemand, ReturnedSlice
from broker.ledger.snapshot import restore_snapshot, take_snapshot
from broker.ledger.store import FILE_NAME, LedgerError, Store
from broker.ledger.trust import trust_of

TRUST = trust_in(GENESIS)


def standing(served: DiskBroker, raw: bytes, ledger: Path | None = None) -> Standing:
    return standing_in(verify_certificate(raw, TRUST), ledger or served.folder / "ledger")


def resealed(certificate: Certificate) -> bytes:
    return seal_certificate(certificate, key(BROKER), GENESIS.ledger)


def test_what_stands_is_told_with_the_height_and_whether_it_can_still_change(served: DiskBroker) -> None:
    raw = served.certificate()
    assert standing(served, raw) == Standing(served.ledger.height, False, ())
    served.commit(served.close_of(T0 + 31 * 86_400), not_after_s=T0 + 32 * 86_400)
    assert standing(served, raw) == Standing(served.ledger.height, True, ())


def test_wh_that_were_withdrawn_since_are_named(served: DiskBroker) -> None:
    raw = served.certificate()
    served.commit(correct("solar-1", 200))
    (fault,) = standing(served, raw).faults
    assert "of 240 Wh that solar-1 made at 2023-11-14T00:00:00Z the ledger has 200" in fault
    served.commit(correct("solar-1", 0, revision=2))
    (fault,) = standing(served, raw).faults
    assert "the ledger has 0" in fault
    assert standing(served, served.certificate()).faults == ()


def test_a_demand_that_was_corrected_since_is_named(served: DiskBroker) -> None:
    raw = served.certificate()
    committed = served.demand(T0, 200, revision=1)
    returned = (ReturnedSlice(asset("solar-1"), 0, 140, 240),)
    served.commit(CorrectDemand(name_of(T0), T0, 1, 200, committed, returned))
    corrected, taken_back = standing(served, raw).faults
    assert "the demand was corrected since height" in corrected
    assert "from 300 to 200 Wh" in corrected
    assert "the ledger has 140" in taken_back


def test_what_was_delivered_since_is_missed(served: DiskBroker) -> None:
    raw = served.certificate()
    served.commit(correct("solar-1", 200), served.deliver(T0, 300, ("wind-1", 60, 100)))
    faults = standing(served, raw).faults
    assert len(faults) == 1
    assert "the ledger has 200" in faults[0]
    served.commit(correct("wind-1", 500))
    second = served.certificate()
    later = T0 + INTERVAL_S
    served.commit(replace(served.deliver(later, 50, ("solar-1", 0, 0)), slices=()))
    assert standing(served, second).faults == ()


def test_an_interval_that_is_left_out_is_missed(served: DiskBroker) -> None:
    """The broker certifies the first interval alone as if it were the whole period."""
    certificate = read_certificate(served.certificate()).certificate
    honest = read_certificate(served.certificate(T0, T0 + INTERVAL_S)).certificate
    shortened = replace(honest, to_s=certificate.to_s, interval_keys=certificate.interval_keys)
    raw = resealed(shortened)
    assert verify_certificate(raw, TRUST)
    (fault,) = standing(served, raw).faults
    assert "2023-11-14T00:30:00Z: the ledger has a demand of 50 Wh, and it leaves this interval out" in fault
    (fault,) = standing(served, resealed(replace(shortened, interval_keys=honest.interval_keys))).faults
    assert "does not disclose the key of this interval" in fault
    assert "1 such intervals" in fault


def test_a_correction_that_the_broker_left_out_is_found(served: DiskBroker) -> None:
    """A new checkpoint over the old contents: in the file nothing shows it."""
    old = read_certificate(served.certificate()).certificate
    served.commit(correct("solar-1", 200))
    new = read_certificate(served.certificate()).certificate
    issues = tuple(reading for reading in new.issues if reading.revision == 0)
    interval = new.intervals[0]._replace(withdrawn=())
    lines = verify_certificate(resealed(old), TRUST).contents
    forged = replace(
        new,
        issues=issues,
        intervals=(interval, *new.intervals[1:]),
        totals=totals_of(
            lines.lines, [device.admission.source for device in lines.devices], lines.demanded_wh, new.factors
        ),
        hashes=served.hashes([*(reading.leaf for reading in issues), *served.leaves_of(new)]),
    )
    verified = verify_certificate(resealed(forged), TRUST)
    assert verified.contents.certificate.totals.delivered_wh == 300
    (fault,) = standing_in(verified, served.folder / "ledger").faults
    assert "of 240 Wh that solar-1 made" in fault


def test_a_copy_that_ends_before_the_certificate_cannot_tell(served: DiskBroker, tmp_path: Path) -> None:
    backup_ledger(served.folder / "ledger", tmp_path / "older")
    served.commit(correct("solar-1", 900 - 100))
    (fault,) = standing(served, served.certificate(), tmp_path / "older").faults
    assert "this copy of the ledger ends at height" in fault
    assert "get a newer one" in fault


def test_another_history_and_another_ledger_are_told(served: DiskBroker, tmp_path: Path) -> None:
    raw = served.certificate()
    other = DiskBroker(tmp_path / "other")
    other.serve_two_intervals(wind_wh=401)
    (fault,) = standing(served, raw, other.folder / "ledger").faults
    assert "another history" in fault
    other.close()
    stranger = EmbeddedLedger(tmp_path / "stranger", genesis(currency="GBP"), "node", key("node"))
    stranger.close()
    (fault,) = standing(served, raw, tmp_path / "stranger").faults
    assert "another ledger" in fault
    with pytest.raises(LedgerError, match="holds no"):
        standing(served, raw, tmp_path)


def test_a_key_that_was_revoked_since_is_told(served: DiskBroker) -> None:
    raw = served.certificate()
    served.commit(rotate(BROKER, "b1-new"))
    assert standing(served, raw).faults == ()
    served.commit(revoke(BROKER, by="registrar"), by_key="b1-new")
    (fault,) = standing(served, raw).faults
    assert "not b1's any more" in fault


def test_verify_with_a_ledger_on_the_command_line(served: DiskBroker, capsys: pytest.CaptureFixture[str]) -> None:
    file, trust = served.folder / "house.cbor", served.folder / "trust.json"
    trust.write_text(json.dumps(trust_of(GENESIS)))
    file.write_bytes(served.certificate())
    verify = ["certificate", "verify", str(file), "--trust", str(trust), "--ledger", str(served.folder / "ledger")]
    assert main(verify) == 0
    assert "all of it, and nothing else, stands on the ledger at height" in capsys.readouterr().out
    assert main([*verify, "--json"]) == 0
    now = json.loads(capsys.readouterr().out)["ledger_now"]
    assert now == {"height": served.ledger.height, "is_provisional": True, "faults": []}
    served.commit(correct("solar-1", 200))
    assert main(verify) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "of 240 Wh that solar-1 made" in said.err
    assert main([*verify, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["ledger_now"]["faults"]) == 1
    # Without the ledger it is true at its height.
    assert main(verify[:-2]) == 0
    assert METER in capsys.readouterr().out


def test_without_a_mandate_nothing_is_ever_settled(served: DiskBroker) -> None:
    """Then no market clock says that corrections of the device come too late."""
    state = World.set_up().state
    assert settled_until_s(state, BROKER, [("solar-1", T0)]) == 0, "b1 has closed nothing"
    served.commit(served.close_of(T0 + 31 * 86_400), not_after_s=T0 + 32 * 86_400)
    store = Store.open_read_only(served.folder / "ledger" / FILE_NAME)
    assert settled_until_s(store, BROKER, [("solar-1", T0)]) == T0 + 31 * 86_400 + INTERVAL_S
    assert settled_until_s(store, BROKER, [("solar-1", T0), ("solar-1", T0 - INTERVAL_S)]) == 0
    store.close()


def test_a_copy_restored_from_a_snapshot_is_indexed_from_there_and_says_what_it_lacks(
    served: DiskBroker, tmp_path: Path
) -> None:
    take_snapshot(served.folder / "ledger", tmp_path / "snapshot")
    restore_snapshot(tmp_path / "snapshot", tmp_path / "restored")
    ledger = EmbeddedLedger(tmp_path / "restored", GENESIS, "node", key("node"))
    third_s = T0 + 2 * INTERVAL_S
    served.demand(third_s, 30)
    raw = batch(
        issue("wind-1", 30, third_s),
        take("wind-1", 0, 30, start_s=third_s),
        served.deliver(third_s, 30, ("wind-1", 0, 30)),
        served.close_of(third_s),
    )
    assert ledger.submit(raw) is None
    assert ledger.commit().blocks
    ledger.close()
    with pytest.raises(CertificateError, match=r"admission of wind-1 was not found .* name a full one"):
        issue_certificate(
            *(served.store, tmp_path / "restored", tmp_path / "index.db", GENESIS, BROKER, key(BROKER), METER),
            *((third_s, third_s + INTERVAL_S), third_s, (), "none"),
        )
