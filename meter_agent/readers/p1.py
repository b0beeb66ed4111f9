"""Reads a DSMR P1 port, into which the meter pushes a telegram every 1 or 10 seconds."""

from meter_agent.config import P1Config
from meter_agent.framing.p1 import P1Framer, Telegram, parse_telegram
from meter_agent.readers.pushed import PushedProtocol, PushedReader
from meter_agent.readings import Clock


def create_p1_reader(meter: str, config: P1Config, clock: Clock) -> PushedReader[Telegram]:
    """The reader of one P1 port. Opens nothing yet."""
    protocol = PushedProtocol(
        "p1", P1Framer, parse_telegram, "does the meter's P1 port need to be switched on, and is baud right?"
    )
    return PushedReader(meter, config.port, config.baud, config.timeout_s, protocol, clock)
