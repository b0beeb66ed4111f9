"""One broker that hosts its ledger, three generating devices, and as many consumers as wanted.

Keys, statements and configs are made with the same commands that a person would use; only consumers go into the
broker's store directly, all in one transaction, because a million command lines would take a day. Meters are numbered:
`meter_name` and `meter_key` make the same from the same number in every process, so the load needs no key files.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric import ed25519
from dengen_testing.market import energy_broker
from dengen_testing.processes import ManagedProcess, broker_process
from dengen_testing.waiting import WaitedTooLong

from broker.market.contracts import ShortageChoice, contract_bytes, make_contract
from broker.protocol import cbor, keys
from broker.protocol.envelope import seal
from broker.protocol.keys import PrivateKey, load_private_key
from broker.protocol.messages import Carrier, Quality, Reading, Report, Stage, Tick
from broker.protocol.mqtt_link import MqttConfig, MqttLink
from broker.protocol.topics import Topics
from broker.service.store import BrokerStore, ConsumerRow, ContractRow

LEDGER: Final = "bench"
BROKER: Final = "east"
CONDUCTOR: Final = "conductor"
INTERVAL_S: Final = 1_800
GATE_1_S: Final = 600
GATE_2_S: Final = 1_200
FIRST_INTERVAL_S: Final = 1_325_376_000
"""2012-01-01T00:00:00Z: all intervals of a run lie in one accounting period."""

MAX_DEMAND_WH: Final = 1_000
_CONNECT_LIMIT_S: Final = 10.0

DEVICES: Final = (("solar-1", "solar"), ("wind-1", "wind"), ("hydro-1", "hydro"))

TARIFFS: Final = (
    (("solar", 400_000), ("wind", 300_000)),
    (("wind", 600_000), ("hydro", 400_000)),
    (("hydro", 500_000), ("renewable", 500_000)),
    (("renewable", 1_000_000),),
)
"""Contract lines as (source or group, ppm); the first is completed by `any`. Meters take them in turn, so a contract
has two lines on average.
"""

_ED25519_PUBLIC: Final = {1: 1, -1: 6}


def meter_name(number: int) -> str:
    return f"meter-{number:07}"


def meter_key(number: int) -> PrivateKey:
    """The signing key of a meter: the same number always has the same key."""
    seed = sha256(f"bench meter {number}".encode()).digest()
    return keys._private(ed25519.Ed25519PrivateKey.from_private_bytes(seed))


def demand_wh(number: int, start_s: int) -> int:
    """What a meter draws in an interval: 1 to 1 000 Wh, different from interval to interval."""
    return 1 + (number * 7_919 + start_s // INTERVAL_S * 104_729) % MAX_DEMAND_WH


@dataclass(frozen=True, slots=True)
class BrokerFolder:
    """Everything that one broker needs on disk."""

    folder: Path
    config: Path
    store: Path

    @property
    def log_file(self) -> Path:
        return self.folder / "broker.log"

    @property
    def key_file(self) -> Path:
        """The broker's public key in hex, for the load."""
        return self.folder / "east.key"

    def set_server(self, mqtt: MqttConfig) -> None:
        """Write the config anew, with this MQTT server."""
        self.config.write_text(
            f'[broker]\nname = "{BROKER}"\nkey_file = "east.pem"\ndata_dir = "data"\nclock = "conductor"\n'
            f'[mqtt]\nhost = "{mqtt.host}"\nport = {mqtt.port}\n'
            '[ledger]\ngenesis_file = "genesis.cbor"\n'
            '[ledger.host]\npath = "ledger"\nvalidator = "east-ledger"\nkey_file = "east-ledger.pem"\n'
        )


def make_broker(folder: Path, mqtt: MqttConfig, capacity_wh: int) -> BrokerFolder:
    """Found a ledger and a broker with three devices, each able to make `capacity_wh` in an interval."""
    folder.mkdir(parents=True)
    names = (BROKER, "registrar", "east-ledger", CONDUCTOR, "provider", *(device for device, _ in DEVICES))
    public = {name: energy_broker("key", "new", folder / f"{name}.pem").strip() for name in names}
    (folder / "east.key").write_text(public[BROKER])
    genesis = folder / "genesis.cbor"
    energy_broker(
        *("ledger", "genesis", "--out", genesis, "--ledger", LEDGER, "--area", "home"),
        *("--interval-s", str(INTERVAL_S), "--gate-1-s", str(GATE_1_S), "--gate-2-s", str(GATE_2_S)),
        *("--registrar", f"registrar={public['registrar']}", "--validator", f"east-ledger={public['east-ledger']}"),
        *("--conductor", f"{CONDUCTOR}={public[CONDUCTOR]}"),
    )
    config = folder / "east.toml"
    broker = BrokerFolder(folder, config, folder / "data" / "broker.db")
    broker.set_server(mqtt)
    registrar = ("--genesis", genesis, "--name", "registrar", "--key", folder / "registrar.pem")
    for party, role in ((BROKER, "broker"), ("provider", "provider")):
        energy_broker(
            *("registrar", "register", *registrar, "--party", party, "--role", role, "--party-key", public[party]),
            *("--out", folder / f"{party}.registration"),
        )
    energy_broker("submit", "--config", config, folder / f"{BROKER}.registration")
    for device, source in DEVICES:
        admission, mandate = folder / f"{device}.admission", folder / f"{device}.mandate"
        energy_broker(
            *("registrar", "admit", *registrar, "--device", device, "--owner", "provider", "--source", source),
            *("--meter-key", public[device], "--capacity-w", str(capacity_wh * 3_600 // INTERVAL_S), "--area", "home"),
            *("--commissioned", "2010-01-01T00:00:00Z", "--out", admission),
        )
        energy_broker(
            *("provider", "mandate", "--genesis", genesis, "--name", "provider", "--key", folder / "provider.pem"),
            *("--device", device, "--broker", BROKER, "--from", "2011-01-01T00:00:00Z", "--out", mandate),
        )
        energy_broker(
            *("provider", "add", "--config", config, "--price", "90000"),
            *(folder / "provider.registration", admission, mandate),
        )
    return broker


def add_consumers(broker: BrokerFolder, count: int, sending: Iterable[int]) -> None:
    """Register meters 0 to `count` - 1 in one transaction. Those not in `sending` get a key that nobody can sign with,
    because making a real one takes longer than storing it.
    """
    real = set(sending)
    contracts = [
        contract_bytes(make_contract(FIRST_INTERVAL_S - 86_400, lines, ShortageChoice.UNMATCHED, area="home"))
        for lines in TARIFFS
    ]
    store = BrokerStore(broker.store)
    store.begin()
    for number in range(count):
        meter = meter_name(number)
        secret = sha256(f"bench secret {number}".encode()).digest()
        cose_key = meter_key(number).public.cose_key if number in real else cbor.encode({**_ED25519_PUBLIC, -2: secret})
        store.add_consumer(ConsumerRow(meter, cose_key, sha256(cose_key).digest()[:16], secret, FIRST_INTERVAL_S))
        store.add_contract(meter, ContractRow(1, FIRST_INTERVAL_S - 86_400, contracts[number % len(contracts)]))
    store.commit()
    store.close()


class RunningBroker:
    """`energy-broker run`, and the conductor's hand on its clock. Use it in a `with`."""

    def __init__(self, broker: BrokerFolder, mqtt: MqttConfig, process: ManagedProcess | None = None) -> None:
        """`process` stands in for the plain `energy-broker run`, to profile it."""
        self.process = process or broker_process(broker.config, broker.log_file)
        self._topics = Topics(mqtt.root)
        self._conductor = load_private_key(broker.folder / f"{CONDUCTOR}.pem")
        self._device_keys = {device: load_private_key(broker.folder / f"{device}.pem") for device, _ in DEVICES}
        self._link = MqttLink(mqtt, "bench-conductor", [(self._topics.report(BROKER), 1)])
        self._report: Report | None = None

    @property
    def pid(self) -> int:
        """The broker's process id. Raises ProcessEnded if it is gone."""
        self.process.check_running()
        assert self.process.pid is not None
        return self.process.pid

    def tick(self, time_s: int) -> None:
        """Let market time be `time_s`."""
        tick = seal(Tick(time_s, Stage.MARKET), self._conductor, LEDGER, CONDUCTOR)
        self._link.publish(self._topics.time, tick, retain=True)
        self._link.flush()

    def wait_told(self, time_s: int, limit_s: float = 60.0) -> None:
        """Until the broker has taken in that tick."""
        self._until(lambda report: report.time_s == time_s, f"the tick {time_s} to be taken in", limit_s)

    def wait_idle(self, time_s: int, limit_s: float = 60.0) -> None:
        """Until everything that the tick caused is committed and answered."""
        self._until(lambda report: report.time_s == time_s and report.idle, f"idle at {time_s}", limit_s)

    def generate(self, start_s: int, energy_wh: int) -> None:
        """Send the readings of all devices for an interval, `energy_wh` each."""
        for device, key in self._device_keys.items():
            reading = Reading(
                device, start_s, start_s + INTERVAL_S, 0, energy_wh, Quality.MEASURED, Carrier.ELECTRICITY
            )
            self._link.publish(self._topics.meter(BROKER, device, "reading"), seal(reading, key, LEDGER, device), qos=1)
        self._link.flush()

    def listen(self, seconds: float) -> None:
        """Take in the broker's reports for so long."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._take_reports(left_s)

    def connect(self) -> None:
        """Connect the conductor's hand; entering the `with` does it otherwise."""
        deadline_s = time.monotonic() + _CONNECT_LIMIT_S
        while not self._link.connected:
            self._link.poll(0.2)
            if time.monotonic() > deadline_s:
                raise WaitedTooLong("the conductor's connection", _CONNECT_LIMIT_S, self._link.last_failure)

    def __enter__(self) -> Self:
        self.process.start()
        try:
            self.connect()
        except BaseException:
            self.process.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()
        self.process.stop()

    def _until(self, holds: Callable[[Report], bool], what: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while self._report is None or not holds(self._report):
            self.process.check_running()
            if time.monotonic() > deadline_s:
                raise WaitedTooLong(what, limit_s, f"last report: {self._report}\n{self.process.log_tail()}")
            self._take_reports(0.2)

    def _take_reports(self, timeout_s: float) -> None:
        for incoming in self._link.poll(timeout_s):
            self._report = Report.from_bytes(incoming.payload)
            self._link.acknowledge(incoming)
        self._link.flush()
