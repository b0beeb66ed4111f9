"""What is kept for consumers who will want it later in the day."""

from hypothesis import given
from hypothesis import strategies as st

from broker.market.forecast import Expectation, forecast_of
from broker.market.keeping import kept, kept_of_day, wanted_of_now
from broker.market.lots import Lot
from broker.protocol.sources import Source, SourceGroup

DAY = 20_000 * 86_400
SOLAR, WIND, OIL = Source.SOLAR, Source.WIND, Source.OIL
RENEWABLE, ANY = SourceGroup.RENEWABLE, SourceGroup.ANY
NOON, EVENING = 12, 19


def hours(**energy_wh: int) -> tuple[int, ...]:
    """A day of hours, 0 but for those named, for example `h19=500`."""
    return tuple([energy_wh.get(f"h{hour}", 0) for hour in range(24)])


def expectation_of(
    generated: dict[Source, tuple[int, ...]],
    flexible: dict[Source | SourceGroup, tuple[int, ...]],
    firm: dict[Source | SourceGroup, tuple[int, ...]] | None = None,
) -> Expectation:
    demanded = dict(flexible)
    for target, energies in (firm or {}).items():
        demanded[target] = tuple([a + b for a, b in zip(energies, demanded.get(target, (0,) * 24), strict=True)])
    return Expectation(DAY, 3_600, generated, demanded, {}, flexible)


def test_what_the_evening_wants_and_will_not_generate_is_wanted_at_noon() -> None:
    expectation = expectation_of({SOLAR: hours(h12=900, h13=200)}, {SOLAR: hours(h12=70, h19=500)})
    assert wanted_of_now(expectation, NOON) == {SOLAR: 300}
    assert wanted_of_now(expectation, NOON + 1) == {SOLAR: 500}


def test_nothing_is_wanted_of_now_once_the_last_demand_is_there_or_enough_will_still_come() -> None:
    expectation = expectation_of({SOLAR: hours(h12=900, h13=600)}, {SOLAR: hours(h19=500)})
    assert wanted_of_now(expectation, NOON) == {}
    assert wanted_of_now(expectation, EVENING) == {}


def test_demands_that_cannot_wait_come_before_in_what_will_be_generated() -> None:
    expectation = expectation_of(
        {SOLAR: hours(h13=600)}, {SOLAR: hours(h19=500)}, {SOLAR: hours(h13=250), RENEWABLE: hours(h13=250)}
    )
    assert wanted_of_now(expectation, NOON) == {SOLAR: 400}


def test_what_another_hour_lacks_for_demands_that_cannot_wait_is_not_kept() -> None:
    expectation = expectation_of({}, {}, {SOLAR: hours(h19=500)})
    assert wanted_of_now(expectation, NOON) == {}


def test_what_a_day_keeps_is_not_published_as_surplus() -> None:
    expectation = expectation_of(
        {SOLAR: hours(h10=400, h11=400, h12=400)}, {SOLAR: hours(h11=100, h19=500)}, {SOLAR: hours(h10=50)}
    )
    assert [wh.get(SOLAR, 0) for wh in kept_of_day(expectation)][9:14] == [0, 0, 100, 400, 0]
    forecast = forecast_of(expectation, "east", kept_of_day(expectation))
    assert [(item.interval, item.surplus_wh) for item in forecast.outlooks if item.surplus_wh] == [(10, 300), (11, 200)]


def test_a_group_is_kept_from_what_is_most_plentiful_and_single_sources_come_first() -> None:
    wanted_wh = {WIND: 100, RENEWABLE: 250, ANY: 10}
    lots = {Lot(SOLAR, DAY, "ola", 100): 300, Lot(WIND, DAY, "pia", 100): 150, Lot(OIL, DAY, "pia", 100): 200}
    assert kept(wanted_wh, lots) == {
        Lot(SOLAR, DAY, "ola", 100): 250,
        Lot(WIND, DAY, "pia", 100): 100,
        Lot(OIL, DAY, "pia", 100): 10,
    }


def test_what_no_neighbour_could_get_is_kept_first_and_then_the_cheapest() -> None:
    reserve, morning = Lot(SOLAR, DAY + 3_600, "ola", 100, reserved=True), Lot(SOLAR, DAY, "ola", 300)
    cheap, dear = Lot(SOLAR, DAY + 3_600, "pia", 100), Lot(SOLAR, DAY + 3_600, "ola", 200)
    exclusive = Lot(SOLAR, DAY, "ola", 1, reserved=True, only_for=("anna",))
    lots = {dear: 50, cheap: 50, exclusive: 50, morning: 50, reserve: 50}
    assert kept({SOLAR: 20}, lots) == {reserve: 20}
    assert kept({SOLAR: 120}, lots) == {reserve: 50, morning: 50, cheap: 20}
    assert kept({SOLAR: 500}, lots) == {reserve: 50, morning: 50, cheap: 50, dear: 50}


targets = st.sampled_from([SOLAR, WIND, OIL, RENEWABLE, ANY])
lots_of = st.builds(
    Lot,
    st.sampled_from([SOLAR, WIND, OIL]),
    st.sampled_from([DAY, DAY + 3_600]),
    st.sampled_from(["ola", "pia"]),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([(), ("anna",)]),
)


@given(st.dictionaries(targets, st.integers(0, 500)), st.dictionaries(lots_of, st.integers(0, 300)))
def test_no_more_is_kept_than_is_there_or_wanted_and_the_order_changes_nothing(
    wanted_wh: dict[Source | SourceGroup, int], lots: dict[Lot, int]
) -> None:
    chosen = kept(wanted_wh, lots)
    assert all(0 < wh <= lots[lot] for lot, wh in chosen.items())
    assert sum(chosen.values()) <= sum(wanted_wh.values())
    assert kept(dict(reversed(wanted_wh.items())), dict(reversed(lots.items()))) == chosen
    assert not any(lot.only_for for lot in chosen)
    total_wh = sum([wh for lot, wh in lots.items() if not lot.only_for])
    assert sum(chosen.values()) >= min(wanted_wh.get(ANY, 0), total_wh)
