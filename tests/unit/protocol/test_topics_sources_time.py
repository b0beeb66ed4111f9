"""The small value modules: topics, names, sources and market time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.codec import is_name
from broker.protocol.market_time import Interval, MarketCalendar
from broker.protocol.sources import Source, SourceGroup, line_from_label, source_from_label
from broker.protocol.topics import Topics

HALF_HOURS = MarketCalendar(1800, 300, 900)


def test_all_topics_stand_below_the_root_and_split_again() -> None:
    topics = Topics("island/power")
    built = {
        topics.meter("east", "m1", "reading"): ("brokers", "east", "meters", "m1", "reading"),
        topics.request("east"): ("brokers", "east", "request"),
        topics.response("east", "west"): ("brokers", "east", "response", "west"),
        topics.cleared("east"): ("brokers", "east", "cleared"),
        topics.broker_status("east"): ("brokers", "east", "status"),
        topics.stock("east"): ("brokers", "east", "stock"),
        topics.ledger_submit("l"): ("ledger", "l", "submit"),
        topics.ledger_result("l", "east"): ("ledger", "l", "result", "east"),
        topics.ledger_feed("l"): ("ledger", "l", "feed"),
        topics.ledger_checkpoint("l"): ("ledger", "l", "checkpoint"),
        topics.time: ("time",),
        topics.report("east"): ("time", "east"),
    }
    for topic, levels in built.items():
        assert topic == "island/power/" + "/".join(levels)
        assert topics.split(topic) == levels
    assert topics.split("dengen/v1/time") == ()
    assert topics.split("island/powerful/time") == ()


@pytest.mark.parametrize("name", ["a", "0", "meter-1", "a" * 63, "a-"])
def test_names_that_fit_a_topic(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "a+", "a#", "a" * 64, "é", "a\n", "a_b", "$a", "٣"])
def test_names_that_do_not(name: str) -> None:
    assert not is_name(name)


def test_groups_hold_the_sources_they_say() -> None:
    assert [source.label for source in SourceGroup.RENEWABLE.sources] == [
        "solar",
        "solar_thermal",
        "wind",
        "biomass",
        "geothermal",
        "hydro",
        "ambient_heat",
    ]
    assert [source.label for source in SourceGroup.FOSSIL.sources] == ["oil", "coal", "natural_gas"]
    assert set(SourceGroup.ANY.sources) == set(Source)
    assert not {int(source) for source in Source} & {int(group) for group in SourceGroup}


def test_labels_lead_back_to_sources_and_groups() -> None:
    for source in Source:
        assert source_from_label(source.label) is source
        assert line_from_label(source.label) is source
    for group in SourceGroup:
        assert line_from_label(group.label) is group


def test_an_unknown_source_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown source 'sun'; known: solar, solar_thermal"):
        source_from_label("sun")
    with pytest.raises(ValueError, match=r"unknown source 'sun'; .*natural_gas, renewable, fossil, any"):
        line_from_label("sun")
    with pytest.raises(ValueError, match="unknown source 'renewable'"):
        source_from_label("renewable")


@given(st.integers(0, 2**40), st.sampled_from([900, 1800, 3600]))
def test_intervals_are_aligned_and_half_open(time_s: int, interval_s: int) -> None:
    calendar = MarketCalendar(interval_s, 1, interval_s)
    interval = calendar.interval_at(time_s)
    assert interval.start_s <= time_s < interval.end_s
    assert interval.start_s % interval_s == 0
    assert interval.length_s == interval_s
    assert calendar.is_interval(interval.start_s, interval.end_s)
    assert calendar.interval_at(interval.end_s).start_s == interval.end_s


@pytest.mark.parametrize(("start_s", "end_s"), [(1, 1801), (0, 1799), (0, 3600), (1800, 1800), (1800, 0), (900, 2700)])
def test_other_spans_are_no_interval(start_s: int, end_s: int) -> None:
    assert not HALF_HOURS.is_interval(start_s, end_s)


def test_gates_follow_the_end() -> None:
    assert HALF_HOURS.gate_1_of(Interval(0, 1800)) == 2100
    assert HALF_HOURS.gate_2_of(Interval(0, 1800)) == 2700


@pytest.mark.parametrize(
    "settings", [(1799, 300, 900), (0, 1, 2), (1800, 0, 900), (1800, 900, 900), (1800, 900, 300), (1800, 300, 1801)]
)
def test_an_impossible_calendar_is_refused(settings: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        MarketCalendar(*settings)
