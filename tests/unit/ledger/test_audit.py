"""The books of a ledger, in every form, and every way in which they may not balance."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from support.ledger_world import (
    GENESIS,
    INTERVAL_S,
    ROOT,
    T0,
    admit,
    batch,
    close,
    correct,
    deliver,
    found,
    issue,
    key,
    mandate,
    order,
    pseudonym,
    seal,
    sell,
    take,
)

from broker.cli import main
from broker.ledger.audit import CloseLine, DeliveryLine, DeviceLine, PartyLine, SourceLine, audit_ledger
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.operations import AssetId, DeliveredSlice, Window
from broker.ledger.state import (
    CARRY,
    DEMAND,
    METERED,
    PARTY,
    SLICE,
    TOTAL,
    Key,
    asset_key,
    decode_row,
    encode_key,
    encode_row,
)
from broker.ledger.store import FILE_NAME, LedgerError
from broker.protocol.messages import Carrier
from broker.protocol.sources import Source

LATER = T0 + INTERVAL_S
SOLAR = AssetId("solar-1", Carrier.ELECTRICITY, T0, 0)
SOLAR_LATER = AssetId("solar-1", Carrier.ELECTRICITY, LATER, 0)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two intervals, two sources, two brokers, and a demand of a day that took from both intervals."""
    path = tmp_path_factory.mktemp("books")
    engine = found(path)
    day = deliver(
        9,
        70,
        window=Window.DAY,
        slices=(DeliveredSlice(SOLAR, 0, 30, 0), DeliveredSlice(SOLAR_LATER, 0, 40, 0)),
    )
    for raw in (
        batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)),
        batch(issue("solar-1", 500, LATER), take("solar-1", 0, 200, start_s=LATER)),
        batch(sell("solar-1", 600, 1_000, seal(order(), "b2"))),
        batch(deliver(7, 300, ("solar-1", 600, 900)), deliver(8, 50), by="b2"),
        batch(deliver(1, 700, ("solar-1", 100, 600)), close(demands=3, demanded_wh=800)),
        batch(admit("hydro-1", source=Source.HYDRO), mandate("hydro-1"), issue("hydro-1", 5, LATER), day),
    ):
        assert engine.submit(raw) is None
        answers = engine.commit().results
        assert [answer.result.reason for answer in answers if not answer.result.height] == []
    engine.close()
    return path


@pytest.fixture
def copied(ledger: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ledger, tmp_path / "copy"))


def test_the_books(ledger: Path) -> None:
    audit = audit_ledger(ledger)
    assert audit.faults == ()
    assert audit.sources == (
        SourceLine(T0, Source.SOLAR, 1_000, 170, 830, 0, 0),
        SourceLine(LATER, Source.SOLAR, 500, 460, 40, 0, 0),
        SourceLine(LATER, Source.HYDRO, 5, 5, 0, 0, 0),
    )
    assert audit.devices == (
        DeviceLine("hydro-1", "alice", Source.HYDRO, 1, 5, 0, 5, 5, 0, 0, 0),
        DeviceLine("solar-1", "alice", Source.SOLAR, 2, 1_500, 0, 1_500, 630, 870, 0, 0),
        DeviceLine("south-1", "bob", Source.SOLAR, 0, 0, 0, 0, 0, 0, 0, 0),
        DeviceLine("wind-1", "alice", Source.WIND, 0, 0, 0, 0, 0, 0, 0, 0),
    )
    assert audit.parties == (
        PartyLine("alice", 1_505, 0, 0, 305, 0),
        PartyLine("b1", 0, 0, 0, 230, 570),
        PartyLine("b2", 0, 0, 0, 100, 300),
        PartyLine("bob", 0, 0, 0, 0, 0),
    )
    assert audit.deliveries == (
        DeliveryLine(T0, "b1", Source.SOLAR, 3, 570),
        DeliveryLine(T0, "b2", Source.SOLAR, 1, 300),
    )
    assert audit.closes == (
        CloseLine(T0, "b1", 0, 3, 800, ROOT, 2, 770, 570),
        CloseLine(T0, "b2", None, None, None, None, 2, 350, 300),
    )


def test_what_was_issued_is_somewhere(ledger: Path) -> None:
    """By whichever way it is added up."""
    audit = audit_ledger(ledger)
    issued_wh = sum(line.issued_wh for line in audit.sources)
    assert issued_wh == sum(line.issued_wh for line in audit.devices) == sum(line.issued_wh for line in audit.parties)
    gone_wh = sum(line.withdrawn_wh + line.expired_wh for line in audit.parties)
    assert issued_wh == gone_wh + sum(line.held_wh + line.delivered_wh for line in audit.parties)
    assert sum(line.delivered_wh for line in audit.deliveries) == sum(line.delivered_wh for line in audit.sources)
    assert sum(line.delivered_wh for line in audit.closes) == sum(line.delivered_wh for line in audit.sources)


def test_while_an_engine_runs(copied: Path) -> None:
    engine = found(copied)
    engine.submit(batch(issue("wind-1", 10, LATER)))
    engine.commit()
    assert audit_ledger(copied).faults == ()
    assert len(audit_ledger(copied).sources) == 4
    engine.close()


def changed(path: Path, where: Key, **values: Any) -> None:
    """Change columns of a row behind the engine's back."""
    database = sqlite3.connect(path / FILE_NAME)
    with database:
        (raw,) = database.execute("SELECT value FROM state WHERE key = ?", (encode_key(where),)).fetchone()
        row = decode_row(where[0], raw)._replace(**values)
        database.execute("UPDATE state SET value = ? WHERE key = ?", (encode_row(row), encode_key(where)))
    database.close()


def gone(path: Path, where: Key) -> None:
    database = sqlite3.connect(path / FILE_NAME)
    with database:
        assert database.execute("DELETE FROM state WHERE key = ?", (encode_key(where),)).rowcount == 1
    database.close()


SLICE_600 = (SLICE, *asset_key(SOLAR)[1:], 600)
TOTAL_SOLAR = (TOTAL, T0, int(Source.SOLAR))
METERED_SOLAR = (METERED, T0, "solar-1", int(Carrier.ELECTRICITY))
CARRY_SOLAR = (CARRY, "solar-1", int(Carrier.ELECTRICITY))
DEMAND_7 = (DEMAND, T0, pseudonym(7))


@pytest.mark.parametrize(
    ("where", "values", "faults"),
    [
        (
            asset_key(SOLAR),
            {"issued_wh": 1_001},
            (
                "asset of solar-1 at 1699920000, revision 0: 1001 Wh issued, but 170 held + 830 delivered"
                " + 0 withdrawn + 0 expired",
                "solar at 1699920000: the sums are not those of its assets",
            ),
        ),
        (
            asset_key(SOLAR),
            {"delivered_wh": 829, "withdrawn_wh": 1},
            (
                "asset of solar-1 at 1699920000, revision 0: its delivered slices are 830 Wh, it says 829",
                "solar at 1699920000: the sums are not those of its assets",
                "device solar-1: 1500 Wh metered, but 1500 issued - 1 withdrawn + 0 carried",
            ),
        ),
        (
            TOTAL_SOLAR,
            {"held_wh": 171},
            (
                "solar at 1699920000: 1000 Wh issued, but 171 held + 830 delivered + 0 withdrawn + 0 expired",
                "solar at 1699920000: the sums are not those of its assets",
            ),
        ),
        (
            TOTAL_SOLAR,
            {"held_wh": 171, "withdrawn_wh": -1},
            (
                "solar at 1699920000: 1000 Wh issued, but 171 held + 830 delivered + -1 withdrawn + 0 expired",
                "solar at 1699920000: the sums are not those of its assets",
            ),
        ),
        (TOTAL_SOLAR, None, ("solar at 1699920000: there are assets, but no sums",)),
        (
            SLICE_600,
            {"to_wh": 901},
            (
                "asset of solar-1 at 1699920000, revision 0: its delivered slices are 831 Wh, it says 830",
                "asset of solar-1 at 1699920000, revision 0: some Wh of it stand in two slices",
                f"demand {pseudonym(7).hex()} at 1699920000: its slices are 1 Wh more than it says was delivered",
            ),
        ),
        (
            SLICE_600,
            {"pseudonym": pseudonym(8)},
            (
                f"demand {pseudonym(7).hex()} at 1699920000: its slices are 300 Wh less than it says was delivered",
                f"demand {pseudonym(8).hex()} at 1699920000: its slices are 300 Wh more than it says was delivered",
            ),
        ),
        (
            DEMAND_7,
            {"demanded_wh": 299},
            (f"demand {pseudonym(7).hex()} at 1699920000: 300 of 299 Wh are delivered",),
        ),
        (
            DEMAND_7,
            None,
            (f"demand {pseudonym(7).hex()} at 1699920000: its slices are 300 Wh more than it says was delivered",),
        ),
        ((3, "hydro-1"), None, ("device hydro-1: has assets and is not admitted",)),
        ((PARTY, "b2"), None, ("b2: owns, holds or delivered, and is not registered",)),
    ],
)
def test_books_that_do_not_balance(
    copied: Path, where: Key, values: dict[str, Any] | None, faults: tuple[str, ...]
) -> None:
    if values is None:
        gone(copied, where)
    else:
        changed(copied, where, **values)
    assert audit_ledger(copied).faults == faults


@pytest.fixture
def corrected(copied: Path) -> Path:
    """Up by 100, down by 150, and down below what can be withdrawn once the deadline is past: that is carried."""
    deadline_s = GENESIS.correction_deadline_s
    engine = found(copied)
    for raw in (
        batch(correct("solar-1", 1_100)),
        batch(correct("solar-1", 950, 2)),
        batch(*(close(LATER + number * INTERVAL_S) for number in range(deadline_s // INTERVAL_S)), not_after_s=2**40),
        batch(correct("solar-1", 940, 3), not_after_s=2**40),
    ):
        assert engine.submit(raw) is None
        assert [answer.result.reason for answer in engine.commit().results if not answer.result.height] == []
    engine.close()
    return copied


def test_corrected_and_carried_books(corrected: Path) -> None:
    audit = audit_ledger(corrected)
    assert audit.faults == ()
    solar = next(line for line in audit.devices if line.device == "solar-1")
    assert (solar.assets, solar.metered_wh, solar.issued_wh, solar.withdrawn_wh) == (3, 1_440, 1_600, 150)
    assert solar.carried_wh == -10
    assert audit.sources[0] == SourceLine(T0, Source.SOLAR, 1_100, 120, 830, 150, 0)


@pytest.mark.parametrize(
    ("where", "values", "fault"),
    [
        (METERED_SOLAR, {"energy_wh": 941}, "device solar-1: 1441 Wh metered, but 1600 issued - 150"),
        (METERED_SOLAR, {"net_wh": 951}, "solar-1 at 1699920000: 950 Wh are issued and not withdrawn"),
        (METERED_SOLAR, None, "solar-1 at 1699920000: corrected, and what it metered last"),
        (CARRY_SOLAR, {"energy_wh": -9}, "device solar-1: 1440 Wh metered, but 1600 issued - 150"),
        (CARRY_SOLAR, None, "device solar-1: 1440 Wh metered, but 1600 issued - 150"),
    ],
)
def test_what_was_metered_is_conserved(corrected: Path, where: Key, values: dict[str, Any] | None, fault: str) -> None:
    if values is None:
        gone(corrected, where)
    else:
        changed(corrected, where, **values)
    assert any(said.startswith(fault) for said in audit_ledger(corrected).faults)


@pytest.mark.parametrize("asset", [SOLAR, SOLAR_LATER])
def test_slices_without_their_asset(copied: Path, asset: AssetId) -> None:
    gone(copied, asset_key(asset))
    faults = audit_ledger(copied).faults
    lost = f"asset of solar-1 at {asset.start_s}, revision 0: delivered, and there is no such asset"
    other = SOLAR if asset is SOLAR_LATER else SOLAR_LATER
    assert lost in faults
    assert f"solar at {asset.start_s}: the sums are not those of its assets" in faults
    assert not any(f"solar-1 at {other.start_s}" in fault for fault in faults), "what is whole is not blamed"


def test_the_command(ledger: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["ledger", "audit", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, table, _ = run(ledger)
    assert code == 0
    assert table.splitlines()[:2] == [
        "start              source  issued_wh  held_wh  delivered_wh  withdrawn_wh  expired_wh",
        "2023-11-14T00:00Z  solar        1000      170           830             0           0",
    ]
    assert run(ledger) == (0, table, "")
    assert run(ledger, "--by", "closes")[1].splitlines()[2].split()[:3] == ["2023-11-14T00:00Z", "b2", "-"]
    assert run(ledger, "--csv")[1].splitlines()[1] == "1699920000,solar,1000,170,830,0,0"
    assert json.loads(run(ledger, "--by", "parties", "--json")[1].splitlines()[1]) == {
        "party": "b1",
        "issued_wh": 0,
        "withdrawn_wh": 0,
        "expired_wh": 0,
        "held_wh": 230,
        "delivered_wh": 570,
    }
    for name in ("one", "other"):
        assert run(ledger, "--export", tmp_path / name) == (0, "", "")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["closes.csv", "deliveries.csv", "devices.csv", "parties.csv", "sources.csv"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in files)
    assert (tmp_path / "one" / "closes.csv").read_text().splitlines() == [
        "start_s,broker,revision,demands,demanded_wh,root,recorded_demands,recorded_wh,delivered_wh",
        f"1699920000,b1,0,3,800,{ROOT.hex()},2,770,570",
        "1699920000,b2,,,,,2,350,300",
    ]
    changed(copied, TOTAL_SOLAR, issued_wh=0)
    code, _, errors = run(copied)
    assert code == 1
    assert "the sums are not those of its assets" in errors
    assert "do not balance" in errors


def test_a_ledger_without_anything_has_books_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EmbeddedLedger(tmp_path / "new", GENESIS, "node", key("node")).close()
    assert main(["ledger", "audit", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == ""
    with pytest.raises(LedgerError):
        audit_ledger(tmp_path)
