"""Certificates from a broker's database and a ledger as both really are, with the command and without."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.broker_on_disk import DiskBroker
from support.certificate_world import BROKER, METER, demand_of, name_of, trust_in
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    T0,
    asset,
    correct,
    deliver,
    key,
    rotate,
)

from broker.certificates.build import CertificateError
from broker.certificates.document import read_certificate
from broker.certificates.index import LedgerIndex
from broker.certificates.verify import Verified, verify_certificate
from broker.cli import main
from broker.ledger.operations import (
    CorrectDemand,
    DeliveredSlice,
    ReturnedSlice,
    Transfer,
)
from broker.ledger.store import LedgerError, Store
from broker.ledger.trust import trust_of
from broker.protocol.keys import save_private_key
from broker.protocol.messages import KeyHolder, MessageType
from broker.service.pseudonyms import DAY_S

TRUST = trust_in(GENESIS)


def verified_now(served: DiskBroker) -> Verified:
    return verify_certificate(served.certificate(), TRUST)


def totals(verified: Verified) -> tuple[int, int, int]:
    stated = verified.contents.certificate.totals
    return stated.demanded_wh, stated.delivered_wh, stated.unmatched_wh


def test_a_certificate_of_a_real_ledger_verifies(served: DiskBroker) -> None:
    verified = verified_now(served)
    assert totals(verified) == (350, 300, 50)
    assert [device.admission.device for device in verified.contents.devices] == ["solar-1", "wind-1"]
    assert verified.checkpoint.height == served.ledger.height
    assert verified.contents.certificate.settled_s == T0 + 2 * INTERVAL_S
    assert verified.contents.is_provisional


def test_the_same_period_gives_the_same_bytes(served: DiskBroker) -> None:
    assert served.certificate() == served.certificate()


def test_a_period_opens_only_its_own_intervals(served: DiskBroker) -> None:
    certificate = read_certificate(served.certificate(T0, T0 + INTERVAL_S)).certificate
    assert [interval.number for interval in certificate.intervals] == [T0 // INTERVAL_S]
    assert [one.at for one in certificate.interval_keys] == [T0]
    assert not certificate.day_keys


def test_a_corrected_demand_is_certified_with_what_went_back(served: DiskBroker) -> None:
    committed = served.demand(T0, 200, revision=1)
    returned = (ReturnedSlice(asset("solar-1"), 0, 140, 240),)
    served.commit(CorrectDemand(name_of(T0), T0, 1, 200, committed, returned))
    assert totals(verified_now(served)) == (250, 200, 50)
    # What went back may be delivered again, here after the demand was corrected up.
    committed = served.demand(T0, 260, revision=2)
    served.commit(
        CorrectDemand(name_of(T0), T0, 2, 260, committed, ()),
        served.deliver(T0, 260, ("solar-1", 140, 200), revision=2),
    )
    assert totals(verified_now(served)) == (310, 260, 50)


def test_a_corrected_reading_is_certified_with_what_was_withdrawn(served: DiskBroker) -> None:
    # Of 900 Wh the broker still holds 660: all of those and 40 delivered ones are withdrawn.
    served.commit(correct("solar-1", 200))
    verified = verified_now(served)
    assert totals(verified) == (350, 260, 90)
    assert [issue.revision for issue in verified.contents.certificate.issues] == [0, 0, 1]
    # Then the meter says that it was right at first: the open demand is filled from the new revision's asset.
    second = asset("solar-1", revision=2)
    served.commit(correct("solar-1", 900, revision=2), Transfer(second, 900, 940, "alice", BROKER, 100, None))
    served.commit(replace(served.deliver(T0, 300), slices=(DeliveredSlice(second, 900, 940, 0),)))
    assert totals(verified_now(served)) == (350, 300, 50)


def test_a_correction_that_the_broker_leaves_out_is_not_seen_in_the_file(served: DiskBroker) -> None:
    """What a verifier cannot know: an operation that is not shown. The height says up to when the broker spoke."""
    before = served.certificate()
    served.commit(correct("solar-1", 200))
    assert verify_certificate(before, TRUST).checkpoint.height == served.ledger.height - 1
    with pytest.raises(Exception, match="stale"):
        verify_certificate(before, TRUST, served.ledger.head.checkpoint())


def test_rotated_keys_of_meters_and_broker_are_shown(served: DiskBroker) -> None:
    served.commit(
        rotate("solar-1", "solar-1-new", holder=KeyHolder.DEVICE, from_s=T0 + 2 * INTERVAL_S),
        rotate("wind-1", "wind-1-new", holder=KeyHolder.DEVICE, from_s=T0 + 2 * INTERVAL_S),
    )
    assert totals(verified_now(served)) == (350, 300, 50)


def test_what_is_not_closed_yet_is_not_certified(served: DiskBroker) -> None:
    third_s = T0 + 2 * INTERVAL_S
    served.demand(third_s, 10)
    served.commit(served.deliver(third_s, 10))
    with pytest.raises(CertificateError, match="is not closed yet"):
        served.certificate(T0, T0 + 3 * INTERVAL_S)
    assert served.certificate(T0, T0 + 2 * INTERVAL_S)


def test_a_demand_that_is_still_open_and_has_got_nothing_is_not_left_out(served: DiskBroker) -> None:
    """It would make the share that was matched look larger. One with a longer window comes to the ledger at its end."""
    third_s = T0 + 2 * INTERVAL_S
    served.demand(third_s, 10)
    served.commit(served.close_of(third_s))
    with pytest.raises(CertificateError, match=r"still open and has been given nothing yet.*after the next close"):
        served.certificate(T0, third_s + INTERVAL_S)
    served.store.begin()
    served.store.set_open_until([(T0 + DAY_S, third_s, METER, 0)])
    served.store.commit()
    with pytest.raises(CertificateError, match="again after 2023-11-15T00:00:00Z"):
        served.certificate(T0, third_s + INTERVAL_S)
    assert served.certificate(T0, third_s)
    served.store.begin()
    served.store.refuse_message(third_s, METER, MessageType.DEMAND, 0, "it came too late")
    served.store.commit()
    assert served.certificate(T0, third_s + INTERVAL_S)


def test_a_demand_that_came_after_the_close_waits_for_the_next_close(served: DiskBroker) -> None:
    raw = demand_of(T0 + INTERVAL_S, 60, 0)
    served.store.begin()
    served.store.add_message(
        T0 + INTERVAL_S, "late-house", MessageType.DEMAND, 0, b"l" * 32, raw, 60, b"l" * 16, b"c" * 32
    )
    served.store.commit()
    with pytest.raises(CertificateError, match="does not count all its demands"):
        served.certificate()
    served.commit(served.close_of(T0 + INTERVAL_S, revision=1))
    assert served.certificate()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"meter": "nobody"}, "no consumer nobody"),
        ({"from_s": T0 + 1}, "begins and ends at a market interval"),
        ({"from_s": T0 + 2 * INTERVAL_S}, "begins and ends"),
        ({"from_s": T0 - INTERVAL_S, "to_s": T0}, "has no demand of house"),
    ],
)
def test_what_cannot_be_certified_is_refused_with_the_reason(
    served: DiskBroker, arguments: dict[str, object], reason: str
) -> None:
    with pytest.raises(CertificateError, match=reason):
        served.certificate(**arguments)  # type: ignore[arg-type]


# --- The commands


@pytest.fixture
def config(served: DiskBroker) -> Path:
    folder = served.folder
    save_private_key(folder / "b1.pem", key(BROKER))
    (folder / "genesis.cbor").write_bytes(GENESIS.to_bytes())
    (folder / "trust.json").write_text(json.dumps(trust_of(GENESIS)))
    save_private_key(folder / "node.pem", key("node"))
    (folder / "broker.toml").write_text(
        '[broker]\nname = "b1"\nkey_file = "b1.pem"\ndata_dir = "."\n'
        '[ledger]\ngenesis_file = "genesis.cbor"\n'
        '[ledger.host]\npath = "ledger"\nvalidator = "node"\nkey_file = "node.pem"\n'
        '[mqtt]\nhost = "127.0.0.1"\n'
        '[certificates]\nfactors_source = "the grid operator, 2023"\n'
        "factors_mg_per_kwh = {unmatched = 400000, wind = 0}\n"
    )
    return folder / "broker.toml"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_issue_verify_show_and_export(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trust = config.with_name("house.cbor"), config.with_name("trust.json")
    times = ("--from", "2023-11-14T00:00:00Z", "--to", "2023-11-14T01:00:00Z")
    code, said, complaint = run(
        capsys, "certificate", "issue", "--config", config, "--meter", METER, *times, "--out", file
    )
    assert (code, complaint) == (0, "")
    assert "no others" in said
    code, said, _ = run(capsys, "certificate", "verify", file, "--trust", trust)
    assert code == 0
    assert "true: house used 350 Wh, 300 Wh of them from 2 devices" in said
    code, said, _ = run(capsys, "certificate", "verify", file, "--trust", trust, "--json")
    assert json.loads(said)["unmatched_wh"] == 50
    code, said, _ = run(capsys, "certificate", "show", file, "--json")
    shown = json.loads(said)
    # Solar at the default 48 g/kWh, wind at none, what is unmatched at 400 g/kWh.
    assert shown["co2_mg"] == 240 * 48 + 50 * 400
    assert shown["factors_source"].startswith("the grid operator, 2023; else IPCC")
    assert [(line["source"], line["energy_wh"], line["provider"]) for line in shown["lines"]] == [
        ("solar", 240, "alice"),
        ("wind", 60, "alice"),
    ]
    code, said, _ = run(capsys, "certificate", "show", file)
    assert "eecs_fuel=F01050100" in said
    code, said, _ = run(capsys, "certificate", "export", file, "--format", "energytag")
    assert len(json.loads(said)["granular_certificate_bundles"]) == 2
    page = config.with_name("house.html")
    assert run(capsys, "certificate", "export", file, "--format", "html", "--out", page)[0] == 0
    assert "<svg" in page.read_text()


def test_verify_says_why_it_is_not_true(config: Path, served: DiskBroker, capsys: pytest.CaptureFixture[str]) -> None:
    file, trust = config.with_name("house.cbor"), config.with_name("trust.json")
    raw = served.certificate()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    code, _, complaint = run(capsys, "certificate", "verify", file, "--trust", trust)
    assert (code, "signature of b1 does not fit" in complaint) == (1, True)
    file.write_bytes(raw)
    served.commit(correct("solar-1", 200))
    checkpoint = config.with_name("checkpoint")
    checkpoint.write_bytes(served.ledger.checkpoint())
    code, _, complaint = run(capsys, "certificate", "verify", file, "--trust", trust, "--checkpoint", checkpoint)
    assert (code, "stale" in complaint) == (1, True)


@pytest.mark.parametrize(("option", "text"), [("--day", "2023-11-14"), ("--month", "2023-11")])
def test_a_day_or_a_month_by_its_name(
    config: Path, served: DiskBroker, capsys: pytest.CaptureFixture[str], option: str, text: str
) -> None:
    served.commit(served.close_of(T0 + 17 * DAY_S - INTERVAL_S))
    file = config.with_name("house.cbor")
    issued = ("certificate", "issue", "--config", config, "--meter", METER, "--out", file)
    assert run(capsys, *issued, option, text)[0] == 0
    certificate = read_certificate(file.read_bytes()).certificate
    assert certificate.from_s <= T0 < certificate.to_s
    days = (certificate.to_s - certificate.from_s) // DAY_S
    assert (days, len(certificate.day_keys)) == ((1, 1) if option == "--day" else (30, 30))
    code, _, complaint = run(capsys, *issued, option, f"{text}-99")
    assert (code, "for example" in complaint) == (2, True)
    assert run(capsys, *issued)[0] == 2
    assert run(capsys, *issued, option, text, "--to", "2023-11-15T00:00:00Z")[0] == 2


def test_unknown_factors_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(config.read_text().replace("wind = 0", "wnid = 0"))
    code, _, complaint = run(
        capsys, "certificate", "issue", "--config", config, "--meter", METER, "--day", "2023-11-14", "--out", "x"
    )
    assert (code, "wnid" in complaint) == (2, True)


# --- The index


def test_only_blocks_that_came_since_are_read(served: DiskBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    blocks = Store.blocks

    def counted(store: Store, from_height: int = 1, upto: int = 2**53) -> Iterator[tuple[int, bytes, bytes]]:
        for row in blocks(store, from_height, upto):
            read.append((from_height, row[0]))
            yield row

    monkeypatch.setattr(Store, "blocks", counted)
    raw = served.certificate()
    assert {height for _, height in read} == set(range(1, served.ledger.height + 1))
    read.clear()
    assert served.certificate() == raw
    # The last block tells that it is the same ledger.
    assert [height for _, height in read] == [served.ledger.height]
    served.commit(correct("solar-1", 200))
    read.clear()
    assert totals(verified_now(served)) == (350, 260, 90)
    assert {height for _, height in read} == {served.ledger.height - 1, served.ledger.height}


def test_an_index_of_another_ledger_or_of_none_is_made_anew(served: DiskBroker, tmp_path: Path) -> None:
    raw = served.certificate()
    other = DiskBroker(tmp_path / "other")
    other.serve_two_intervals(wind_wh=401)
    foreign = other.certificate()
    other.close()
    index = served.folder / "index.db"
    shutil.copy(tmp_path / "other" / "index.db", index)
    assert served.certificate() == raw != foreign
    index.unlink()
    assert served.certificate() == raw


def test_a_damaged_index_is_named(served: DiskBroker) -> None:
    served.certificate()
    index = served.folder / "index.db"
    index.write_bytes(b"no database" * 1_000)
    with pytest.raises(LedgerError, match=f"remove {index}"):
        served.certificate()
    index.unlink()
    database = LedgerIndex(index, b"")
    database.close()
    connection = sqlite3.connect(index)
    connection.executescript("PRAGMA user_version=1; CREATE TABLE progress (genesis, height, block_id);")
    connection.close()
    with pytest.raises(LedgerError, match="no such table"):
        served.certificate()


def test_an_index_that_leads_astray_makes_no_certificate(served: DiskBroker) -> None:
    """A row is missing: the ledger's state says that there was more."""
    served.certificate()
    connection = sqlite3.connect(served.folder / "index.db")
    connection.execute("DELETE FROM delivered WHERE start_s = ?", (T0,))
    connection.commit()
    connection.close()
    with pytest.raises(CertificateError, match=r"the ledger has it otherwise .* leaves this interval out"):
        served.certificate()


def test_deliveries_that_stand_in_any_order_are_found(served: DiskBroker) -> None:
    """Of intervals and consumers mixed in one batch, as no broker of ours writes them."""
    third_s = T0 + 2 * INTERVAL_S
    fourth_s = third_s + INTERVAL_S
    served.demand(third_s, 10)
    served.demand(fourth_s, 20)
    strangers = [deliver(number, 5, start_s=third_s) for number in (1, 2**127)]
    served.commit(
        strangers[0],
        served.deliver(fourth_s, 20),
        served.deliver(third_s, 10),
        strangers[1],
        served.close_of(third_s),
        served.close_of(fourth_s),
    )
    certificate = read_certificate(served.certificate(T0, T0 + 4 * INTERVAL_S)).certificate
    assert [interval.demands[-1].energy_wh for interval in certificate.intervals] == [300, 50, 10, 20]
