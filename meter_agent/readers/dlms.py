"""Reads a HAN port into which a meter of Aidon, Kaifa or Kamstrup pushes DLMS lists.

No library stands behind it. `dlms-cosem` (25.1) offers parts of the same, but reads the date that Kaifa sends one byte
off, leaves segmented frames as "not working", knows no list of these makers, and costs an agent several megabytes.
"""

from typing import Final

from meter_agent.config import DlmsConfig
from meter_agent.framing.dlms import parse_list
from meter_agent.framing.hdlc import HdlcFramer
from meter_agent.framing.telegram import MalformedTelegram, TelegramReading
from meter_agent.readers.key_files import read_keys
from meter_agent.readers.pushed import PushedProtocol, PushedReader
from meter_agent.readings import Clock

_WELL_COUNTED_MWH: Final = 100_000_000
"""A counter below 100 kWh may grow tenfold within the hour by honest means."""


def create_dlms_reader(meter: str, config: DlmsConfig, clock: Clock) -> PushedReader[bytes]:
    """The reader of one HAN port. Opens nothing yet but the key files. Raises WrongValue where one is no key."""
    keys = read_keys(meter, config.encryption_key_file, config.authentication_key_file)
    guard = _TenfoldGuard()

    def parse(message: bytes) -> TelegramReading | None:
        pushed = parse_list(message, keys, config.energy_step_wh)
        if not pushed.has_energy:
            return None
        if config.energy_step_wh is not None:
            guard.check(pushed.import_mwh, config.energy_step_wh)
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


class _TenfoldGuard:
    """Notices that a utility has changed the step of a meter that sends none (it did, by remote, all over Sweden:
    https://github.com/UtilitechAS/amsreader-firmware/issues/811). From then on every number would be tenfold."""

    def __init__(self) -> None:
        self._last_mwh: int | None = None

    def check(self, import_mwh: int | None, step_wh: int) -> None:
        """Raises MalformedTelegram for a counter that is ten times what it was, or a tenth, within a hundredth."""
        last_mwh = self._last_mwh
        if last_mwh and import_mwh:
            larger, smaller = max(last_mwh, import_mwh), min(last_mwh, import_mwh)
            if smaller >= _WELL_COUNTED_MWH and 99 * smaller <= 10 * larger <= 101 * smaller:
                raise MalformedTelegram(
                    f"its energy went from {last_mwh // 1_000_000} to {import_mwh // 1_000_000} kWh at once: "
                    f"the step of the meter has changed; compare its display, and change energy_step_wh (now {step_wh})"
                )
        self._last_mwh = import_mwh
