"""Generation sources, and the groups of them that a contract line may name."""

from enum import IntEnum
from typing import Final


class Source(IntEnum):
    """A kind of generation. The number is the code on the wire and on the ledger; it never changes."""

    SOLAR = 1
    SOLAR_THERMAL = 2
    WIND = 3
    BIOMASS = 4
    GEOTHERMAL = 5
    HYDRO = 6
    AMBIENT_HEAT = 7
    NUCLEAR = 8
    OIL = 9
    COAL = 10
    NATURAL_GAS = 11

    @property
    def label(self) -> str:
        """The name in configs, pages and exports, for example `solar_thermal`."""
        return self.name.lower()


class SourceGroup(IntEnum):
    """What a contract line may name in place of one source. Numbers do not meet those of Source."""

    RENEWABLE = 100
    FOSSIL = 101
    ANY = 102

    @property
    def label(self) -> str:
        return self.name.lower()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The member sources in code order."""
        return _MEMBERS[self]


_MEMBERS: Final = {
    SourceGroup.RENEWABLE: tuple(source for source in Source if source <= Source.AMBIENT_HEAT),
    SourceGroup.FOSSIL: tuple(source for source in Source if source >= Source.OIL),
    SourceGroup.ANY: tuple(Source),
}


def source_from_label(label: str) -> Source:
    """The source of that name. Raises ValueError naming the known ones."""
    try:
        return Source[label.upper()]
    except KeyError:
        raise ValueError(f"unknown source {label!r}; known: {', '.join(s.label for s in Source)}") from None


def line_from_label(label: str) -> Source | SourceGroup:
    """The source or group of that name. Raises ValueError naming the known ones."""
    try:
        return SourceGroup[label.upper()]
    except KeyError:
        pass
    try:
        return Source[label.upper()]
    except KeyError:
        known = ", ".join([s.label for s in Source] + [g.label for g in SourceGroup])
        raise ValueError(f"unknown source {label!r}; known: {known}") from None
