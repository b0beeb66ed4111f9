"""Reads a German meter that pushes SML, mostly every second, from its optical head or its wire."""

from functools import partial

from meter_agent.config import SmlConfig
from meter_agent.framing.sml import SmlFramer, parse_frame
from meter_agent.readers.pushed import PushedProtocol, PushedReader
from meter_agent.readings import Clock


def create_sml_reader(meter: str, config: SmlConfig, clock: Clock) -> PushedReader[bytes]:
    """The reader of one SML port. Opens nothing yet."""
    protocol = PushedProtocol(
        "sml",
        SmlFramer,
        partial(parse_frame, choice=config.obis),
        "does the optical head sit straight on the meter, and is baud right?",
    )
    return PushedReader(meter, config.port, config.baud, config.timeout_s, protocol, clock)
