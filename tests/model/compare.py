"""Holds the rows of the real state against the model, and the books against themselves."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from broker.ledger import state
from broker.ledger.state import Key
from model.ledger_model import ClosedSeen, DemandSeen, Metered, Model, OrderSeen, Span, Wh

Rows = Mapping[Key, Any]


def assert_same(rows: Rows, model: Model) -> None:
    """The real rows (deleted ones None or absent) say what the model says, and the books balance in both."""
    tables: dict[int, dict[Any, Any]] = defaultdict(dict)
    for key, row in rows.items():
        if row is not None:
            tables[key[0]][key[1:]] = row
    _assert_assets(tables, model)
    _assert_totals(tables, model)
    _assert_demands(tables, model)
    _assert_carry_and_metered(tables, model)
    _assert_who(tables, model)


def _runs(wh: tuple[Wh, ...], revision: int, where: str) -> list[tuple[int, int, Wh]]:
    """[from, to) of neighbouring equal Wh."""
    runs, at = [], 0
    for one, group in groupby(wh):
        length = len(list(group))
        if one.revision == revision and one.where == where:
            runs.append((at, at + length, one))
        at += length
    return runs


def _assert_assets(tables: Any, model: Model) -> None:
    expected_assets, expected_slices, expected_owned = {}, {}, {}
    for (device, start_s), wh in model.wh.items():
        admission = model.device(device)
        for revision in sorted({one.revision for one in wh}):
            count = Counter(one.where for one in wh if one.revision == revision)
            held = tuple((low, high, one.owner) for low, high, one in _runs(wh, revision, "held"))
            at = (start_s, device, 0, revision)
            expected_assets[at] = (
                admission.source,
                admission.area,
                sum(count.values()),
                count["delivered"],
                count["withdrawn"],
                count["expired"],
                held,
                model.deliveries.get((device, start_s, revision), 0),
            )
            for low, high, one in _runs(wh, revision, "delivered"):
                expected_slices[(*at, low)] = (
                    high,
                    one.broker,
                    one.pseudonym,
                    one.demand_start_s,
                    one.line,
                    one.delivery,
                )
            for *_, owner in held:
                keeper = model.keepers[device, start_s, revision] if owner == admission.owner else None
                expected_owned[(owner, *at)] = (admission.source, keeper)
    _assert_equal("assets", {key: asset_fields(row) for key, row in tables[state.ASSET].items()}, expected_assets)
    slices = {
        key: (row.to_wh, row.broker, row.pseudonym, row.demand_start_s, row.line, row.sequence)
        for key, row in tables[state.SLICE].items()
    }
    _assert_equal("delivered slices", slices, expected_slices)
    owned = {key: tuple(row) for key, row in tables[state.OWNED].items()}
    _assert_equal("the index of owners", owned, expected_owned)
    mandated = {(keeper, *key[1:]) for key, (_, keeper) in expected_owned.items() if keeper is not None}
    _assert_equal("the index of mandates", {key: key for key in tables[state.MANDATED]}, {key: key for key in mandated})
    for key, row in tables[state.ASSET].items():
        held_wh = sum(held.to_wh - held.from_wh for held in row.held)
        assert row.issued_wh == held_wh + row.delivered_wh + row.withdrawn_wh + row.expired_wh, (key, row)


def asset_fields(row: Any) -> tuple[Any, ...]:
    """An AssetRow in the order of the model's."""
    return (
        row.source,
        row.area,
        row.issued_wh,
        row.delivered_wh,
        row.withdrawn_wh,
        row.expired_wh,
        tuple(tuple(held) for held in row.held),
        row.deliveries,
    )


def _assert_totals(tables: Any, model: Model) -> None:
    expected: dict[Any, Counter[str]] = defaultdict(Counter)
    for device, start_s, _, one in model.all_wh():
        expected[start_s, int(model.device(device).source)][one.where] += 1
    wanted = {
        key: (sum(count.values()), count["held"], count["delivered"], count["withdrawn"], count["expired"])
        for key, count in expected.items()
    }
    _assert_equal("totals", {key: tuple(row) for key, row in tables[state.TOTAL].items()}, wanted)
    for key, row in tables[state.TOTAL].items():
        assert row.issued_wh == row.held_wh + row.delivered_wh + row.withdrawn_wh + row.expired_wh, (key, row)


def _assert_demands(tables: Any, model: Model) -> None:
    rows = tables[state.DEMAND]
    given = model.delivered()
    real = {key: DemandSeen(row.broker, row.revision, row.demanded_wh, row.commitment) for key, row in rows.items()}
    _assert_equal("demands", real, model.demands)
    delivered = {key: row.delivered_wh for key, row in rows.items()}
    _assert_equal("delivered Wh", delivered, {key: given[key] for key in model.demands})
    for key, row in rows.items():
        assert row.delivered_wh <= row.demanded_wh, (key, row)


def _assert_carry_and_metered(tables: Any, model: Model) -> None:
    real_carry = {key[0]: row.energy_wh for key, row in tables[state.CARRY].items()}
    _assert_equal("carry", real_carry, {device: wh for device, wh in model.carry.items() if wh})
    # A first revision that stands by itself needs no row beside its asset.
    real = {}
    for (start_s, device, _, revision), row in tables[state.ASSET].items():
        if revision == 0:
            real[device, start_s] = (Metered(0, row.issued_wh), row.issued_wh, row.issued_wh - row.withdrawn_wh)
    for (start_s, device, _), row in tables[state.METERED].items():
        real[device, start_s] = (Metered(row.revision, row.energy_wh), row.high_water_wh, row.net_wh)
    expected = {
        (device, start_s): (metered, len(model.wh.get((device, start_s), ())), model.net(device, start_s))
        for (device, start_s), metered in model.metered.items()
    }
    _assert_equal("metered", real, expected)
    # Whatever a device has metered is on the ledger, or waits in its carry.
    for device in model.admissions:
        metered_wh = sum(one.energy_wh for (name, _), one in model.metered.items() if name == device)
        net_wh = sum(row[2] for (name, _), row in real.items() if name == device)
        assert metered_wh == net_wh + real_carry.get(device, 0), device


def _assert_who(tables: Any, model: Model) -> None:
    orders = {key: OrderSeen(None, row.used_wh, row.voided) for key, row in tables[state.ORDER].items()}
    _assert_equal("orders", orders, {key: seen._replace(message=None) for key, seen in model.orders.items()})
    closed = {
        key: ClosedSeen(row.revision, row.demands, row.demanded_wh, row.root, row.lowered_wh)
        for key, row in tables[state.CLOSED].items()
    }
    _assert_equal("closes", closed, model.closed)
    _assert_equal("clocks", {key[0]: row.time_s for key, row in tables[state.CLOCK].items()}, model.clocks)
    spans = {key[0]: tuple(Span(*span) for span in row.spans) for key, row in tables[state.MANDATES].items()}
    _assert_equal("mandates", spans, model.spans)
    _assert_equal("parties", {key[0]: row.role for key, row in tables[state.PARTY].items()}, model.roles)
    _assert_equal("devices", {key[0] for key in tables[state.DEVICE]}, set(model.admissions))
    real_keys = {
        key[0]: (row.name, row.cose_key, row.retired_from_s, row.grace_until_s, row.revoked)
        for key, row in tables[state.KEY].items()
    }
    _assert_equal("keys", real_keys, {key_id: tuple(key)[1:] for key_id, key in model.keys.items()})
    changes = tables[state.VALIDATORS].get((0,))
    expected = None
    if model.validator_changes:
        validators = tuple((name, *each) for name, each in sorted(model.validators.items()))
        expected = (model.validator_changes, validators)
    _assert_equal("validators", changes, expected)


def _assert_equal(what: str, real: Any, expected: Any) -> None:
    if real == expected:
        return
    if isinstance(real, dict) and isinstance(expected, dict):
        keys = [key for key in {**real, **expected} if real.get(key) != expected.get(key)]
        real, expected = ({key: side.get(key) for key in keys} for side in (real, expected))
    raise AssertionError(f"{what} differ:\n   rules {real}\n   model {expected}")
