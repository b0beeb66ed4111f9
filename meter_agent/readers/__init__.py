"""Meter readers: from a meter's config to an object whose `sample()` reads it.

Only the module that a config names is imported, because an agent that reads one P1 port has no memory to spare for a
Modbus library. Meters on the same serial line share one port, one request after the other. Meters with the very same
reader table are one meter with several registers, and share its samples.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from firmware_config.loader import WrongValue
from meter_agent.config import (
    BRouteConfig,
    DlmsConfig,
    Iec62056Config,
    MBusConfig,
    NamedMeter,
    P1Config,
    S0Config,
    SmlConfig,
)
from meter_agent.readings import Clock, MeterReader

if TYPE_CHECKING:
    from meter_agent.readers.mbus import MBusLine
    from meter_agent.readers.modbus import ModbusLine


def create_reader(meter: NamedMeter, clock: Clock) -> MeterReader:
    """The reader of one meter that has its port to itself. Opens nothing yet. Raises as `create_readers`."""
    return create_readers((meter,), clock)[meter.name]


def create_readers(meters: Iterable[NamedMeter], clock: Clock) -> dict[str, MeterReader]:
    """The readers of all meters of an agent, by name. Opens nothing yet.

    Raises WrongValue where a meter's config names an unknown profile or does not fit the other meters on its line, and
    ConfigError where a profile itself is wrong.
    """
    meters = tuple(meters)
    groups: list[list[NamedMeter]] = []
    for meter in meters:
        same = next((group for group in groups if group[0].config.reader == meter.config.reader), None)
        if same is None:
            groups.append([meter])
        else:
            same.append(meter)
    made = _create_readers([group[0] for group in groups], clock)
    readers: dict[str, MeterReader] = {}
    for group in groups:
        reader = made[group[0].name]
        if len(group) == 1:
            readers[group[0].name] = reader
        else:
            from meter_agent.readers.shared import SharedReader

            shared = SharedReader(reader, clock)
            readers.update((meter.name, shared.view(meter.name)) for meter in group)
    return {meter.name: readers[meter.name] for meter in meters}


def _create_readers(meters: Iterable[NamedMeter], clock: Clock) -> dict[str, MeterReader]:
    readers: dict[str, MeterReader] = {}
    serial_lines: dict[str, ModbusLine] = {}
    mbus_lines: dict[str, MBusLine] = {}
    for meter in meters:
        config = meter.config.reader
        if isinstance(config, P1Config):
            from meter_agent.readers.p1 import create_p1_reader

            if str(config.port) in serial_lines:
                raise WrongValue(f"meters.{meter.name}.reader.port", "a port of its own, for a P1 meter")
            readers[meter.name] = create_p1_reader(meter.name, config, clock)
        elif isinstance(config, DlmsConfig):
            from meter_agent.readers.dlms import create_dlms_reader

            readers[meter.name] = create_dlms_reader(meter.name, config, clock)
        elif isinstance(config, BRouteConfig):
            from meter_agent.readers.broute import create_broute_reader

            readers[meter.name] = create_broute_reader(meter, config, clock)
        elif isinstance(config, MBusConfig):
            from meter_agent.readers.mbus import create_mbus_reader

            readers[meter.name] = create_mbus_reader(meter, config, clock, mbus_lines)
        elif isinstance(config, S0Config):
            from meter_agent.readers.s0 import create_s0_reader

            readers[meter.name] = create_s0_reader(meter, config, clock)
        elif isinstance(config, SmlConfig):
            from meter_agent.readers.sml import create_sml_reader

            readers[meter.name] = create_sml_reader(meter.name, config, clock)
        elif isinstance(config, Iec62056Config):
            from meter_agent.readers.iec62056_21 import create_iec62056_21_reader

            readers[meter.name] = create_iec62056_21_reader(meter.name, config, clock)
        else:
            from meter_agent.readers.modbus import create_modbus_reader

            readers[meter.name] = create_modbus_reader(meter, clock, serial_lines)
    return readers
