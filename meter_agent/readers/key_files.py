"""The keys of an encrypted port, as the utility gives them out: 32 hex digits in a file each."""

from pathlib import Path

from firmware_config.loader import WrongValue
from meter_agent.framing.ciphering import KEY_BYTES, MeterKeys


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
        key = bytes.fromhex(path.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits ({error})") from error
    if len(key) != KEY_BYTES:
        raise WrongValue(f"meters.{meter}.reader.{name}", f"a file with 32 hex digits, {path} has {2 * len(key)}")
    return key
