"""Whom the broker serves: consumers with their contracts and accounts, and providers' devices.

Records are read from the store when they are first needed and kept in bounded caches, so a start is quick however many
meters there are. `forget` empties the caches after the command line has changed something.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from broker.market.contracts import Contract, History, contract_from_bytes, contract_hash, history_start
from broker.market.terms import DeviceTerms
from broker.protocol.envelope import Signer
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.sources import Source
from broker.service.pseudonyms import day_key, day_of
from broker.service.store import AccountRow, BrokerStore

MAX_CACHED_RECORDS: Final = 262_144
"""Per kind. A consumer's record takes about a kilobyte."""

K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """The least recently added entries go first; good enough where every meter comes once an interval."""

    def __init__(self, most: int, load: Callable[[K], V | None]) -> None:
        self._most = most
        self._load = load
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The entry, loaded if need be; None (not cached) if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._load(key)
            if entry is not None:
                self.put(key, entry)
        return entry

    def put(self, key: K, entry: V) -> None:
        self._entries[key] = entry
        if len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()


@dataclass(frozen=True, slots=True)
class ContractVersion:
    """One version of a consumer's contract and its hash."""

    version: int
    contract: Contract
    hash: bytes


@dataclass(slots=True)
class Consumer:
    """A consumer's meter. The current day key is kept, because every demand of a day needs it."""

    meter: str
    key: PublicKey
    secret: bytes
    versions: tuple[ContractVersion, ...]
    _day: int = -1
    _day_key: bytes = b""

    def day_key(self, start_s: int) -> bytes:
        """k_day of the interval that starts then."""
        day = day_of(start_s)
        if day != self._day:
            self._day, self._day_key = day, day_key(self.secret, day)
        return self._day_key

    def contract_at(self, start_s: int) -> ContractVersion | None:
        """The version that applies to an interval: the newest that began by its start, unless that one has ended."""
        for version in reversed(self.versions):
            if version.contract.valid_from_s <= start_s:
                until_s = version.contract.valid_until_s
                return version if until_s is None or start_s < until_s else None
        return None


@dataclass(frozen=True, slots=True)
class Device:
    """A provider's generating device, named by its meter."""

    device: str
    owner: str
    key: PublicKey
    source: Source
    capacity_w: int
    area: str
    terms: DeviceTerms
    from_s: int

    @property
    def price(self) -> int:
        return self.terms.price


class Account(NamedTuple):
    """What a consumer received since contract version and accounting period began."""

    period_start_s: int
    version: int
    history: History


class Registry:
    """Looks up meters by name and by key, and keeps their accounts."""

    def __init__(self, store: BrokerStore) -> None:
        self._store = store
        self._consumers = BoundedCache(MAX_CACHED_RECORDS, self._load_consumer)
        self._devices = BoundedCache(MAX_CACHED_RECORDS, self._load_device)
        self._signers = BoundedCache(MAX_CACHED_RECORDS, self._load_signer)
        self._accounts: BoundedCache[str, Account] = BoundedCache(MAX_CACHED_RECORDS, lambda _meter: None)
        # Contracts repeat: most consumers choose from a few tariffs, so equal ones share one decoded value.
        self._contracts: BoundedCache[bytes, Contract] = BoundedCache(4_096, contract_from_bytes)
        self.expected_meters = store.expected_meters()

    def forget(self) -> None:
        """Drop what is cached about registrations, after somebody else has written to the store."""
        self._consumers.clear()
        self._devices.clear()
        self._signers.clear()
        self.expected_meters = self._store.expected_meters()

    def consumer(self, meter: str) -> Consumer | None:
        return self._consumers.get(meter)

    def device(self, device: str) -> Device | None:
        return self._devices.get(device)

    def signer(self, key_id: bytes) -> Signer | None:
        """The meter that signs with this key."""
        return self._signers.get(key_id)

    def account(self, consumer: Consumer, version: ContractVersion, start_s: int) -> Account:
        """The account that decides an interval; a fresh one at the start of a contract version or a month."""
        period_start_s = history_start(version.contract, start_s)
        account = self._accounts.get(consumer.meter)
        if account is not None and (account.period_start_s, account.version) == (period_start_s, version.version):
            return account
        row = self._store.account(consumer.meter, period_start_s, version.version)
        if row is None:
            return Account(period_start_s, version.version, History.empty(version.contract))
        return Account(period_start_s, version.version, History(row.by_line, row.total_wh))

    def keep_accounts(self, changed: Iterable[tuple[str, Account]]) -> None:
        """Store these accounts of meters; of a meter with several the last one is kept at hand."""
        rows = []
        for meter, account in changed:
            history = account.history
            rows.append(AccountRow(meter, account.period_start_s, account.version, history.total, history.by_line))
            self._accounts.put(meter, account)
        self._store.set_accounts(rows)

    def _load_consumer(self, meter: str) -> Consumer | None:
        row = self._store.consumer(meter)
        if row is None:
            return None
        versions = []
        for contract_row in self._store.contracts(meter):
            contract = self._contracts.get(contract_row.contract)
            if contract is not None:
                versions.append(ContractVersion(contract_row.version, contract, contract_hash(contract)))
        return Consumer(meter, public_key_from_cose(row.cose_key), row.secret, tuple(versions))

    def _load_device(self, device: str) -> Device | None:
        row = self._store.device(device)
        if row is None:
            return None
        key = public_key_from_cose(row.cose_key)
        terms = DeviceTerms(row.price, row.reserve_ppm, row.exclusive_ppm, row.exclusive_for)
        return Device(row.device, row.owner, key, Source(row.source), row.capacity_w, row.area, terms, row.from_s)

    def _load_signer(self, key_id: bytes) -> Signer | None:
        consumer = self._store.consumer_by_key(key_id)
        if consumer is not None:
            return Signer(consumer.meter, public_key_from_cose(consumer.cose_key))
        device = self._store.device_by_key(key_id)
        return Signer(device.device, public_key_from_cose(device.cose_key)) if device is not None else None
