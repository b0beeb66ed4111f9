"""One market for each file of tests and each ledger engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cases.marketplace import Broker, MarketPlace


@pytest.fixture(scope="module", params=["embedded", "cometbft"])
def market(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketPlace]:
    """A running MQTT server and a ledger on that engine, served over MQTT by the broker `harbour`."""
    engine: str = request.param
    if engine == "cometbft":
        request.getfixturevalue("cometbft")
    folder: Path = tmp_path_factory.mktemp(engine)
    with MarketPlace(folder, engine) as place:
        yield place


@pytest.fixture(scope="module")
def east(market: MarketPlace) -> Broker:
    """A broker that has `west` for a neighbour. On a network it has nodes of its own."""
    return _pair(market)[0]


@pytest.fixture(scope="module")
def west(market: MarketPlace) -> Broker:
    """The neighbour of `east`. It reaches the ledger over MQTT."""
    return _pair(market)[1]


def _pair(market: MarketPlace) -> tuple[Broker, Broker]:
    if "east" not in market.brokers:
        market.open_broker("east", ["west"])
        market.open_broker("west", ["east"])
    return market.brokers["east"], market.brokers["west"]
