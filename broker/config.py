"""The broker's config file: who it is, how it reaches MQTT and the ledger, and which neighbours it knows.

Consumers, providers, contracts and mandates are data, not config: `energy-broker consumer add` and its kin keep them in
the broker's database. `firmware_config/examples/broker.toml` is a commented example.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal
from urllib.parse import urlsplit

from broker.market.tariff import MAX_PRICE
from broker.protocol.errors import MalformedMessage
from broker.protocol.files import read_file
from broker.protocol.keys import PublicKey, public_key_from_cose
from broker.protocol.limits import MAX_INTEGER
from broker.protocol.messages import Genesis
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.sources import Source
from firmware_config.loader import Between, ConfigError, OneName, WrongValue, load_config

if TYPE_CHECKING:
    from broker.ledger.trust import Trust

TRUST_FILE: Final = "a trust file as `energy-broker ledger trust` prints it"

_MAX_FILE_BYTES: Final = 1_048_576
"""A genesis or trust file of 64 validators is a few kilobytes."""


@dataclass(frozen=True, slots=True)
class BrokerSection:
    """`name` is how neighbours, meters and the ledger know this broker; `data_dir` holds its database."""

    name: Annotated[str, OneName()]
    key_file: Path
    data_dir: Path
    clock: Literal["system", "conductor"] = "system"


@dataclass(frozen=True, slots=True)
class HostSection:
    """Present if this broker hosts the ledger: where it lies, and the validator key that signs its blocks."""

    path: Path
    validator: Annotated[str, OneName()]
    key_file: Path


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """Present if this broker also serves the ledger of its network over MQTT, in the name of this validator."""

    validator: Annotated[str, OneName()]
    key_file: Path


@dataclass(frozen=True, slots=True)
class CometbftSection:
    """The broker's own nodes of a ledger network, `http://HOST:PORT` each: the first that answers is asked.

    `timeout_s`: how long an answer is waited for before the next node is asked.
    """

    nodes: tuple[str, ...]
    timeout_s: Annotated[int, Between(1, 60)] = 3
    gateway: GatewaySection | None = None

    def __post_init__(self) -> None:
        if not self.nodes:
            raise WrongValue("nodes", "at least one http://HOST:PORT")
        for url in self.nodes:
            if urlsplit(url).scheme not in ("http", "https") or urlsplit(url).hostname is None:
                raise WrongValue("nodes", f"http://HOST:PORT of each node, got {url!r}")


@dataclass(frozen=True, slots=True)
class LedgerSection:
    """`genesis_file` says which ledger; `host` or `cometbft` where it is. With neither it is reached over MQTT."""

    genesis_file: Path
    host: HostSection | None = None
    cometbft: CometbftSection | None = None

    def __post_init__(self) -> None:
        if self.host is not None and self.cometbft is not None:
            raise WrongValue("host", "either [ledger.host] or [ledger.cometbft], not both")


@dataclass(frozen=True, slots=True)
class NeighbourSection:
    """A neighbouring broker. `key` is its COSE_Key in hex (`energy-broker key show`).

    `is_served`: its orders are considered, up to `most_wh` of one interval; `is_asked`: it is sent orders.
    """

    name: Annotated[str, OneName()]
    key: str
    is_served: bool = True
    is_asked: bool = True
    most_wh: Annotated[int, Between(0, MAX_INTEGER)] = MAX_INTEGER

    def __post_init__(self) -> None:
        parse_public_key(self.key)


@dataclass(frozen=True, slots=True)
class MarketSection:
    """Prices, in µ-currency per kWh.

    `highest_price` is what neighbours are offered at most where a contract says nothing. The margins come on top of
    what the broker itself paid, for its consumers and for its neighbours. `passes_on`: what a neighbour orders and is
    not here is ordered from others for it. `own_groups_first`: own lines of groups are filled before neighbours are
    served; otherwise neighbours' lines of single sources come before them. `keeps_for_windows`: neighbours do not get
    what own consumers with a longer window are expected to want later in the day. `arranges_ahead`: say a day ahead
    what is wished of neighbours and promised to them, and serve first what was promised.
    """

    highest_price: Annotated[int, Between(0, MAX_PRICE)] = 1_000_000
    consumer_margin: Annotated[int, Between(0, MAX_PRICE)] = 0
    neighbour_margin: Annotated[int, Between(0, MAX_PRICE)] = 0
    passes_on: bool = True
    own_groups_first: bool = False
    keeps_for_windows: bool = False
    arranges_ahead: bool = False


UNMATCHED_LABEL: Final = "unmatched"


@dataclass(frozen=True, slots=True)
class CertificatesSection:
    """By which factors certificates reckon CO2, in mg CO2-equivalent per kWh by source, and whose figures they are.

    `unmatched` names a residual mix for what no asset stands for. What the table does not name keeps its default.
    `ledger` is a directory with a copy of the ledger by a validator, where this broker does not host it. Without one a
    copy is made over MQTT, in `data_dir`.
    """

    ledger: Path | None = None
    factors_mg_per_kwh: dict[str, Annotated[int, Between(0, 10_000_000)]] = field(default_factory=dict)
    factors_source: str = ""

    def __post_init__(self) -> None:
        known = {*(source.label for source in Source), UNMATCHED_LABEL}
        unknown = set(self.factors_mg_per_kwh) - known
        if unknown:
            raise WrongValue("factors_mg_per_kwh", f"{', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
        if self.factors_mg_per_kwh and not 0 < len(self.factors_source) <= 200:
            raise WrongValue("factors_source", "in up to 200 characters where the factors in this config come from")


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """The whole file."""

    broker: BrokerSection
    ledger: LedgerSection
    mqtt: MqttConfig = field(default_factory=MqttConfig)
    neighbours: tuple[NeighbourSection, ...] = ()
    market: MarketSection = field(default_factory=MarketSection)
    certificates: CertificatesSection = field(default_factory=CertificatesSection)

    @property
    def database(self) -> Path:
        return self.broker.data_dir / "broker.db"


def load_broker_config(path: Path) -> BrokerConfig:
    """Read and check a broker's config. Raises ConfigError naming file, key and what was expected."""
    config = load_config(path, BrokerConfig)
    names = [neighbour.name for neighbour in config.neighbours]
    if len(set(names)) != len(names) or config.broker.name in names:
        raise ConfigError(path, "neighbours", "each neighbour once, and not this broker itself")
    return config


def load_genesis(path: Path) -> Genesis:
    """Read a genesis file. Raises ConfigError if it is not there or not one."""
    try:
        return Genesis.from_bytes(read_file(path, _MAX_FILE_BYTES))
    except OSError as error:
        raise ConfigError(
            path, "", f"a readable genesis file ({error.strerror}); get it from who hosts the ledger"
        ) from error
    except MalformedMessage as error:
        raise ConfigError(path, "", f"a genesis as `energy-broker ledger genesis` writes it ({error})") from error


def load_trust(path: Path) -> "Trust":
    """Read a trust file. Raises OSError, and WrongValue if it is none."""
    from broker.ledger.trust import read_trust

    try:
        return read_trust(read_file(path, _MAX_FILE_BYTES).decode())
    except UnicodeDecodeError as error:
        raise WrongValue(str(path), f"{TRUST_FILE}, which is text in UTF-8") from error
    except MalformedMessage as error:
        raise WrongValue(str(path), f"{TRUST_FILE} ({error})") from error


def parse_public_key(text: str) -> PublicKey:
    """A public key from the hex of its COSE_Key. Raises WrongValue."""
    try:
        return public_key_from_cose(bytes.fromhex(text))
    except (ValueError, MalformedMessage) as error:
        raise WrongValue("key", "the hex that `energy-broker key show` prints") from error
