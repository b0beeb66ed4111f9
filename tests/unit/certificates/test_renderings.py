"""The same certificate as granular certificates for a registry, and as a page to print."""

import shutil
import subprocess
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.certificate_world import one_interval
from support.ledger_world import INTERVAL_S

from broker.certificates.codes import DEFAULT_FACTORS, EECS_CODES
from broker.certificates.contents import Contents, read_contents
from broker.certificates.document import read_certificate
from broker.certificates.energytag import bundles
from broker.certificates.page import identification, page
from broker.commands.certificate import _qr
from broker.protocol.sources import Source

WORLD = one_interval()
SEALED = read_certificate(WORLD.seal(WORLD.certificate()))
CONTENTS = read_contents(SEALED.certificate)
CERTIFICATE_ID = SEALED.certificate_id("test-ledger")
REQUIRED = {
    # What EnergyTag asks of a granular certificate; the rest it leaves to the registry.
    "energy_carrier",
    "issuance_id",
    "production_starting_interval",
    "production_ending_interval",
    "energy_source",
    "device_technology_code",
    "device_name",
    "device_id",
    "device_capacity",
    "device_production_start_date",
    "device_location",
    "bundle_quantity",
    "bundle_id_range_start",
    "bundle_id_range_end",
    "is_storage",
    "account_id",
    "certificate_status",
    "expiry_datestamp",
    "issue_market_zone",
}


def test_every_source_has_codes_of_the_form_that_eecs_gives_them() -> None:
    assert set(EECS_CODES) == set(Source)
    for fuel, technology in EECS_CODES.values():
        assert (fuel[0], len(fuel), technology[0], len(technology)) == ("F", 9, "T", 7)
        assert (fuel[1:] + technology[1:]).isdigit()


def test_renewable_fossil_and_nuclear_codes_agree_with_the_groups_of_sources() -> None:
    for source, code in EECS_CODES.items():
        level = {"01": source <= Source.AMBIENT_HEAT, "03": source is Source.NUCLEAR, "02": source >= Source.OIL}
        assert level[code.fuel[1:3]]


def test_sources_without_a_published_factor_have_none() -> None:
    assert set(Source) - set(DEFAULT_FACTORS) == {Source.OIL, Source.AMBIENT_HEAT}


def test_bundles_have_energytags_fields() -> None:
    exported = bundles(CONTENTS, CERTIFICATE_ID)
    assert exported["issuance_metadata"]["issuing_body"] == "b1"
    assert exported["beneficiary"] == "house"
    for bundle in exported["granular_certificate_bundles"]:
        assert set(bundle) >= REQUIRED
        begin, end = (datetime.fromisoformat(bundle[f"production_{side}_interval"]) for side in ("starting", "ending"))
        assert (end - begin).total_seconds() == INTERVAL_S <= 3_600


def test_ranges_of_bundles_are_inclusive_and_count_every_wh_once() -> None:
    """1 to 100 split at 25 is 1 to 25 and 26 to 100: no Wh in both, none in neither."""
    solar, wind = bundles(CONTENTS, CERTIFICATE_ID)["granular_certificate_bundles"]
    assert (solar["bundle_id_range_start"], solar["bundle_id_range_end"], solar["bundle_quantity"]) == (100, 299, 200)
    assert (wind["bundle_id_range_start"], wind["bundle_id_range_end"], wind["bundle_quantity"]) == (0, 59, 60)
    assert solar["issuance_id"] == "solar-1/electricity/2023-11-14T00:00:00Z"


class Tags(HTMLParser):
    """Notes what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "br", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "path":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def printed(contents: Contents = CONTENTS) -> str:
    return page(contents, CERTIFICATE_ID, _qr(identification(contents, CERTIFICATE_ID)))


def test_a_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    tags = Tags(printed())
    assert not tags.open
    assert not tags.references
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert "svg" in tags.seen
    for expected in ("house", "solar-1", "wind-1", "a roof", "F01040100 T010100", "260", "86.6 %", "SIMULATED LEDGER"):
        assert expected in tags.text
    assert CERTIFICATE_ID.hex() in tags.text


def test_a_qr_code_names_the_certificate_its_broker_and_its_ledger() -> None:
    said = identification(CONTENTS, CERTIFICATE_ID)
    assert said == f"dengen-certificate:{CERTIFICATE_ID.hex()}?ledger=test-ledger&broker=b1"


def test_what_others_wrote_cannot_become_part_of_the_page() -> None:
    (first, *rest) = CONTENTS.devices
    hostile = replace(first, admission=replace(first.admission, place="<script>alert(1)</script>"))
    text = printed(replace(CONTENTS, devices=(hostile, *rest)))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_shares_are_never_shown_larger_than_they_are() -> None:
    # 260 of 300 Wh are 86.66… %.
    assert "86.6 %" in printed()
    assert "86.7 %" not in printed()


def test_a_long_period_is_told_by_days_and_a_year_by_months() -> None:
    (interval,) = CONTENTS.certificate.intervals
    for count, heading in ((1, "Interval (UTC)"), (48 * 90, "Day (UTC)"), (48 * 300, "Month (UTC)")):
        intervals = tuple(interval._replace(number=interval.number + number) for number in range(count))
        certificate = replace(CONTENTS.certificate, intervals=intervals)
        long = replace(CONTENTS, certificate=certificate, demanded_wh=(300,) * count)
        assert heading in printed(long)


def test_a_browser_prints_it_on_a_page(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium` to print the page in this test")
    (tmp_path / "certificate.html").write_text(printed())
    out = tmp_path / "certificate.pdf"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        + ["--no-pdf-header-footer", f"--print-to-pdf={out}", (tmp_path / "certificate.html").as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pdf = out.read_bytes()
    assert pdf.startswith(b"%PDF")
    # A4 in points, rounded; one page holds the certificate of an interval.
    assert b"/MediaBox [0 0 594.95996 841.91998]" in pdf or b"/MediaBox [0 0 595" in pdf
    assert pdf.count(b"/Type /Page\n") == 1
