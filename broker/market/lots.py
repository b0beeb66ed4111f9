"""Lots: energy that is the same in everything that a contract can ask for."""

from typing import NamedTuple

from broker.protocol.sources import Source


class Lot(NamedTuple):
    """What all energy of one lot has in common.

    `start_s` is the start of the interval it was generated in, `provider` the owner of the devices, empty if that is
    not known, `price` in µ-currency per kWh. What is `reserved` is for this broker's own consumers, and no neighbour
    gets it. `only_for` are the meters that the provider keeps it for, empty if it is for everybody; such energy is
    always reserved too.
    """

    source: Source
    start_s: int
    provider: str
    price: int
    reserved: bool = False
    only_for: tuple[str, ...] = ()
