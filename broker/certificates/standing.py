"""What the ledger has of a certificate's contents now: whether anything was taken back since, or is left out of it.

A proof of inclusion says that something was put on the ledger, never that it was not corrected later or that there is
nothing else. A copy of the ledger says both. The copy is believed here: `energy-broker ledger verify` checks it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from broker.certificates.contents import Contents, Line, utc_text
from broker.certificates.verify import Verified
from broker.ledger.chain import Head, genesis_hash
from broker.ledger.inspect import opened
from broker.ledger.merkle import hashes_from
from broker.ledger.rules.step import clock_of, responsible_broker
from broker.ledger.state import DEMAND, KEY, SLICE, DemandRow, Key, KeyRow, SliceRow, State, asset_key
from broker.ledger.store import Store
from broker.protocol.keys import public_key_from_cose
from broker.protocol.messages import Genesis
from broker.service.pseudonyms import day_of, interval_key, pseudonym

MAX_FAULTS: Final = 100
"""More differences than these say nothing new."""

_KEYS_AT_ONCE: Final = 4_096


@dataclass(frozen=True, slots=True)
class Standing:
    """A certificate beside the ledger at `height`. `faults`: what is not as it says any more, a sentence each.

    `is_settled`: by the market clocks on the ledger, nothing in it can be corrected any more.
    """

    height: int
    is_settled: bool
    faults: tuple[str, ...]


def standing_in(verified: Verified, path: Path) -> Standing:
    """Hold a verified certificate against the ledger in directory `path`. Raises LedgerError if that cannot be read."""
    with opened(path) as store:
        return standing(verified, store)


def standing(verified: Verified, store: Store) -> Standing:
    """As `standing_in`, of what is open already; wanted is one moment of it."""
    contents = verified.contents
    if genesis_hash(Genesis.from_bytes(store.meta("genesis") or b"")) != genesis_hash(contents.genesis):
        return Standing(0, False, (f"it is about another ledger of the name {contents.genesis.ledger} than this copy",))
    head = Head.from_bytes(store.meta("head") or b"")
    settled_s = settled_until_s(store, contents.certificate.broker, contents.assets_used)
    faults = tuple(islice(_faults(verified, store, head), MAX_FAULTS))
    return Standing(head.height, settled_s >= contents.final_s, faults)


def settled_until_s(state: State, broker: str, assets: Iterable[tuple[str, int]]) -> int:
    """The earliest clock by which corrections are judged: of this broker, and of those mandated for the devices.

    `assets`: (device, start of the interval). Without a mandate there is no such clock and never an end: 0.
    """
    brokers = {responsible_broker(state, device, start_s) for device, start_s in assets} | {broker}
    return min(0 if name is None else clock_of(state, name) for name in brokers)


def _faults(verified: Verified, store: Store, head: Head) -> Iterator[str]:
    contents, checkpoint = verified.contents, verified.checkpoint
    certificate = contents.certificate
    if checkpoint.tree_size > head.tree_size:
        yield (
            f"this copy of the ledger ends at height {head.height}, before the certificate's {checkpoint.height}; get a"
            " newer one"
        )
        return
    if hashes_from(store.merkle_node)(0, checkpoint.tree_size) != checkpoint.root:
        yield f"at height {checkpoint.height} this copy of the ledger has another history than the certificate"
        return
    signed_with: KeyRow | None = store.get((KEY, verified.signed_with))
    if signed_with is None or signed_with.revoked:
        yield f"the key that signed it is not {certificate.broker}'s any more; have the broker issue it anew"
    names, unknown = _pseudonyms(contents)
    if unknown:
        yield (
            f"{utc_text(unknown[0])}: it does not disclose the key of this interval, so nobody can tell whether a"
            f" demand is left out; {len(unknown)} such intervals in all"
        )
    listed = {
        interval.number * contents.genesis.interval_s: (interval, demanded_wh)
        for interval, demanded_wh in zip(certificate.intervals, contents.demanded_wh, strict=True)
    }
    lines: defaultdict[int, list[Line]] = defaultdict(list)
    for line in contents.lines:
        lines[line.start_s].append(line)
    slices = _rows(store, (_slice_key(contents, line) for line in contents.lines))
    demands = _rows(store, ((DEMAND, start_s, name) for start_s, name in names.items()))
    since = f"since height {checkpoint.height}"
    for start_s, name in names.items():
        demand: DemandRow | None = demands[DEMAND, start_s, name]
        at = utc_text(start_s)
        if start_s not in listed:
            if demand is not None:
                yield f"{at}: the ledger has a demand of {demand.demanded_wh} Wh, and it leaves this interval out"
            continue
        interval, demanded_wh = listed[start_s]
        if demand is None or demand.broker != certificate.broker:
            yield f"{at}: the ledger has no demand that {certificate.broker} served"
            continue
        if (demand.revision, demand.demanded_wh) != (len(interval.demands) - 1, demanded_wh):
            yield (
                f"{at}: the demand was corrected {since}, from {demanded_wh} to {demand.demanded_wh} Wh; have the"
                " broker issue it anew"
            )
        for line in lines[start_s]:
            row: SliceRow | None = slices[_slice_key(contents, line)]
            end_wh = row.to_wh if row is not None and row.pseudonym == name else line.from_wh
            if end_wh != line.to_wh:
                device = contents.devices[line.device].admission.device
                yield (
                    f"{at}: of {line.energy_wh} Wh that {device} made at {utc_text(line.made_s)} the ledger has"
                    f" {end_wh - line.from_wh}: the rest was taken back {since}; have the broker issue it anew"
                )
        if demand.delivered_wh > sum(line.energy_wh for line in lines[start_s]):
            yield (
                f"{at}: the ledger has {demand.delivered_wh} Wh delivered, and it lists"
                f" {sum(line.energy_wh for line in lines[start_s])}; have the broker issue it anew"
            )


def _pseudonyms(contents: Contents) -> tuple[dict[int, bytes], list[int]]:
    """The consumer's name in each interval of the period, and the intervals of which no key is disclosed."""
    certificate = contents.certificate
    key_id = public_key_from_cose(certificate.meter_key).key_id
    days, single = dict(certificate.day_keys), dict(certificate.interval_keys)
    names, unknown = {}, []
    for start_s in range(certificate.from_s, certificate.to_s, contents.genesis.interval_s):
        k_interval = single.get(start_s)
        if k_interval is None and day_of(start_s) in days:
            k_interval = interval_key(days[day_of(start_s)], start_s)
        if k_interval is None:
            unknown.append(start_s)
        else:
            names[start_s] = pseudonym(k_interval, key_id)
    return names, unknown


def _slice_key(contents: Contents, line: Line) -> Key:
    return (SLICE, *asset_key(contents.assets[line.issue])[1:], line.from_wh)


def _rows(store: Store, keys: Iterable[Key]) -> dict[Key, Any]:
    """All these rows: single reads would cost five times as much, and a period of a year has sixty thousand."""
    rows: dict[Key, Any] = {}
    waiting = iter(keys)
    while some := list(islice(waiting, _KEYS_AT_ONCE)):
        rows |= store.read(some)
    return rows
