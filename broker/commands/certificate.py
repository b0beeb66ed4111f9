"""`energy-broker certificate issue`, `verify`, `show` and `export`: a consumer's energy and where it came from."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker.commands.common import (
    CHECKPOINT_FILE,
    DONE,
    FAILED,
    MAX_INPUT_BYTES,
    WrongUse,
    add_command,
    add_config_option,
    add_group,
    add_trust_option,
    print_row,
    read_as,
)
from broker.commands.period import add_period_options, period_of
from broker.config import UNMATCHED_LABEL, load_broker_config, load_trust
from broker.protocol.errors import MalformedMessage
from broker.protocol.files import read_file
from broker.protocol.sources import Source
from firmware_config.loader import WrongValue

if TYPE_CHECKING:
    from broker.certificates.contents import Contents

ENERGYTAG: Final = "energytag"
HTML: Final = "html"


def add_commands(commands: Any) -> None:
    """The group `certificate`."""
    group = add_group(commands, "certificate", "Certificates of origin: issue, verify, show, export.")
    issue = add_command(group, "issue", "Write a consumer's certificate for a period.", _issue)
    add_config_option(issue)
    issue.add_argument("--meter", required=True, metavar="NAME", help="the consumer's meter")
    add_period_options(issue)
    issue.add_argument(
        "--ledger",
        type=Path,
        metavar="PATH",
        help="the ledger's directory; default: as the config says, or a copy of its own that is brought up to date",
    )
    issue.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the certificate")
    verify = add_command(
        group,
        "verify",
        "Check a certificate by a trust file alone, or by a ledger too: exit 0 only if it is true.",
        _verify,
    )
    verify.add_argument("file", type=Path, metavar="FILE", help="a certificate")
    add_trust_option(verify)
    verify.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a checkpoint (`energy-broker ledger checkpoint`) that the certificate must not be older than",
    )
    verify.add_argument(
        "--ledger",
        type=Path,
        metavar="PATH",
        help="a copy of the ledger: also check that nothing was taken back since, and that nothing is left out",
    )
    verify.add_argument("--json", action="store_true", help="print what is proven as JSON")
    show = add_command(group, "show", "Print what a certificate says, without checking it.", _show)
    show.add_argument("file", type=Path, metavar="FILE", help="a certificate")
    show.add_argument("--json", action="store_true", help="one JSON object with every line")
    export = add_command(group, "export", "Write a certificate in another form, without checking it.", _export)
    export.add_argument("file", type=Path, metavar="FILE", help="a certificate")
    export.add_argument(
        "--format", choices=(ENERGYTAG, HTML), required=True, help="granular certificates as JSON, or a page to print"
    )
    export.add_argument("--out", type=Path, metavar="FILE", help="where to write it; default: print it")


def _issue(options: argparse.Namespace) -> int:
    from broker.certificates.build import CertificateError
    from broker.certificates.issuing import NoLedger, issue, ledger_of

    config = load_broker_config(options.config)
    try:
        raw = issue(config, options.ledger or ledger_of(config), options.meter, period_of(options))
    except NoLedger as error:
        raise WrongValue("--ledger", f"a directory with a copy of the ledger; or {error}") from error
    except CertificateError as error:
        raise WrongUse(str(error)) from error
    options.out.write_bytes(raw)
    print(f"{options.out}: {len(raw)} bytes; it opens {options.meter}'s demands in this period, and no others")
    return DONE


def _verify(options: argparse.Namespace) -> int:
    from broker.certificates.standing import standing_in
    from broker.certificates.workers import verify_on_all_processors
    from broker.ledger.receipts import verify_checkpoint

    trust = load_trust(options.trust)
    known = None
    if options.checkpoint is not None:
        known, _ = read_as(options.checkpoint, CHECKPOINT_FILE, lambda raw: verify_checkpoint(raw, trust))
    try:
        verified = verify_on_all_processors(read_file(options.file, MAX_INPUT_BYTES), trust, known)
    except MalformedMessage as error:
        raise MalformedMessage(f"{options.file}: {error.where}", error.expected) from error
    standing = None if options.ledger is None else standing_in(verified, options.ledger)
    faults = () if standing is None else standing.faults
    for fault in faults:
        print(f"energy-broker: {options.file}: {fault}", file=sys.stderr)
    if options.json:
        proven = {
            "certificate_id": verified.certificate_id.hex(),
            "height": verified.checkpoint.height,
            "validator": verified.validator,
            "carried_wh": verified.carried_wh,
            **_summary(verified.contents),
        }
        if standing is not None:
            proven["ledger_now"] = {
                "height": standing.height,
                "is_provisional": not standing.is_settled,
                "faults": list(faults),
            }
        print(json.dumps(proven))
        return FAILED if faults else DONE
    if faults:
        return FAILED
    certificate = verified.contents.certificate
    totals = certificate.totals
    state = "provisional" if verified.contents.is_provisional else "settled"
    print(
        f"{options.file}: true: {certificate.meter} used {totals.demanded_wh} Wh, {totals.delivered_wh} Wh of them from"
        f" {len(verified.contents.devices)} devices; at height {verified.checkpoint.height} of ledger {trust.ledger},"
        f" signed by {verified.validator}; {state}"
    )
    if standing is not None:
        state = "settled" if standing.is_settled else "provisional"
        print(f"{options.file}: all of it, and nothing else, stands on the ledger at height {standing.height}; {state}")
    if verified.carried_wh:
        print(f"{options.file}: {verified.carried_wh} Wh are carried over from corrections of other intervals")
    return DONE


def _show(options: argparse.Namespace) -> int:
    contents, certificate_id = _read(options.file)
    summary = {"certificate_id": certificate_id.hex(), **_summary(contents)}
    lines = (_line(contents, number) for number in range(len(contents.lines)))
    if options.json:
        print(json.dumps({**summary, "lines": list(lines)}))
        return DONE
    print_row(summary, as_json=False)
    for line in lines:
        print_row(line, as_json=False)
    return DONE


def _export(options: argparse.Namespace) -> int:
    contents, certificate_id = _read(options.file)
    if options.format == ENERGYTAG:
        from broker.certificates.energytag import bundles

        text = json.dumps(bundles(contents, certificate_id), indent=2) + "\n"
    else:
        from broker.certificates.page import identification, page

        text = page(contents, certificate_id, _qr(identification(contents, certificate_id)))
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text)
    return DONE


def _qr(text: str) -> str:
    try:
        import segno
    except ImportError:
        raise WrongValue("--format", "`html` to be used with the QR library: pip install 'dengen[broker]'") from None
    drawn: str = segno.make_qr(text, error="m").svg_inline(scale=4, border=2, omitsize=True)
    return drawn


def _read(path: Path) -> tuple["Contents", bytes]:
    from broker.certificates.contents import read_contents
    from broker.certificates.document import read_certificate

    sealed = read_as(path, "a certificate as `energy-broker certificate issue` writes it", read_certificate)
    contents = read_contents(sealed.certificate)
    return contents, sealed.certificate_id(contents.genesis.ledger)


def _summary(contents: "Contents") -> dict[str, Any]:
    from broker.certificates.contents import utc_text

    certificate, totals = contents.certificate, contents.certificate.totals
    return {
        "meter": certificate.meter,
        "broker": certificate.broker,
        "ledger": contents.genesis.ledger,
        "simulated": contents.genesis.simulated,
        "from": utc_text(certificate.from_s),
        "to": utc_text(certificate.to_s),
        "issued": utc_text(certificate.issued_s),
        "is_provisional": contents.is_provisional,
        "intervals": len(certificate.intervals),
        "demanded_wh": totals.demanded_wh,
        "delivered_wh": totals.delivered_wh,
        "same_interval_wh": totals.same_interval_wh,
        "unmatched_wh": totals.unmatched_wh,
        "by_source_wh": {total.source.label: total.energy_wh for total in totals.by_source},
        "co2_mg": totals.co2_mg,
        "without_factor_wh": totals.without_factor_wh,
        "factors_mg_per_kwh": {_label(number): mg for number, mg in certificate.factors},
        "factors_source": certificate.factors_source,
    }


def _line(contents: "Contents", number: int) -> dict[str, Any]:
    from broker.certificates.codes import EECS_CODES
    from broker.certificates.contents import utc_text

    line = contents.lines[number]
    admission = contents.devices[line.device].admission
    return {
        "interval": utc_text(line.start_s),
        "energy_wh": line.energy_wh,
        "source": admission.source.label,
        "device": admission.device,
        "provider": admission.owner,
        "place": admission.place,
        "area": admission.area,
        "made": utc_text(line.made_s),
        "from_wh": line.from_wh,
        "to_wh": line.to_wh,
        "line": line.line,
        "eecs_fuel": EECS_CODES[admission.source].fuel,
        "eecs_technology": EECS_CODES[admission.source].technology,
        "capacity_w": admission.capacity_w,
        "commissioned": utc_text(admission.commissioned_s),
    }


def _label(number: int) -> str:
    return Source(number).label if number else UNMATCHED_LABEL
