"""What a person chooses in a contract, as options of `energy-broker consumer`, and the contract made of them."""

import argparse

from broker.commands.common import ppm_of
from broker.market.contracts import Contract, ShortageChoice, make_contract
from broker.market.windows import Window
from broker.protocol.command_line import time_s, whole_number
from broker.protocol.messages import Genesis
from broker.protocol.sources import SourceGroup
from firmware_config.loader import WrongValue


def add_contract_options(parser: argparse.ArgumentParser, *, from_required: bool) -> None:
    """Everything that a contract says; `contract_of` reads it."""
    parser.add_argument(
        "--line",
        action="append",
        default=[],
        metavar="SOURCE=PERCENT",
        help="a source or one of " + ", ".join(group.label for group in SourceGroup) + "; what is left open is any",
    )
    parser.add_argument(
        "--shortage",
        default="unmatched",
        metavar="CHOICE",
        help="unmatched (default), any, or substitutes:SOURCE,SOURCE,…",
    )
    parser.add_argument(
        "--window",
        default=Window.INTERVAL.label,
        metavar="SPAN",
        help="how close in time generation must match: interval (default), day or month",
    )
    parser.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="PROVIDER",
        help="a provider whose energy comes first, as often as needed, the dearest to you first",
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PROVIDER", help="a provider whose energy is not taken"
    )
    parser.add_argument(
        "--highest-price",
        type=whole_number(0),
        metavar="PRICE",
        help="energy above this is not taken, µ-currency per kWh",
    )
    parser.add_argument(
        "--ceiling",
        action="append",
        default=[],
        metavar="SOURCE=PRICE",
        help="energy of this source above this price is not taken, µ-currency per kWh",
    )
    parser.add_argument("--area", metavar="NAME", help="default: the ledger's first area")
    parser.add_argument(
        "--from",
        dest="from_s",
        type=time_s,
        required=from_required,
        metavar="TIME",
        help="applies to intervals from then on, for example 2026-01-31T00:00:00Z",
    )
    parser.add_argument(
        "--until",
        dest="until_s",
        type=time_s,
        metavar="TIME",
        help="does not apply any more from then on; default: no end",
    )


def contract_of(options: argparse.Namespace, genesis: Genesis) -> Contract:
    """The contract. Raises WrongValue for text that cannot be read, ContractError for what makes no sense."""
    choice, _, names = options.shortage.partition(":")
    try:
        shortage = ShortageChoice[choice.upper()]
    except KeyError:
        raise WrongValue("--shortage", "unmatched, any or substitutes:SOURCE,…") from None
    try:
        window = Window[options.window.upper()]
    except KeyError:
        raise WrongValue("--window", "interval, day or month") from None
    return make_contract(
        options.from_s or 0,
        [_share(text) for text in options.line],
        shortage,
        area=options.area or genesis.areas[0],
        substitutes=[name for name in names.split(",") if name],
        highest_price=options.highest_price,
        preferred_providers=options.prefer,
        excluded_providers=options.exclude,
        price_ceilings=[_ceiling(text) for text in options.ceiling],
        window=window,
        valid_until_s=options.until_s,
    )


def contract_sentence(contract: Contract) -> str:
    """The contract in one line, without what it does not restrict."""
    parts = [", ".join(f"{line.target.label} {line.share_ppm / 10_000:g} %" for line in contract.lines)]
    if contract.window is not Window.INTERVAL:
        parts.append(f"of the same {contract.window.label}")
    if contract.preferred_providers:
        parts.append("first of " + ", ".join(contract.preferred_providers))
    if contract.excluded_providers:
        parts.append("nothing of " + ", ".join(contract.excluded_providers))
    if contract.highest_price is not None:
        parts.append(f"at most {contract.highest_price} µ/kWh")
    if contract.price_ceilings:
        ceilings = [
            f"{ceiling.source.label} at most {ceiling.highest_price} µ/kWh" for ceiling in contract.price_ceilings
        ]
        parts.append(", ".join(ceilings))
    return "; ".join([*parts, f"when short: {contract.shortage.label}"])


def _share(text: str) -> tuple[str, int]:
    """`solar=40` or `solar=33.3333` as (`solar`, ppm)."""
    name, _, percent = text.partition("=")
    if not percent:
        raise WrongValue("--line", f"SOURCE=PERCENT, got {text!r}")
    return name, ppm_of("--line", percent)


def _ceiling(text: str) -> tuple[str, int]:
    """`solar=90000` as (`solar`, 90000)."""
    name, _, price = text.partition("=")
    if not price.isascii() or not price.isdigit():
        raise WrongValue("--ceiling", f"SOURCE=PRICE with a whole number, got {text!r}")
    return name, int(price)
