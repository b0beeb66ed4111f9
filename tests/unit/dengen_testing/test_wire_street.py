"""A street's meters over time, and the file that describes it."""

from pathlib import Path
from typing import Any

import pytest
from dengen_testing.wire.config import StreetConfigError, street_config
from dengen_testing.wire.curve import EnergyCurve
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.keys import generate_private_key

KEY = generate_private_key().public.cose_key.hex()


def street(**changes: Any) -> dict[str, Any]:
    return {
        "participant": "street",
        "interval_s": 1_800,
        "origin_s": 3_600,
        "folder": "wire",
        "conductor": {"ledger": "demo", "name": "conductor", "key": KEY},
        "mqtt": {"port": 1883},
        "meters": [{"name": "house", "wire": "p1", "kind": "dsmr", "start_import_wh": 100, "import_wh": [10, 0, 7]}],
        **changes,
    }


def test_a_register_shows_the_sum_of_all_whole_intervals_at_their_boundaries() -> None:
    curve = EnergyCurve(3_600, 1_800, (10, 0, 7), start_wh=100)
    assert [curve.total_wh(3_600 + 1_800 * step) for step in range(-1, 6)] == [100, 100, 110, 110, 117, 117, 117]


def test_a_register_counts_evenly_within_an_interval() -> None:
    curve = EnergyCurve(0, 1_800, (10,))
    assert [curve.total_wh(time_s) for time_s in (0, 179, 180, 900, 1_799, 1_800)] == [0, 0, 1, 5, 9, 10]


def test_the_power_is_the_mean_of_the_interval() -> None:
    curve = EnergyCurve(0, 1_800, (10, 0))
    assert [curve.power_w(time_s) for time_s in (-1, 0, 1_799, 1_800, 3_600)] == [0, 20, 20, 0, 0]


def test_the_next_change_is_the_next_boundary_until_nothing_counts_any_more() -> None:
    curve = EnergyCurve(3_600, 1_800, (10, 0))
    assert [curve.next_change_s(time_s) for time_s in (0, 3_600, 5_399, 5_400, 7_199, 7_200)] == [
        3_600,
        5_400,
        5_400,
        7_200,
        7_200,
        None,
    ]


def test_a_curve_never_counts_back() -> None:
    with pytest.raises(ValueError, match="0 Wh or more"):
        EnergyCurve(0, 1_800, (-1,))


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20), st.integers(-3_600, 40_000), st.integers(0, 4_000))
def test_a_register_never_falls(energies: list[int], time_s: int, later_s: int) -> None:
    curve = EnergyCurve(0, 1_800, tuple(energies))
    assert curve.total_wh(time_s) <= curve.total_wh(time_s + later_s)
    assert curve.total_wh(1_800 * len(energies)) == sum(energies)


def test_a_street_file_becomes_meters() -> None:
    config = street_config(street(), Path("/srv"))
    meter = config.meters[0]
    assert config.folder == Path("/srv/wire")
    assert meter.state(3_600 + 1_800).import_wh == 110
    assert meter.state(3_600).power_w == 20
    assert meter.next_change_s(3_600) == 5_400
    assert config.conductor is not None
    assert config.conductor.mqtt.port == 1883


def test_a_street_without_conductor_is_moved_by_hand() -> None:
    data = street()
    del data["conductor"], data["mqtt"]
    assert street_config(data, Path()).conductor is None


HOUSE = street()["meters"][0]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"interval_s": 0}, "street.interval_s"),
        ({"meters": []}, "meters"),
        ({"meters": [HOUSE, HOUSE]}, "meters"),
        ({"metres": 1}, "street.metres"),
        ({"meters": [{**HOUSE, "wire": "m-bus"}]}, "meters[0].wire"),
        ({"meters": [{**HOUSE, "wire": "modbus_tcp"}]}, "meters[0].kind"),
        ({"meters": [{**HOUSE, "import_wh": [1.5]}]}, "meters[0].import_wh"),
        ({"meters": [{**HOUSE, "import_wh": [-1]}]}, "meters[0].import_wh"),
        ({"meters": [{**HOUSE, "name": "The House"}]}, "meters[0].name"),
        ({"meters": [{**HOUSE, "colour": "red"}]}, "meters[0].colour"),
        ({"conductor": {"ledger": "demo", "name": "conductor", "key": "00"}}, "conductor.key"),
        ({"mqtt": {}}, "mqtt.port"),
        ({"participant": 1}, "street.participant"),
    ],
)
def test_a_mistake_in_a_street_file_is_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(StreetConfigError) as caught:
        street_config(street(**changes), Path())
    assert caught.value.where == where
