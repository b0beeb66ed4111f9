"""What an agent needs on a gateway: memory, CPU, disk commits, and how soon it works after its start.

Two agents run on the system's clock, sample once a second and hold a TLS connection to mosquitto: one reads a Modbus
TCP meter, one a P1 port only (which never loads the Modbus library). Memory and CPU are looked at after `seconds`.
Commits are counted in a short simulated market of its own, from the commit frames in its agents' write-ahead logs.
"""

import json
import selectors
import socket
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from dengen_testing.certificates import Authority
from dengen_testing.listener import Listener
from dengen_testing.market import ConsumerPlan, DevicePlan, Market, MarketPlan, MeterPlan, build_market, energy_broker
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ManagedProcess, ProcessGroup, agent_process, street_process
from dengen_testing.waiting import wait_until
from dengen_testing.wire.street import read_ready_file

from bench.processes import cpu_s, rss_mb
from bench.world import BROKER, FIRST_INTERVAL_S, INTERVAL_S, LEDGER
from broker.protocol.envelope import parse
from broker.protocol.messages import MeterStatus
from broker.protocol.mqtt_link import MqttConfig
from broker.protocol.topics import Topics

MODBUS: Final = "shop"
P1: Final = "house"
_JOURNAL_WAL: Final = "journal.sqlite-wal"
_WAL_HEADER_BYTES: Final = 32
_FRAME_HEADER: Final = struct.Struct(">6I")


class RunningAgents:
    """A Modbus and a P1 meter, a mosquitto with TLS, and an agent process for each meter. Use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._server = Mosquitto(folder / "mosquitto", tls=Authority(folder))
        self._processes = ProcessGroup()
        self._agents: dict[str, ManagedProcess] = {}
        self._began_s = 0.0
        self._cpu_before_s = 0.0
        self.start_s = 0.0
        """From exec of the Modbus agent until it was connected and had its first answer from the meter."""

    def __enter__(self) -> Self:
        self._server.start()
        street = self._processes.add(street_process(self._street_config()))
        try:
            street.start()
            wait_until(lambda: read_ready_file(self._folder / "wire") is not None, "the meters", detail=street.log_tail)
            addresses = read_ready_file(self._folder / "wire")
            assert addresses is not None
            mqtt = self._server.mqtt_config()
            with Tap(int(addresses[MODBUS]["port"])) as tap, Listener(mqtt, [self._status_topic("+")]) as listener:
                reader = f'profile = "schneider-iem3000"\nhost = "127.0.0.1"\nport = {tap.port}\ndevice_id = 1\n'
                self._start(MODBUS, f'protocol = "modbus_tcp"\n{reader}', mqtt)
                began_s = time.monotonic()
                self._wait_online(listener, MODBUS)
                wait_until(lambda: tap.first_answer_s is not None, "the first sample", detail=self._log)
                assert tap.first_answer_s is not None
                self.start_s = max(time.monotonic(), tap.first_answer_s) - began_s
                self._agents.pop(MODBUS).stop()
            with Listener(mqtt, [self._status_topic("+")]) as listener:
                port = addresses[MODBUS]["port"]
                reader = f'profile = "schneider-iem3000"\nhost = "127.0.0.1"\nport = {port}\ndevice_id = 1\n'
                self._start(MODBUS, f'protocol = "modbus_tcp"\n{reader}', mqtt)
                self._start(P1, f'protocol = "p1"\nport = {json.dumps(str(addresses[P1]["path"]))}\n', mqtt)
                for name in (MODBUS, P1):
                    self._wait_online(listener, name)
        except BaseException:
            self.close()
            raise
        self._began_s = time.monotonic()
        self._cpu_before_s = cpu_s(self._pid(MODBUS))
        return self

    def figures(self, seconds: float) -> dict[str, float]:
        """Memory and CPU, once the agents have been running for `seconds`."""
        wait_until(lambda: time.monotonic() >= self._began_s + seconds, "the agents' time", limit_s=seconds + 1)
        if "read-failure" in self._log():
            raise ValueError(f"a meter could not be read, so the figures say nothing:\n{self._log()}")
        passed_s = time.monotonic() - self._began_s
        used_s = cpu_s(self._pid(MODBUS)) - self._cpu_before_s
        return {
            "rss_mb": round(rss_mb(self._pid(MODBUS)), 1),
            "rss_p1_mb": round(rss_mb(self._pid(P1)), 1),
            "cpu_percent": round(100 * used_s / passed_s, 2),
        }

    def close(self) -> None:
        self._processes.stop()
        self._server.stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _street_config(self) -> Path:
        meters: list[dict[str, Any]] = [
            {"name": MODBUS, "wire": "modbus_tcp", "kind": "iem3000", "device_id": 1, "start_import_wh": 5_000_000},
            {"name": P1, "wire": "p1", "kind": "dsmr", "start_import_wh": 1_000_000},
        ]
        file = self._folder / "street.json"
        file.write_text(
            json.dumps(
                {"participant": "street", "interval_s": 1_800, "origin_s": 0, "folder": "wire", "meters": meters}
            )
        )
        return file

    def _start(self, name: str, reader: str, mqtt: MqttConfig) -> None:
        config = self._folder / f"{name}.toml"
        if not config.exists():
            energy_broker("key", "new", self._folder / f"{name}.pem")
        broker_key = energy_broker("key", "show", self._folder / f"{name}.pem").strip()
        config.write_text(
            f'[agent]\ndata_dir = "{name}-data"\nledger = "{LEDGER}"\nrequire_synchronised_clock = false\n'
            f'[agent.broker]\nname = "{BROKER}"\nkey = "{broker_key}"\n'
            f'[mqtt]\nhost = "{mqtt.host}"\nport = {mqtt.port}\nca_file = {json.dumps(str(mqtt.ca_file))}\n'
            f'[meters.{name}]\ndirection = "consumption"\nkey_file = "{name}.pem"\ncapacity_w = 14000\n'
            f"sample_period_s = 1.0\n[meters.{name}.reader]\n{reader}"
        )
        self._agents[name] = self._processes.add(agent_process(config))
        self._agents[name].start()

    def _wait_online(self, listener: Listener, name: str) -> None:
        def online(incoming: Any) -> bool:
            status = MeterStatus.from_payload(parse(incoming.payload).payload)
            return status.meter == name and status.online

        listener.wait_for(online, f"the status of {name}")

    def _status_topic(self, meter: str) -> str:
        return Topics().meter(BROKER, meter, "status")

    def _pid(self, name: str) -> int:
        agent = self._agents[name]
        agent.check_running()
        assert agent.pid is not None
        return agent.pid

    def _log(self) -> str:
        return "\n".join(agent.log_tail() for agent in self._agents.values())


class Tap:
    """A TCP forwarder in front of a meter that notes when its first answer came. One connection; use it in a `with`."""

    def __init__(self, meter_port: int) -> None:
        self._meter_port = meter_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.port: int = self._listener.getsockname()[1]
        self.first_answer_s: float | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                agent, _ = self._listener.accept()
            except TimeoutError:
                continue
            with agent, socket.create_connection(("127.0.0.1", self._meter_port)) as meter:
                self._forward(agent, meter)

    def _forward(self, agent: socket.socket, meter: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(agent, selectors.EVENT_READ, meter)
            selector.register(meter, selectors.EVENT_READ, agent)
            while not self._stopping.is_set():
                for key, _ in selector.select(0.1):
                    data = key.fileobj.recv(4_096)  # type: ignore[union-attr]  # only sockets are registered
                    if not data:
                        return
                    if key.fileobj is meter and self.first_answer_s is None:
                        self.first_answer_s = time.monotonic()
                    key.data.sendall(data)


def commits_per_interval(folder: Path, intervals: int) -> float:
    """Durable commits of a running agent an interval, over a simulated market of two agents; the larger of the two."""
    with Mosquitto(folder / "mosquitto") as server:
        plan = _commit_plan(intervals)
        workspace = build_market(plan, folder / "market", folder / "ledger", server.mqtt_config())
        logs = {meter.name: workspace.folder / f"{meter.name}-data" / _JOURNAL_WAL for meter in plan.meters}
        before: dict[str, int] = {}

        def begin() -> None:
            # Opening the journal commits as well; what counts is what each interval adds.
            if not before and all(log.exists() for log in logs.values()):
                before.update({name: wal_commits(log) for name, log in logs.items()})

        with Market(workspace, server.mqtt_config()) as market:
            market.run(on_progress=lambda _tick: begin())
            commits = [wal_commits(log) - before[name] for name, log in logs.items()]
    return round(max(commits) / intervals, 2)


def wal_commits(log: Path) -> int:
    """Transactions in a SQLite write-ahead log that has not begun anew (https://www.sqlite.org/walformat.html)."""
    raw = log.read_bytes()
    if len(raw) < _WAL_HEADER_BYTES:
        return 0
    page_bytes = int.from_bytes(raw[8:12], "big")
    commits = 0
    for offset in range(_WAL_HEADER_BYTES, len(raw) - _FRAME_HEADER.size + 1, _FRAME_HEADER.size + page_bytes):
        # The second number of a frame's header is the size of the database after a commit, 0 within a transaction.
        commits += _FRAME_HEADER.unpack_from(raw, offset)[1] > 0
    return commits


def _commit_plan(intervals: int) -> MarketPlan:
    consumer = MeterPlan(P1, "p1", "dsmr", (300,) * intervals, 1_000_000)
    device = MeterPlan("roof", "modbus_tcp", "iem3000", (500,) * intervals, 2_000_000)
    return MarketPlan(
        ledger=LEDGER,
        brokers=(BROKER,),
        host=BROKER,
        consumers=(ConsumerPlan(consumer, BROKER, (("solar", 100),), "unmatched"),),
        devices=(DevicePlan(device, "provider", BROKER, "solar", 5_000, 90_000, "a roof"),),
        origin_s=FIRST_INTERVAL_S,
        intervals=intervals,
        interval_s=INTERVAL_S,
    )
