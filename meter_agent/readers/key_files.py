"""The keys of an encrypted port, as the utility gives them out: 32 hex digits in a file each."""

from pathlib import Path
from typing import Final

from broker.protocol.files import read_file, reason_of
from firmware_config.loader import WrongValue
from meter_agent.framing.ciphering import KEY_BYTES, MeterKeys

_MAX_BYTES: Final = 4_096


def read_keys(meter: str, encryption: Path | None, authentication: Path | None) -> MeterKeys | None:
    """Both keys, None where the config names none. Raises WrongValue for a file that holds no key."""
    if encryption is None:
        if authentication is not None:
            raise WrongValue(f"meters.{meter}.reader.encryption_key_file", "a file, because authentication needs both")
        return None
    return MeterKeys(
        _key(meter, "encryption_key_file", encryption),
        None if authentication is None else _key(meter, "authentication_key_file", authentication),
    )


def _key(meter: str, name: str, path: Path) -> bytes:
    try:
        key = bytes.fromhex(read_file(path, _MAX_BYTES).decode("ascii"))
    except OSError as error:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits ({reason_of(error)})") from error
    except ValueError as error:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits, not {path}") from error
    if len(key) != KEY_BYTES:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits, {path} has {2 * len(key)}")
    return key
