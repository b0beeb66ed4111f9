"""A street of wire-level meters: serves all their wires, and moves them when the conductor ticks, or by hand.

Two threads: one waits for all sockets and pseudo-terminals at once, the other (in `follow`) for ticks. A lock keeps a
move whole: a reader sees all registers of a meter from before it or all from after it.
"""

import json
import selectors
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.errors import ProtocolError
from broker.protocol.messages import Report, Stage, Tick
from broker.protocol.mqtt_link import MqttLink
from broker.protocol.topics import Topics
from dengen_testing.wire.config import ConductorConfig, StreetConfig, WireMeter
from dengen_testing.wire.devices import ModbusRtuMeter, ModbusTcpMeter, P1Meter, WireDevice
from dengen_testing.wire.registers import REGISTER_IMAGES

READY_FILE: Final = "ready.json"
"""Written into the street's folder when all meters answer: {meter name: address}."""

_LONGEST_WAIT_S: Final = 0.2


class Street:
    """Meters in this process. Use it in a `with`; it serves from entering to leaving."""

    def __init__(self, config: StreetConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is real time: pushes of P1 meters and the end of RTU frames depend on it."""
        self._config = config
        self._clock = clock
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._meters = {meter.name: meter for meter in config.meters}
        config.folder.mkdir(parents=True, exist_ok=True)
        self._devices = {meter.name: self._device(meter) for meter in config.meters}
        self._thread = threading.Thread(target=self._serve, name="street", daemon=True)
        self._stopping = threading.Event()

    def device(self, name: str) -> WireDevice:
        """The meter of that name, to give it a fault. Use `unplug` and `plug_in` of the street for its cable."""
        return self._devices[name]

    def unplug(self, name: str) -> None:
        """Pull the cable of one meter."""
        with self._lock:
            self._devices[name].unplug()

    def plug_in(self, name: str) -> None:
        """Put it back; the address is the same as before."""
        with self._lock:
            self._devices[name].plug_in()

    def addresses(self) -> dict[str, dict[str, str | int]]:
        """Where each meter is found: host, port and device id, or the path of a serial port."""
        return {name: device.address() for name, device in self._devices.items()}

    def move_to(self, time_s: int) -> None:
        """All meters count on to `time_s`; P1 meters push at once."""
        with self._lock:
            for name, device in self._devices.items():
                device.move_to(self._meters[name].state(time_s))

    def next_change_s(self, time_s: int) -> int | None:
        """The next time at which a register reaches an interval boundary."""
        changes = [meter.next_change_s(time_s) for meter in self._meters.values()]
        return min((change_s for change_s in changes if change_s is not None), default=None)

    def start(self) -> Self:
        """Plug all meters in, write the ready file and serve."""
        for device in self._devices.values():
            device.plug_in()
        ready = self._config.folder / READY_FILE
        unfinished = ready.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.addresses(), indent=1))
        unfinished.replace(ready)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving and take all meters off their wires."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            for device in self._devices.values():
                device.unplug()
        self._selector.close()
        (self._config.folder / READY_FILE).unlink(missing_ok=True)

    def follow(self, until: Callable[[], bool] = lambda: False) -> None:
        """Follow the conductor's ticks until `until()` is true, looked at five times a second.

        Raises ValueError if the config names no conductor.
        """
        if self._config.conductor is None:
            raise ValueError("this street's config names no conductor to follow")
        follower = _Follower(self, self._config.conductor, self._config.participant)
        try:
            while not until():
                follower.poll(_LONGEST_WAIT_S)
        finally:
            follower.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _device(self, meter: WireMeter) -> WireDevice:
        state = meter.state(self._config.origin_s)
        path = self._config.folder / meter.name
        if meter.wire == "modbus_tcp":
            return ModbusTcpMeter(self._selector, state, REGISTER_IMAGES[meter.kind], meter.device_id)
        if meter.wire == "modbus_rtu":
            image = REGISTER_IMAGES[meter.kind]
            return ModbusRtuMeter(self._selector, state, path, image, meter.device_id, self._clock)
        return P1Meter(self._selector, state, path, self._clock)

    def _serve(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                due = [due_s for device in self._devices.values() if (due_s := device.next_due_s()) is not None]
            # At least ten times a second, so that `close` and a meter that was just plugged in need not wait.
            timeout_s = max(0.0, min([self._clock() + 0.1, *due]) - self._clock())
            events = self._selector.select(timeout_s)
            with self._lock:
                for key, _ in events:
                    # A meter may have been unplugged between the event and now.
                    if any(key is registered for registered in self._selector.get_map().values()):
                        key.data()
                now_s = self._clock()
                for device in self._devices.values():
                    device.tick(now_s)


class _Follower:
    """Moves a street with the conductor's ticks, and answers each copy of them."""

    def __init__(self, street: Street, conductor: ConductorConfig, participant: str) -> None:
        self._street = street
        self._ledger = conductor.ledger
        self._participant = participant
        self._signer = Signer(conductor.name, conductor.key)
        self._topics = Topics(conductor.mqtt.root)
        self._link = MqttLink(conductor.mqtt, f"{participant}-{conductor.ledger}", [(self._topics.time, 0)])
        self._time_s: int | None = None

    def poll(self, timeout_s: float) -> None:
        for incoming in self._link.poll(timeout_s):
            try:
                tick = open_envelope(incoming.payload, self._ledger, self._lookup).message
            except ProtocolError as error:
                print(f"<4>ignored on {incoming.topic}: {error}", flush=True)
                continue
            if isinstance(tick, Tick) and tick.stage is Stage.WORLD:
                self._take(tick)

    def close(self) -> None:
        self._link.close()

    def _take(self, tick: Tick) -> None:
        # A tick that was sent again moves nothing, but is answered: the conductor may have lost the first answer.
        if tick.time_s != self._time_s:
            self._street.move_to(tick.time_s)
            self._time_s = tick.time_s
        report = Report(
            participant=self._participant,
            time_s=tick.time_s,
            stage=Stage.WORLD,
            idle=True,
            next_wake_s=self._street.next_change_s(tick.time_s),
        )
        self._link.publish(self._topics.report(self._participant), report.to_bytes(), qos=0, retain=True)
        self._link.flush()

    def _lookup(self, key_id: bytes) -> Signer | None:
        return self._signer if key_id == self._signer.key.key_id else None


def read_ready_file(folder: Path) -> dict[str, dict[str, str | int]] | None:
    """The addresses of a street's meters once they answer, None before."""
    try:
        addresses: dict[str, dict[str, str | int]] = json.loads((folder / READY_FILE).read_text())
    except FileNotFoundError:
        return None
    return addresses
