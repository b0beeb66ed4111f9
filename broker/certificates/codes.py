"""Technology codes and emission factors of the sources. Pure data.

Codes: EECS Rules Fact Sheet 5, "Types of Energy Inputs and Technologies", of the Association of Issuing Bodies
(https://www.aib-net.org/eecs/fact-sheets). An F code names the energy input level by level (01 renewable, 02 fossil, 03
nuclear; then solid, liquid, gaseous, heat, mechanical; 00: unspecified), a T code the technology. A ledger's source
says no more than these codes do: which fuel a coal plant burns, for example, is left unspecified.

Factors: medians over the life cycle in g CO2-equivalent per kWh from IPCC, Climate Change 2014, Mitigation, Annex III,
table A.III.2; of several technologies of one source the higher one. It has none for oil and ambient heat, and none is
made up here: a broker that delivers those, or wants a residual mix for what stays unmatched, names one in its config.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from broker.protocol.sources import Source


class EecsCode(NamedTuple):
    """What goes in, and what makes electricity of it."""

    fuel: str
    technology: str


EECS_CODES: Final[Mapping[Source, EecsCode]] = {
    Source.SOLAR: EecsCode("F01040100", "T010100"),
    Source.SOLAR_THERMAL: EecsCode("F01040100", "T010000"),
    Source.WIND: EecsCode("F01050100", "T020000"),
    Source.BIOMASS: EecsCode("F01010000", "T050000"),
    Source.GEOTHERMAL: EecsCode("F01040000", "T050000"),
    Source.HYDRO: EecsCode("F01050200", "T030000"),
    Source.AMBIENT_HEAT: EecsCode("F01040000", "T050000"),
    Source.NUCLEAR: EecsCode("F03010100", "T060000"),
    Source.OIL: EecsCode("F02020000", "T050000"),
    Source.COAL: EecsCode("F02010000", "T050000"),
    Source.NATURAL_GAS: EecsCode("F02030100", "T050000"),
}

UNMATCHED: Final = 0
"""In a table of factors: what no asset stands for, where a source has its number."""

DEFAULT_FACTORS: Final[Mapping[int, int]] = {
    Source.SOLAR: 48_000,
    Source.SOLAR_THERMAL: 27_000,
    Source.WIND: 12_000,
    Source.BIOMASS: 230_000,
    Source.GEOTHERMAL: 38_000,
    Source.HYDRO: 24_000,
    Source.NUCLEAR: 12_000,
    Source.COAL: 820_000,
    Source.NATURAL_GAS: 490_000,
}
"""mg CO2-equivalent per kWh."""

DEFAULT_FACTORS_SOURCE: Final = "IPCC AR5 WG III (2014), Annex III, table A.III.2, life cycle, median"
