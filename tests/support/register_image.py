"""Register images: what a meter answers, written by hand from a page about it, and what that means.

One TOML file a profile in `tests/unit/meter_agent/register_images/`, named as the profile. Never made with the code
that reads it. Registers are hex words as on the wire, from an address that is written as in the profile:

    [[images]]
    page = "https://…"                  # what the addresses, types and units are worked out from; a reference's url
    working = "…"                       # how the hex follows from it, in a sentence
    model = 103                         # SunSpec profiles only: addresses count from this model's ID register
    registers = { 0x0048 = "4640 E6B7" }
    expected = { import_mwh = 12345679000, export_mwh = 1234000, power_w = -1204 }

    [[unusable]]                        # one for each way in which the meter says "not available"
    quantity = "import"
    registers = "7FC0 0000"             # of this value only
    why = "…"

    [serial_number]                     # and [identity], where the profile has them
    registers = "0135 2D5E"
    expected = "20262238"
"""

from dataclasses import dataclass, field
from pathlib import Path

from firmware_config.loader import load_config
from meter_agent.profiles import Quantity

Words = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the registers mean: counters in mWh, power in W, import positive."""

    import_mwh: int | None
    export_mwh: int | None
    power_w: int | None

    def by_quantity(self) -> dict[Quantity, int]:
        """Only what the image has."""
        all_values: dict[Quantity, int | None] = {
            "import": self.import_mwh,
            "export": self.export_mwh,
            "power": self.power_w,
        }
        return {quantity: value for quantity, value in all_values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Image:
    """Registers by the address of the first, in hex words, and what they mean."""

    page: str
    working: str
    registers: dict[str, str]
    expected: Expected
    model: int | None

    def words(self, address: int, count: int) -> Words:
        """The `count` registers from `address` on. Raises KeyError if the image lacks one."""
        by_address = {}
        for first, image in self.registers.items():
            for offset, word in enumerate(words_of(image)):
                by_address[int(first, 0) + offset] = word
        return tuple(by_address[address + offset] for offset in range(count))


@dataclass(frozen=True, slots=True)
class Unusable:
    """A value that is none."""

    quantity: Quantity
    registers: str
    why: str
    model: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Serial number or identity, in hex words and as text."""

    registers: str
    expected: str


@dataclass(frozen=True, slots=True)
class RegisterImages:
    """One file."""

    images: tuple[Image, ...]
    serial_number: Answer | None
    identity: Answer | None
    unusable: tuple[Unusable, ...] = field(default=())


def words_of(image: str) -> Words:
    """Hex words, four digits each with or without blanks between them, as integers."""
    raw = bytes.fromhex(image)
    return tuple(int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2))


def load_register_images(path: Path) -> RegisterImages:
    """The register images of one profile. Raises ConfigError."""
    return load_config(path, RegisterImages)
