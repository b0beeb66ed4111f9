"""`python -m dengen_testing.wire --config street.json`: a street of wire-level meters as a process of its own.

It follows the conductor that its config names, until SIGTERM or SIGINT. Ports and paths stand in `ready.json` in the
street's folder. Exit codes: 0 ended by a signal, 2 for a config that cannot be used.
"""

import argparse
import signal
import sys
import threading
from pathlib import Path

from dengen_testing.wire.config import StreetConfigError, load_street_config
from dengen_testing.wire.street import Street


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dengen_testing.wire", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="the street file (JSON, see wire/config.py)")
    arguments = parser.parse_args()
    try:
        config = load_street_config(arguments.config)
    except (StreetConfigError, OSError) as error:
        print(f"{arguments.config}: {error}", file=sys.stderr)
        return 2
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with Street(config) as street:
        for name, address in street.addresses().items():
            print(f"{name}: {address}", flush=True)
        if config.conductor is None:
            stopping.wait()
        else:
            street.follow(stopping.is_set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
