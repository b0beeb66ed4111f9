"""Issues certificates as a broker's config says: with its key, its factors, and the copy of the ledger that it has."""

import time
from pathlib import Path
from typing import Final

from broker.certificates.codes import DEFAULT_FACTORS, DEFAULT_FACTORS_SOURCE, UNMATCHED
from broker.certificates.document import Factor
from broker.certificates.gather import issue_certificate
from broker.config import UNMATCHED_LABEL, BrokerConfig, load_genesis
from broker.protocol.keys import load_private_key
from broker.protocol.sources import Source
from broker.service.ledger_copy import update_copy
from broker.service.store import BrokerStore

INDEX_NAME: Final = "ledger-index.db"
"""Beside the broker's database. It holds nothing that is not on the ledger, and may be removed."""


class NoLedger(Exception):
    """This broker has no copy of the ledger, and none can be made. The text says what to do."""


def ledger_of(config: BrokerConfig) -> Path:
    """The directory in which this broker has the ledger; a copy of a remote one is brought up to date first.

    Raises NoLedger, and what `ledger_copy.update_copy` raises.
    """
    if config.certificates.ledger is not None:
        return config.certificates.ledger
    if config.ledger.host is not None:
        return config.ledger.host.path
    if config.ledger.cometbft is not None:
        raise NoLedger("name the directory of a node's copy of the ledger as `ledger` in [certificates] of the config")
    return update_copy(config)


def issue(config: BrokerConfig, ledger: Path, meter: str, period: tuple[int, int]) -> bytes:
    """A consumer's certificate for `[from_s, to_s)`. Raises what `gather.issue_certificate` raises, and StoreError."""
    factors, factors_source = factors_of(config)
    store = BrokerStore(config.database)
    try:
        return issue_certificate(
            store,
            ledger,
            config.broker.data_dir / INDEX_NAME,
            load_genesis(config.ledger.genesis_file),
            config.broker.name,
            load_private_key(config.broker.key_file),
            meter,
            period,
            int(time.time()),
            factors,
            factors_source,
        )
    finally:
        store.close()


def factors_of(config: BrokerConfig) -> tuple[list[Factor], str]:
    """The factors to reckon CO2 with, and where they come from."""
    section = config.certificates
    own = {
        UNMATCHED if label == UNMATCHED_LABEL else int(Source[label.upper()]): mg
        for label, mg in section.factors_mg_per_kwh.items()
    }
    source = f"{section.factors_source}; else {DEFAULT_FACTORS_SOURCE}" if own else DEFAULT_FACTORS_SOURCE
    return [Factor(number, mg) for number, mg in sorted({**DEFAULT_FACTORS, **own}.items())], source
