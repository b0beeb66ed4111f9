"""`energy-broker registrar`: sign who and what is admitted to a ledger."""

import argparse
from typing import Any

from broker.commands.common import WrongUse, add_command, add_group, add_signing_options, write_signed
from broker.config import parse_public_key
from broker.protocol.command_line import time_s, whole_number
from broker.protocol.messages import Admission, Carrier, Registration, Role
from broker.protocol.sources import Source, source_from_label


def add_commands(commands: Any) -> None:
    """The group `registrar`."""
    group = add_group(commands, "registrar", "Sign who and what is admitted to a ledger.")
    register = add_command(group, "register", "Sign the registration of a broker or provider.", _registrar_register)
    add_signing_options(register, "the registrar")
    register.add_argument("--party", required=True, metavar="NAME", help="who is registered")
    register.add_argument("--role", required=True, choices=("broker", "provider"), help="what it may do")
    register.add_argument("--party-key", required=True, metavar="KEY", help="its public key, as `key show` prints it")
    admit = add_command(group, "admit", "Sign the admission of a generating device.", _registrar_admit)
    add_signing_options(admit, "the registrar")
    admit.add_argument("--device", required=True, metavar="NAME", help="also the name of its meter")
    admit.add_argument("--owner", required=True, metavar="NAME", help="the provider that it belongs to")
    admit.add_argument("--meter-key", required=True, metavar="KEY", help="the public key of its meter")
    admit.add_argument("--source", required=True, metavar="SOURCE", help=", ".join(source.label for source in Source))
    admit.add_argument(
        "--capacity-w", required=True, type=whole_number(1), metavar="W", help="what it can make at most"
    )
    admit.add_argument("--area", required=True, metavar="NAME", help="the market area that it feeds")
    admit.add_argument("--place", default="", metavar="TEXT", help="where it stands; public, so coarse for a household")
    admit.add_argument(
        "--commissioned",
        dest="commissioned_s",
        type=time_s,
        required=True,
        metavar="TIME",
        help="since when it runs, for example 2020-01-31T00:00:00Z",
    )


def _registrar_register(options: argparse.Namespace) -> int:
    role = Role[options.role.upper()]
    return write_signed(options, Registration(options.party, role, parse_public_key(options.party_key).cose_key))


def _registrar_admit(options: argparse.Namespace) -> int:
    try:
        source = source_from_label(options.source)
    except ValueError as error:
        raise WrongUse(f"--source: {error}") from error
    admission = Admission(
        options.device,
        options.owner,
        parse_public_key(options.meter_key).cose_key,
        source,
        Carrier.ELECTRICITY,
        options.capacity_w,
        options.area,
        options.place,
        options.commissioned_s,
    )
    return write_signed(options, admission)
