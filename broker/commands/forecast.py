"""`energy-broker forecast`: what this broker and its neighbours expect of the next day, and what they arranged."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from broker.commands.common import DONE, add_command, add_config_option, print_row
from broker.config import load_broker_config, load_genesis
from broker.market.forecast import Expectation, divide
from broker.protocol.messages import Forecast, Genesis
from broker.protocol.sources import Source

if TYPE_CHECKING:
    from broker.service.arrangements import ArrangedWish


def add_commands(commands: Any) -> None:
    """The command `forecast`."""
    forecast = add_command(
        commands,
        "forecast",
        "What this broker and its neighbours expect of the next day (UTC) and arranged.",
        _forecast,
    )
    add_config_option(forecast)
    forecast.add_argument("--json", action="store_true", help="one JSON object a line")


def _forecast(options: argparse.Namespace) -> int:
    from broker.service.arrangements import arranged_for
    from broker.service.foresight import heard_forecasts, stored_expectations
    from broker.service.store import BrokerStore

    config = load_broker_config(options.config)
    genesis = load_genesis(config.ledger.genesis_file)
    store = BrokerStore(config.database)
    try:
        expectations = stored_expectations(store, genesis.interval_s)
        heard = heard_forecasts(store)
        arranged = arranged_for(store, config.broker.name, expectations[-1].day_start_s) if expectations else []
    finally:
        store.close()
    rows = list(_own_rows(expectations[-1], config.broker.name)) if expectations else []
    for forecast in heard:
        rows += _rows_of(forecast, genesis)
    rows += [_row_of(one, genesis) for one in arranged]
    for row in rows:
        print_row(row, as_json=options.json)
    if not rows and not options.json:
        print("nothing is forecast yet: it takes a recorded value of each time of day, and the next noon (UTC)")
    return DONE


def _row_of(arranged: "ArrangedWish", genesis: Genesis) -> dict[str, Any]:
    """What this broker wishes of a neighbour or a neighbour of it, and how much of that is promised."""
    return {
        "supplier": arranged.supplier,
        "requester": arranged.requester,
        "start_s": arranged.day_start_s + arranged.interval * genesis.interval_s,
        "target": arranged.source.label,
        "wished_wh": arranged.wished_wh,
        "promised_wh": arranged.promised_wh,
    }


def _own_rows(expectation: Expectation, broker: str) -> Iterator[dict[str, Any]]:
    """By interval and source or group, to the Wh; without what is 0 throughout."""
    for index in expectation.intervals:
        start_s = expectation.day_start_s + index * expectation.interval_s
        supply, demand = expectation.supply(index, with_bought=False), expectation.demand(index)
        division = divide(supply, demand)
        for target in sorted({*supply, *demand}):
            wanted_wh = demand.get(target, 0)
            values = {
                "generated_wh": supply.get(target, 0) if isinstance(target, Source) else 0,
                "demanded_wh": wanted_wh,
                "shortage_wh": wanted_wh - division.filled.get(target, 0),
                "surplus_wh": division.left.get(target, 0) if isinstance(target, Source) else 0,
            }
            if any(values.values()):
                yield {"broker": broker, "start_s": start_s, "target": target.label, **values}


def _rows_of(forecast: Forecast, genesis: Genesis) -> Iterator[dict[str, Any]]:
    """What a neighbour published, coarse as it is; lines that leave the source open are one row there."""
    for outlook in forecast.outlooks:
        yield {
            "broker": forecast.broker,
            "start_s": forecast.start_s + outlook.interval * genesis.interval_s,
            "target": outlook.source.label,
            "generated_wh": None,
            "demanded_wh": None,
            "shortage_wh": outlook.shortage_wh,
            "surplus_wh": outlook.surplus_wh,
        }
    for index, shortage_wh in enumerate(forecast.group_shortages_wh):
        if shortage_wh:
            yield {
                "broker": forecast.broker,
                "start_s": forecast.start_s + index * genesis.interval_s,
                "target": "groups",
                "generated_wh": None,
                "demanded_wh": None,
                "shortage_wh": shortage_wh,
                "surplus_wh": 0,
            }
