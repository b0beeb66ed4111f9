"""Lookups, their bounded caches, and accounts that begin anew with each month and contract version."""

from pathlib import Path

import pytest
from support.ledger_world import key

from broker.market.contracts import History, ShortageChoice, contract_bytes, make_contract, period_start
from broker.protocol.sources import Source
from broker.service.registry import Account, BoundedCache, Registry
from broker.service.store import BrokerStore, ConsumerRow, ContractRow, DeviceRow

JANUARY_S = 1_769_900_400  # 2026-01-31T23:00:00Z
FEBRUARY_S = JANUARY_S + 3_600


def contract(valid_from_s: int, solar_ppm: int = 400_000) -> bytes:
    return contract_bytes(make_contract(valid_from_s, [("solar", solar_ppm)], ShortageChoice.ANY, area="north"))


@pytest.fixture
def store(tmp_path: Path) -> BrokerStore:
    store = BrokerStore(tmp_path / "broker.db")
    home, roof = key("home").public, key("roof").public
    store.add_consumer(ConsumerRow("home", home.cose_key, home.key_id, b"s" * 32, 0))
    store.add_contract("home", ContractRow(1, 0, contract(0)))
    store.add_device(DeviceRow("roof", "alice", roof.cose_key, roof.key_id, int(Source.SOLAR), 4_000, "north", 9, 0))
    return store


def test_a_cache_holds_so_many_and_no_more() -> None:
    loaded: list[int] = []

    def load(number: int) -> str | None:
        loaded.append(number)
        return str(number) if number >= 0 else None

    cache = BoundedCache(3, load)
    for number in (1, 2, 3, 1, 4):
        assert cache.get(number) == str(number)
    assert loaded == [1, 2, 3, 4]
    assert cache.get(1) == "1"
    assert loaded[-1] == 1, "the oldest went when the fourth came"
    assert cache.get(-1) is None
    assert cache.get(-1) is None
    assert loaded[-2:] == [-1, -1], "what is not there is not remembered: it may be registered any moment"
    cache.clear()
    cache.get(4)
    assert loaded[-1] == 4


def test_meters_are_found_by_name_and_key(store: BrokerStore) -> None:
    registry = Registry(store)
    consumer, device = registry.consumer("home"), registry.device("roof")
    assert consumer is not None
    assert device is not None
    assert registry.consumer("roof") is None
    assert registry.device("home") is None
    signer = registry.signer(key("home").public.key_id)
    assert signer is not None
    assert (signer.name, signer.key) == ("home", consumer.key)
    assert registry.signer(b"?" * 16) is None
    assert registry.expected_meters == 2


def test_after_forget_new_registrations_are_seen(store: BrokerStore) -> None:
    registry = Registry(store)
    before = registry.consumer("home")
    assert before is not None
    store.add_contract("home", ContractRow(2, FEBRUARY_S, contract(FEBRUARY_S)))
    barn = key("barn").public
    store.add_device(DeviceRow("barn", "alice", barn.cose_key, barn.key_id, int(Source.WIND), 1, "north", 1, 0))
    assert registry.consumer("home") is before
    registry.forget()
    after = registry.consumer("home")
    assert after is not None
    assert [version.version for version in after.versions] == [1, 2]
    assert registry.expected_meters == 3


def test_the_newest_contract_that_is_valid_at_the_start_applies(store: BrokerStore) -> None:
    store.add_contract("home", ContractRow(2, FEBRUARY_S, contract(FEBRUARY_S, 900_000)))
    consumer = Registry(store).consumer("home")
    assert consumer is not None
    for start_s, version in ((0, 1), (FEBRUARY_S - 1_800, 1), (FEBRUARY_S, 2), (FEBRUARY_S + 86_400, 2)):
        found = consumer.contract_at(start_s)
        assert found is not None
        assert found.version == version


def test_accounts_begin_anew_with_the_month_and_the_old_one_stays(store: BrokerStore) -> None:
    registry = Registry(store)
    consumer = registry.consumer("home")
    assert consumer is not None
    version = consumer.versions[0]
    january = registry.account(consumer, version, JANUARY_S)
    assert january.history == History((0, 0), 0)
    spent = Account(january.period_start_s, 1, History((40, 60), 100))
    registry.keep_accounts([("home", spent)])
    assert registry.account(consumer, version, JANUARY_S) == spent
    february = registry.account(consumer, version, FEBRUARY_S)
    assert (february.period_start_s, february.history.total) == (period_start(FEBRUARY_S), 0)
    registry.keep_accounts([("home", Account(february.period_start_s, 1, History((1, 0), 1)))])
    # A late demand of January is decided by January's account, from a fresh start too.
    assert registry.account(consumer, version, JANUARY_S) == spent
    assert Registry(store).account(consumer, version, JANUARY_S) == spent


def test_day_keys_follow_the_day(store: BrokerStore) -> None:
    consumer = Registry(store).consumer("home")
    assert consumer is not None
    january = consumer.day_key(JANUARY_S)
    assert consumer.day_key(JANUARY_S + 1_800) == january
    assert consumer.day_key(FEBRUARY_S) != january
    assert consumer.day_key(JANUARY_S) == january
