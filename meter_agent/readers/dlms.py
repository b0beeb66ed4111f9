"""Reads a HAN port into which a meter of Aidon, Kaifa or Kamstrup pushes DLMS lists.

No library stands behind it. `dlms-cosem` (25.1) offers parts of the same, but reads the date that Kaifa sends one byte
off, leaves segmented frames as "not working", knows no list of these makers, and costs an agent several megabytes.
"""

from pathlib import Path

from firmware_config.loader import WrongValue
from meter_agent.config import DlmsConfig
from meter_agent.framing.dlms import KEY_BYTES, HanKeys, parse_list
from meter_agent.framing.hdlc import HdlcFramer
from meter_agent.framing.telegram import TelegramReading
from meter_agent.readers.pushed import PushedProtocol, PushedReader
from meter_agent.readings import Clock


def create_dlms_reader(meter: str, config: DlmsConfig, clock: Clock) -> PushedReader[bytes]:
    """The reader of one HAN port. Opens nothing yet but the key files. Raises WrongValue where one is no key."""
    keys = _keys(meter, config)

    def parse(message: bytes) -> TelegramReading | None:
        pushed = parse_list(message, keys, config.energy_step_wh)
        if not pushed.has_energy:
            return None
        return TelegramReading(pushed.import_mwh, pushed.export_mwh, pushed.power_w, pushed.meter_id)

    protocol = PushedProtocol(
        "dlms",
        HdlcFramer,
        parse,
        "has the utility switched the HAN port on, and are baud and parity right (2400 baud; try parity E and N)?",
        config.silence_s,
        config.parity,
    )
    return PushedReader(meter, config.port, config.baud, config.timeout_s, protocol, clock)


def _keys(meter: str, config: DlmsConfig) -> HanKeys | None:
    if config.encryption_key_file is None:
        if config.authentication_key_file is not None:
            raise WrongValue(f"meters.{meter}.reader.encryption_key_file", "a file, because authentication needs both")
        return None
    authentication = config.authentication_key_file
    return HanKeys(
        _key(meter, "encryption_key_file", config.encryption_key_file),
        None if authentication is None else _key(meter, "authentication_key_file", authentication),
    )


def _key(meter: str, name: str, path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits ({error})") from error
    if len(key) != KEY_BYTES:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits, {path} has {2 * len(key)}")
    return key
