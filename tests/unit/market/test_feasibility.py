"""Feasibility: what was left over, held against an expected consumption."""

from typing import Any

from broker.market.contracts import Contract, ShortageChoice, make_contract
from broker.market.feasibility import LineFeasibility, feasibility
from broker.market.lots import Lot
from broker.market.windows import Window
from broker.protocol.market_time import Interval
from broker.protocol.sources import Source

H = 3_600
SOLAR, WIND = Source.SOLAR, Source.WIND


def contract(**choices: Any) -> Contract:
    shares = [("solar", 400_000), ("wind", 600_000)]
    return make_contract(0, shares, ShortageChoice.ANY, area="home", **choices)


def day(wh: int) -> list[tuple[Interval, int]]:
    return [(Interval(hour * H, (hour + 1) * H), wh) for hour in range(24)]


def left_over(source: Source, hours: range, wh: int, price: int = 50) -> dict[Lot, int]:
    return {Lot(source, hour * H, "east", price): wh for hour in hours}


def test_what_was_always_left_over_can_be_kept() -> None:
    lots = left_over(SOLAR, range(24), 40) | left_over(WIND, range(24), 60)
    assert feasibility(contract(), day(100), lots) == (
        LineFeasibility(SOLAR, 960, 960),
        LineFeasibility(WIND, 1_440, 1_440),
    )


def test_a_sun_that_shines_half_the_day_serves_half_the_line_hour_by_hour_and_all_of_it_day_by_day() -> None:
    lots = left_over(SOLAR, range(6, 18), 80)
    assert feasibility(contract(), day(100), lots)[0] == LineFeasibility(SOLAR, 960, 480)
    assert feasibility(contract(window=Window.DAY), day(100), lots)[0] == LineFeasibility(SOLAR, 960, 960)


def test_what_is_too_dear_does_not_count_and_the_margin_is_paid_on_top() -> None:
    lots = left_over(SOLAR, range(24), 40, price=50)
    assert feasibility(contract(highest_price=55), day(100), lots, margin=5)[0].served_percent == 100
    assert feasibility(contract(highest_price=55), day(100), lots, margin=6)[0].served_percent == 0


def test_a_hundred_percent_means_all_of_it() -> None:
    assert LineFeasibility(SOLAR, 1_000, 999).served_percent == 99
    assert LineFeasibility(SOLAR, 0, 0).served_percent == 100
