"""Readings as people and other programs see them: decimals made from integers, times as UTC. Pure."""

from datetime import UTC, datetime
from typing import Any

from meter_agent.readings import Sample


def kwh(energy_mwh: int) -> str:
    """Energy as decimal kWh, to the mWh: 12345678 is "12.345678"."""
    return f"{energy_mwh // 1_000_000}.{energy_mwh % 1_000_000:06d}"


def utc(time_s: float) -> str:
    """A time as "2026-01-31T00:00:00Z"."""
    return f"{datetime.fromtimestamp(int(time_s), UTC):%Y-%m-%dT%H:%M:%SZ}"


def sample_json(sample: Sample) -> dict[str, Any]:
    """The sample for `--json`: counters in mWh, power in W, None for what the meter does not have."""
    return {
        "time_s": int(sample.time_s),
        "import_mwh": sample.import_mwh,
        "export_mwh": sample.export_mwh,
        "power_w": sample.power_w,
        "serial_number": sample.serial_number,
    }


def sample_text(sample: Sample) -> str:
    """The sample in a line, with units."""
    parts = []
    for label, energy_mwh in (("import", sample.import_mwh), ("export", sample.export_mwh)):
        if energy_mwh is not None:
            parts.append(f"{label} {kwh(energy_mwh)} kWh")
    if sample.power_w is not None:
        parts.append(f"power {sample.power_w} W")
    if sample.serial_number is not None:
        parts.append(f"serial number {sample.serial_number}")
    return " ".join(parts)
