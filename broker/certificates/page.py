"""A certificate as a page to print: one HTML file with everything in it, for A4 and black ink. Pure.

The page is a rendering, not the proof: what can be checked is the CBOR file. Its QR code holds what identifies that
file, so that a paper on a desk can be held against a file that verifies.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from broker.certificates.codes import EECS_CODES, UNMATCHED
from broker.certificates.contents import Contents, utc_text
from broker.ledger.chain import genesis_hash
from broker.protocol.envelope import parse
from broker.protocol.messages import Checkpoint
from broker.protocol.sources import Source

_STYLE: Final = """
@page { size: A4; margin: 14mm }
* { box-sizing: border-box }
body { font: 9.5pt/1.4 system-ui, "DejaVu Sans", sans-serif; color: #111; max-width: 178mm; margin: 8mm auto }
header { display: flex; justify-content: space-between; align-items: flex-start;
  gap: 8mm; border-bottom: 2px solid #111; padding-bottom: 5mm }
h1 { font-size: 18pt; margin: 0 0 2mm; line-height: 1.2 } h2 { font-size: 11.5pt; margin: 5mm 0 1.5mm }
svg { width: 36mm; height: 36mm; flex: none }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .6mm 5mm; margin: 0 }
dt { color: #555 } dd { margin: 0; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% } thead { display: table-header-group } tr { break-inside: avoid }
th, td { text-align: left; padding: .9mm 2mm; border-bottom: 1px solid #ccc; vertical-align: top }
th { border-bottom-color: #111; font-weight: 600 } .n { text-align: right; font-variant-numeric: tabular-nums }
.first { white-space: nowrap }
tfoot td { font-weight: 600; border-bottom: 0 } .small, footer { font-size: 8.5pt; color: #444 }
.mark { display: inline-block; border: 1px solid #111; padding: .5mm 2.5mm; font-weight: 600 }
footer { border-top: 1px solid #999; margin-top: 8mm; padding-top: 3mm }
@media print { body { margin: 0; max-width: none } h2 { break-after: avoid } }
"""

_MOST_ROWS: Final = 100
"""Beyond that many intervals the last table is of days, beyond that many days of months."""


def identification(contents: Contents, certificate_id: bytes) -> str:
    """What the QR code says: which certificate of which broker on which ledger."""
    return (
        f"dengen-certificate:{certificate_id.hex()}"
        f"?ledger={contents.genesis.ledger}&broker={contents.certificate.broker}"
    )


def page(contents: Contents, certificate_id: bytes, qr_svg: str) -> str:
    """The page; `qr_svg` is the QR code of `identification` as an SVG element."""
    certificate = contents.certificate
    checkpoint = Checkpoint.from_payload(parse(certificate.checkpoint).payload)
    totals = certificate.totals
    state = "provisional: corrections may follow" if contents.is_provisional else "settled"
    simulated = '<p><span class="mark">SIMULATED LEDGER</span></p>' if contents.genesis.simulated else ""
    identity = _list(
        ("Consumer's meter", certificate.meter),
        ("Period", f"{_minute(certificate.from_s)} to {_minute(certificate.to_s)} UTC"),
        ("Issued by broker", certificate.broker),
        ("Issued", f"{_minute(certificate.issued_s)} UTC"),
        ("Ledger", f"{contents.genesis.ledger}, height {checkpoint.height}"),
        ("State at that height", state),
    )
    sums = _table(
        ("Source", "EECS codes", "Wh", "Same interval, Wh", "g CO2e per kWh"),
        _source_rows(contents),
        ("All sources", "", _number(totals.delivered_wh), _number(totals.same_interval_wh), ""),
        numbers=(2, 3, 4),
    )
    demand = _list(
        ("Consumption", f"{_number(totals.demanded_wh)} Wh"),
        ("Covered", f"{_number(totals.delivered_wh)} Wh, {_share(totals.delivered_wh, totals.demanded_wh)}"),
        (
            "Covered in the same interval",
            f"{_number(totals.same_interval_wh)} Wh, {_share(totals.same_interval_wh, totals.demanded_wh)}",
        ),
        ("Unmatched", f"{_number(totals.unmatched_wh)} Wh"),
        ("CO2-equivalent", _co2(contents)),
        ("Factors", certificate.factors_source),
    )
    devices = _table(
        ("Device", "Provider", "Place, area", "Source", "Capacity, W", "In use since", "Wh"),
        _device_rows(contents),
        numbers=(4, 6),
    )
    times, heading = _time_rows(contents)
    by_time = _table(
        (heading, "Consumption, Wh", "Covered, Wh", "Unmatched, Wh", "Sources, Wh"), times, numbers=(1, 2, 3)
    )
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>Certificate of origin, {escape(certificate.meter)}</title>'
        f"<style>{_STYLE}</style></head><body>"
        f"<header><div><h1>Certificate of origin of electricity</h1>{simulated}{identity}</div>{qr_svg}</header>"
        f"<h2>Consumption</h2>{demand}"
        f"<h2>Sources</h2>{sums}"
        f"<h2>Devices</h2>{devices}"
        f"<h2>Over time</h2>{by_time}"
        "<footer><p>This page shows a certificate; the proof is the certificate's file. Check that with the ledger's"
        " trust file: <code>energy-broker certificate verify FILE --trust TRUST.json</code></p>"
        f"<p>Certificate {certificate_id.hex()}<br>Genesis of the ledger {genesis_hash(contents.genesis).hex()}</p>"
        "</footer></body></html>\n"
    )


def _source_rows(contents: Contents) -> Iterable[Sequence[str]]:
    factors = dict(contents.certificate.factors)
    for source, energy_wh, same_interval_wh in contents.certificate.totals.by_source:
        code = EECS_CODES[source]
        yield (
            source.label,
            f"{code.fuel} {code.technology}",
            _number(energy_wh),
            _number(same_interval_wh),
            _grams(factors.get(int(source))),
        )


def _device_rows(contents: Contents) -> Iterable[Sequence[str]]:
    made: dict[int, int] = defaultdict(int)
    for line in contents.lines:
        made[line.device] += line.energy_wh
    for number, device in enumerate(contents.devices):
        admission = device.admission
        if made[number]:
            yield (
                admission.device,
                admission.owner,
                f"{admission.place}, {admission.area}",
                admission.source.label,
                _number(admission.capacity_w),
                utc_text(admission.commissioned_s)[:10],
                _number(made[number]),
            )


def _time_rows(contents: Contents) -> tuple[list[Sequence[str]], str]:
    """Rows by interval, day or month, so that a year still fits on a few pages; and what the first column is."""
    interval_s = contents.genesis.interval_s
    starts = [interval.number * interval_s for interval in contents.certificate.intervals]
    for heading, characters in (("Interval (UTC)", 16), ("Day (UTC)", 10), ("Month (UTC)", 7)):
        if heading.startswith("Month") or len({utc_text(start_s)[:characters] for start_s in starts}) <= _MOST_ROWS:
            break
    demanded: dict[str, int] = defaultdict(int)
    given: dict[str, dict[Source, int]] = defaultdict(lambda: defaultdict(int))
    for start_s, demanded_wh in zip(starts, contents.demanded_wh, strict=True):
        demanded[utc_text(start_s)[:characters]] += demanded_wh
    for line in contents.lines:
        given[utc_text(line.start_s)[:characters]][contents.source_of(line)] += line.energy_wh
    rows: list[Sequence[str]] = []
    for when, demanded_wh in demanded.items():
        delivered_wh = sum(given[when].values())
        parts = ", ".join(f"{source.label} {_number(energy_wh)}" for source, energy_wh in sorted(given[when].items()))
        rows.append(
            (
                when.replace("T", " "),
                _number(demanded_wh),
                _number(delivered_wh),
                _number(demanded_wh - delivered_wh),
                parts,
            )
        )
    return rows, heading


def _co2(contents: Contents) -> str:
    totals = contents.certificate.totals
    text = f"{_number((totals.co2_mg + 500) // 1_000)} g"
    if totals.without_factor_wh:
        text += f", without {_number(totals.without_factor_wh)} Wh for which no factor is set"
    residual = dict(contents.certificate.factors).get(UNMATCHED)
    if residual is not None:
        text += f"; what is unmatched counts with {_grams(residual)} g/kWh"
    return text


def _grams(mg: int | None) -> str:
    if mg is None:
        return "none set"
    whole, rest = divmod(mg, 1_000)
    return f"{whole}.{rest:03d}".rstrip("0").rstrip(".")


def _share(part: int, whole: int) -> str:
    """Percent with one decimal, rounded down: a share is never shown larger than it is."""
    tenths = part * 1_000 // whole if whole else 0
    return f"{tenths // 10}.{tenths % 10} %"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _minute(time_s: int) -> str:
    return utc_text(time_s)[:16].replace("T", " ")


def _list(*entries: tuple[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries) + "</dl>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], foot: Sequence[str] = (), *, numbers: Sequence[int]
) -> str:
    """A table, its cells escaped. The columns `numbers` stand at the right, the first one is never broken."""

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = []
        for index, text in enumerate(texts):
            style = " class=n" if index in numbers else " class=first" if index == 0 else ""
            cells.append(f"<{tag}{style}>{escape(text)}</{tag}>")
        return "<tr>" + "".join(cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    end = f"<tfoot>{line('td', foot)}</tfoot>" if foot else ""
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody>{end}</table>"
