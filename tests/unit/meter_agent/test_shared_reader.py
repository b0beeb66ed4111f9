"""One meter with two registers, configured as two meters: one read serves both, and neither gets a sample twice."""

from pathlib import Path

import pytest

from meter_agent.config import MeterConfig, NamedMeter, P1Config
from meter_agent.readers import create_readers
from meter_agent.readers.shared import SharedReader, SharedView
from meter_agent.readings import ReadFailure, Sample


class _Meter:
    """Counts how often it is read; it is its own clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.reads = 0
        self.fails = False
        self.closed = 0

    def sample(self) -> Sample:
        self.reads += 1
        if self.fails:
            raise ReadFailure("house", "nobody answers")
        return Sample(self.now_s, self.now_s, self.reads, 100 + self.reads)

    def close(self) -> None:
        self.closed += 1

    def monotonic_s(self) -> float:
        return self.now_s

    def time_s(self) -> float:
        return self.now_s


@pytest.fixture
def meter() -> _Meter:
    return _Meter()


@pytest.fixture
def views(meter: _Meter) -> tuple[SharedView, SharedView]:
    shared = SharedReader(meter, meter)
    return shared.view("house"), shared.view("roof")


def test_one_read_serves_both(meter: _Meter, views: tuple[SharedView, SharedView]) -> None:
    for _ in range(3):
        house, roof = views[0].sample(), views[1].sample()
        assert house == roof
        meter.now_s += 10
    assert meter.reads == 3


def test_neither_gets_a_sample_twice(meter: _Meter, views: tuple[SharedView, SharedView]) -> None:
    assert [views[0].sample().import_mwh for _ in range(3)] == [1, 2, 3]
    assert views[1].sample().import_mwh == 3
    assert views[1].sample().import_mwh == 4


def test_an_old_sample_is_not_handed_on(meter: _Meter, views: tuple[SharedView, SharedView]) -> None:
    views[0].sample()
    meter.now_s += 1.5
    assert views[1].sample().import_mwh == 2


def test_a_failure_is_a_failure_for_both_and_nothing_old_is_given(
    meter: _Meter, views: tuple[SharedView, SharedView]
) -> None:
    views[0].sample()
    meter.fails = True
    meter.now_s += 10
    for view in views:
        with pytest.raises(ReadFailure):
            view.sample()


def test_meters_with_the_same_reader_table_share_it_and_others_do_not() -> None:
    port = P1Config("p1", Path("/nowhere"))
    other = P1Config("p1", Path("/elsewhere"))
    meters = [
        NamedMeter("house", MeterConfig("consumption", Path("k"), 1, port)),
        NamedMeter("shop", MeterConfig("consumption", Path("k"), 1, other)),
        NamedMeter("roof", MeterConfig("generation", Path("k"), 1, P1Config("p1", Path("/nowhere")))),
    ]
    readers = create_readers(meters, _Meter())
    assert list(readers) == ["house", "shop", "roof"]
    assert [isinstance(reader, SharedView) for reader in readers.values()] == [True, False, True]
