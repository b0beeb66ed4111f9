"""Who takes part in the demo, and what their meters count. Pure but for reading the recorded weeks from data/.

Three homes follow three recorded weeks of one real home (data/README.md), all in the same simulated week. The solar
provider follows the same home's recorded solar generation. Hydro, biomass and wind follow the formulas below, i being
the number of the half hour in the week. The broker *east* hosts the ledger and has no wind; *west* has only wind.

- home-winter (east) wants hydro and biomass, which are always there: it is fully supplied, to the share.
- home-spring (east) wants solar, wind and hydro. All its wind comes from the neighbour. When solar is dark the other
  lines and then any source step in, so it is fully supplied too; by day solar catches up.
- home-summer (west) wants wind and solar and nothing else: at night it is short, and what is unmatched is on record.
"""

import csv
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Final

from dengen_testing.market import ConsumerPlan, DevicePlan, MarketPlan, MeterPlan

INTERVALS: Final = 336
INTERVAL_S: Final = 1_800
ORIGIN_S: Final = 1_318_168_800
"""Monday 2011-10-10 00:00 at UTC+10, the beginning of the recorded spring week."""

_DATA: Final = Path(__file__).parent / "data"


def recorded_wh(week: str, column: str) -> tuple[int, ...]:
    """What a meter that counts whole Wh would have counted in each half hour of a recorded week.

    `column` is GC (consumption) or GG (solar generation), mean kW over the half hour.
    """
    with (_DATA / f"{week}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(int((Decimal(row[column]) * 500).quantize(Decimal(1), ROUND_HALF_EVEN)) for row in rows)


def hydro_wh(i: int) -> int:
    """A mill on a river that rises slowly: 1 900 Wh, 2 Wh more each half hour, and a ripple."""
    return 1_900 + 2 * i + 30 * (i % 5)


def biomass_wh(i: int) -> int:
    """A plant that runs day and night, and harder from 16:00 to 22:00."""
    return 1_500 if 32 <= i % 48 < 44 else 1_100


def wind_wh(i: int) -> int:
    """Fronts that come every three days: a triangle from 1 900 to 2 620 Wh."""
    return 1_900 + 10 * abs(i % 144 - 72)


def demo_plan(intervals: int = INTERVALS, validators: int = 0) -> MarketPlan:
    """The demo's market; fewer `intervals` for tests that need only its beginning. 0 `validators`: *east* hosts."""

    def counted(energies_wh: tuple[int, ...]) -> tuple[int, ...]:
        return energies_wh[:intervals]

    def formula(energy_wh: Callable[[int], int]) -> tuple[int, ...]:
        return tuple(energy_wh(i) for i in range(intervals))

    consumers = (
        ConsumerPlan(
            MeterPlan("home-winter", "modbus_tcp", "iem3000", counted(recorded_wh("winter", "GC")), 5_938_000),
            broker="east",
            lines=(("hydro", 60), ("biomass", 40)),
            shortage="any",
        ),
        ConsumerPlan(
            MeterPlan("home-spring", "modbus_rtu", "iem3000", counted(recorded_wh("spring", "GC")), 12_345_678),
            broker="east",
            lines=(("solar", 20), ("wind", 30), ("hydro", 50)),
            shortage="any",
        ),
        ConsumerPlan(
            MeterPlan("home-summer", "p1", "dsmr", counted(recorded_wh("summer", "GC")), 4_321_000),
            broker="west",
            lines=(("wind", 85), ("solar", 15)),
            shortage="unmatched",
        ),
    )
    devices = (
        DevicePlan(
            MeterPlan("solar-roof", "modbus_tcp", "sunspec_inverter", counted(recorded_wh("summer", "GG")), 1_296_000),
            owner="solar-coop",
            broker="east",
            source="solar",
            capacity_w=1_000,
            price=70_000,
            place="Newcastle",
        ),
        DevicePlan(
            MeterPlan("hydro-mill", "modbus_rtu", "sdm630", formula(hydro_wh), 1_000_000),
            owner="mill-ltd",
            broker="east",
            source="hydro",
            capacity_w=6_000,
            price=90_000,
            place="Hunter River",
        ),
        DevicePlan(
            MeterPlan("biomass-plant", "modbus_rtu", "sdm120", formula(biomass_wh), 2_000_000),
            owner="farm-energy",
            broker="east",
            source="biomass",
            capacity_w=3_000,
            price=110_000,
            place="Maitland",
        ),
        DevicePlan(
            MeterPlan("wind-hill", "modbus_tcp", "abb_b23", formula(wind_wh), 9_876_540),
            owner="wind-club",
            broker="west",
            source="wind",
            capacity_w=5_500,
            price=80_000,
            place="Gunning",
        ),
    )
    return MarketPlan(
        ledger="demo",
        brokers=("east", "west"),
        host="east",
        consumers=consumers,
        devices=devices,
        origin_s=ORIGIN_S,
        intervals=intervals,
        interval_s=INTERVAL_S,
        validators=validators,
    )
