"""Reads a DSMR P1 port, into which the meter pushes a telegram every 1 or 10 seconds, encrypted or not."""

from collections.abc import Callable

from meter_agent.config import P1Config
from meter_agent.framing.p1 import P1Framer, Telegram, parse_telegram
from meter_agent.readers.pushed import Framer, PushedProtocol, PushedReader
from meter_agent.readings import Clock


def create_p1_reader(meter: str, config: P1Config, clock: Clock) -> PushedReader[Telegram]:
    """The reader of one P1 port. Opens nothing yet but the key files. Raises WrongValue where one is no key."""
    protocol = PushedProtocol(
        "p1",
        _framer(meter, config),
        parse_telegram,
        "does the meter's P1 port need to be switched on, is baud right, and is it encrypted (then name its keys)?",
    )
    return PushedReader(meter, config.port, config.baud, config.timeout_s, protocol, clock)


def _framer(meter: str, config: P1Config) -> Callable[[], Framer[Telegram]]:
    if config.encryption_key_file is None and config.authentication_key_file is None:
        return P1Framer
    # Most ports are not encrypted, and their agents have no memory to spare for ciphers.
    from meter_agent.framing.p1_encrypted import EncryptedP1Framer
    from meter_agent.readers.key_files import read_keys

    keys = read_keys(meter, config.encryption_key_file, config.authentication_key_file)
    assert keys is not None
    return lambda: EncryptedP1Framer(keys)
