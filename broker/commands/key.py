"""`energy-broker key`: make and show signing keys."""

import argparse
from pathlib import Path
from typing import Any

from broker.commands.common import DONE, add_command, add_group
from broker.protocol.keys import Algorithm, generate_private_key, load_private_key, save_private_key


def add_commands(commands: Any) -> None:
    """The group `key`."""
    group = add_group(commands, "key", "Make and show signing keys.")
    new = add_command(group, "new", "Make a private key, readable by you only, and print its public key.", _key_new)
    new.add_argument("file", type=Path, metavar="FILE", help="where to write it; an existing file is never overwritten")
    new.add_argument("--algorithm", choices=("ed25519", "p256"), default="ed25519", help="default: ed25519")
    show = add_command(group, "show", "Print the public key (COSE_Key in hex) of a private key file.", _key_show)
    show.add_argument("file", type=Path, metavar="FILE", help="a private key file")


def _key_new(options: argparse.Namespace) -> int:
    algorithm = Algorithm.ED25519 if options.algorithm == "ed25519" else Algorithm.ESP256
    key = generate_private_key(algorithm)
    save_private_key(options.file, key)
    print(key.public.cose_key.hex())
    return DONE


def _key_show(options: argparse.Namespace) -> int:
    print(load_private_key(options.file).public.cose_key.hex())
    return DONE
