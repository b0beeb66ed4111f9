"""Reads a Japanese smart meter over Wi-SUN route B: ECHONET Lite, by way of an adapter that speaks SKSTACK-IP.

The library `momonga` (extra `broute`) opens the session (a scan and a join, up to some minutes), keeps it, and asks for
properties. Its energies are floating-point numbers of kWh; with its unit and coefficient set to 1 they are the meter's
own counts, which `framing.echonet` turns into mWh.

By default the reader gives out what the meter noted at the last half hour, with that time, so that a market interval's
boundaries are measured and not interpolated. In between it asks for the power only: radio time is scarce. With
`values = "present"` it reads the counters of the moment instead, for markets with 15-minute intervals.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from broker.protocol.files import read_file, reason_of
from firmware_config.loader import WrongValue
from meter_agent.config import BRouteConfig, NamedMeter
from meter_agent.framing.echonet import (
    HALF_HOUR_S,
    ImplausibleProperty,
    Scale,
    energy_mwh,
    half_hour_s,
    power_w,
    scale,
)
from meter_agent.readers.extras import import_extra
from meter_agent.readings import Clock, ReadFailure, Sample

ASK_AFTER_S: Final = 20
"""The meter's clock may be a little late: its half hour is asked for so long after ours."""

MAX_TRIES: Final = 3
"""Requests that get no answer are sent again so often (each waits 12 s), then the session is opened anew."""

_MAX_PASSWORD_BYTES: Final = 4_096

_IMPORT_NOW: Final = 0xE0
_EXPORT_NOW: Final = 0xE3
_POWER: Final = 0xE7
_IMPORT_NOTED: Final = 0xEA
_EXPORT_NOTED: Final = 0xEB
_SERIAL_NUMBER: Final = 0x8D
_DIGITS: Final = 0xD7


class Session(Protocol):
    """What is used of momonga.Momonga."""

    energy_unit: int | float
    energy_coefficient: int

    def open(self) -> Any:
        """Scan, join, and read unit and coefficient."""
        ...

    def close(self) -> None:
        """End the session and let go of the adapter."""
        ...

    def get_properties_to_get_values(self) -> Iterable[int]:
        """The property map 9F."""
        ...

    def request_to_get(self, properties: Any) -> dict[Any, Any]:
        """Property codes to values."""
        ...


@dataclass(frozen=True, slots=True)
class Errors:
    """The library's exceptions: all of them, and those after which its session is still good."""

    any: type[Exception]
    harmless: tuple[type[Exception], ...]


@dataclass(slots=True)
class _Open:
    """A session and what was read once at its start."""

    session: Session
    scale: Scale
    properties: frozenset[int]
    serial_number: str | None


class BRouteReader:
    """Reads one meter. Implements MeterReader. `make_session` gives a session that is not open yet."""

    def __init__(
        self,
        meter: str,
        register: Literal["import", "export"],
        values: Literal["half_hour", "present"],
        clock: Clock,
        make_session: Callable[[], Session],
        errors: Errors,
    ) -> None:
        self._meter = meter
        self._register = register
        self._values = values
        self._clock = clock
        self._make_session = make_session
        self._errors = errors
        self._open: _Open | None = None
        self._noted: Sample | None = None

    def sample(self) -> Sample:
        """The counters of the last half hour with its time, or of the moment. Raises ReadFailure.

        The first call, and the first after a lost session, takes minutes.
        """
        try:
            if self._open is None:
                self._open = self._opened()
            return self._present(self._open) if self._values == "present" else self._half_hour(self._open)
        except ImplausibleProperty as error:
            raise ReadFailure(self._meter, error.reason) from error
        except self._errors.harmless as error:
            raise ReadFailure(self._meter, f"the meter's answer cannot be used: {error}") from error
        except (self._errors.any, OSError) as error:
            self.close()
            reason = f"no session with the meter ({error}); check route B id and password, the adapter and its place"
            raise ReadFailure(self._meter, reason) from error

    def close(self) -> None:
        """End the session; the next `sample()` opens another."""
        if self._open is not None:
            opened, self._open = self._open, None
            self._close(opened.session)

    def _opened(self) -> _Open:
        session = self._make_session()
        try:
            session.open()
            unit_kwh, coefficient = session.energy_unit, session.energy_coefficient
            # From here on its energies are the meter's own counts.
            session.energy_unit = session.energy_coefficient = 1
            properties = frozenset(int(code) for code in session.get_properties_to_get_values())
            if self._register == "export" and not properties & {_EXPORT_NOW, _EXPORT_NOTED}:
                raise ImplausibleProperty("the meter does not count what is delivered to the grid; use register import")
            once = properties & {_SERIAL_NUMBER, _DIGITS}
            values = session.request_to_get(set(once)) if once else {}
            meter_scale = scale(unit_kwh, coefficient, values.get(_DIGITS))
            serial_number = values.get(_SERIAL_NUMBER)
            return _Open(session, meter_scale, properties, str(serial_number).rstrip("\0 ") if serial_number else None)
        except BaseException:
            self._close(session)
            raise

    def _close(self, session: Session) -> None:
        try:
            session.close()
        except (self._errors.any, OSError):
            # Ending a session that is lost fails; the adapter is reset when the next one is opened.
            return

    def _present(self, opened: _Open) -> Sample:
        values = self._get(opened, _IMPORT_NOW, _EXPORT_NOW, _POWER)
        return Sample(
            monotonic_s=self._clock.monotonic_s(),
            time_s=self._clock.time_s(),
            import_mwh=self._energy(opened, values, _IMPORT_NOW, "import"),
            export_mwh=self._energy(opened, values, _EXPORT_NOW, "export"),
            power_w=power_w(values.get(_POWER)),
            serial_number=opened.serial_number,
            import_rollover_mwh=opened.scale.rollover_mwh,
            export_rollover_mwh=opened.scale.rollover_mwh,
        )

    def _half_hour(self, opened: _Open) -> Sample:
        noted = self._noted
        if noted is not None and 0 <= self._clock.time_s() - noted.time_s < HALF_HOUR_S + ASK_AFTER_S:
            self._noted = replace(noted, power_w=power_w(self._get(opened, _POWER).get(_POWER)))
            return self._noted
        values = self._get(opened, _IMPORT_NOTED, _EXPORT_NOTED, _POWER)
        billed = _IMPORT_NOTED if self._register == "import" else _EXPORT_NOTED
        if billed not in values:
            raise ImplausibleProperty(f'the meter notes no half hours of {self._register}; set values = "present"')
        time_s = half_hour_s(values[billed]["timestamp"], self._clock.time_s())
        # The other register is of the same half hour, or left out: a half hour may end between two properties.
        counts = {
            code: {code: value["cumulative energy"]}
            for code, value in values.items()
            if code in (_IMPORT_NOTED, _EXPORT_NOTED) and value["timestamp"] == values[billed]["timestamp"]
        }
        if noted is None:
            monotonic_s = self._clock.monotonic_s() - (self._clock.time_s() - time_s)
        else:
            monotonic_s = noted.monotonic_s + (time_s - noted.time_s)
        self._noted = Sample(
            monotonic_s=monotonic_s,
            time_s=time_s,
            import_mwh=self._energy(opened, counts.get(_IMPORT_NOTED, {}), _IMPORT_NOTED, "import"),
            export_mwh=self._energy(opened, counts.get(_EXPORT_NOTED, {}), _EXPORT_NOTED, "export"),
            power_w=power_w(values.get(_POWER)),
            serial_number=opened.serial_number,
            import_rollover_mwh=opened.scale.rollover_mwh,
            export_rollover_mwh=opened.scale.rollover_mwh,
            own_time=True,
        )
        return self._noted

    def _get(self, opened: _Open, *codes: int) -> dict[int, Any]:
        """Those of the properties that the meter has."""
        wanted = opened.properties.intersection(codes)
        return {int(code): value for code, value in opened.session.request_to_get(set(wanted)).items()}

    def _energy(self, opened: _Open, values: dict[int, Any], code: int, register: str) -> int | None:
        energy = energy_mwh(values.get(code), opened.scale)
        if energy is None and register == self._register:
            raise ImplausibleProperty(f"the meter has no value for {register} at present")
        return energy


def create_broute_reader(meter: NamedMeter, config: BRouteConfig, clock: Clock) -> BRouteReader:
    """The reader of one meter; opens nothing yet but the password file.

    Raises WrongValue where momonga is not installed or the password file cannot be read.
    """
    momonga = import_extra(meter.name, "momonga", "broute")
    password = _password(meter.name, config.password_file)

    def make_session() -> Session:
        session: Any = momonga.Momonga(config.route_b_id, password, str(config.port), baudrate=config.baud)
        session.xmit_retries = MAX_TRIES
        return session  # type: ignore[no-any-return]

    errors = Errors(momonga.MomongaError, (momonga.MomongaResponseNotExpected, momonga.MomongaResponseNotPossible))
    return BRouteReader(meter.name, meter.config.register_name, config.values, clock, make_session, errors)


def _password(meter: str, path: Path) -> str:
    try:
        password = read_file(path, _MAX_PASSWORD_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is no text in ASCII"
        raise WrongValue(
            f"meters.{meter}.reader.password_file", f"a file with route B's password ({reason})"
        ) from error
    if not password:
        raise WrongValue(f"meters.{meter}.reader.password_file", f"a file with route B's password, {path} is empty")
    return password
