"""A provider's terms: what makes no sense is refused, and which Wh of an asset are kept for whom."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.market.terms import DeviceTerms, Part, TermsError, make_terms, parts_of

KEPT = make_terms(90, reserve_ppm=300_000, exclusive_ppm=100_000, exclusive_for=["ben", "anna"])


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({"price": -1}, "price -1"),
        ({"reserve_ppm": 1_000_001}, "the reserve is 1000001 ppm"),
        ({"exclusive_ppm": -1}, "the exclusive share is -1 ppm"),
        ({"reserve_ppm": 600_000, "exclusive_ppm": 500_000, "exclusive_for": ["anna"]}, "1100000 ppm together"),
        ({"exclusive_ppm": 5}, "belong together"),
        ({"exclusive_for": ["anna"]}, "belong together"),
        ({"exclusive_ppm": 5, "exclusive_for": ["anna", "anna"]}, "name each once"),
        ({"exclusive_ppm": 5, "exclusive_for": [f"m{n}" for n in range(65)]}, "at most 64"),
        ({"exclusive_ppm": 5, "exclusive_for": ["An Na"]}, "'An Na' is no name of a meter"),
    ],
)
def test_terms_that_make_no_sense_are_refused(terms: dict[str, Any], says: str) -> None:
    with pytest.raises(TermsError, match=says):
        make_terms(**({"price": 5} | terms))


def test_an_asset_begins_with_what_is_exclusive_then_the_reserve_then_the_rest() -> None:
    assert parts_of(KEPT, 1_000, 0, 1_000) == [
        Part(0, 100, True, ("anna", "ben")),
        Part(100, 400, True, ()),
        Part(400, 1_000, False, ()),
    ]


def test_terms_that_keep_nothing_cut_nothing() -> None:
    assert parts_of(DeviceTerms(5), 10, 3, 7) == [Part(3, 7, False, ())]


@given(st.integers(1, 5_000), st.data())
def test_which_wh_are_kept_does_not_depend_on_how_an_asset_is_cut(asset_wh: int, data: st.DataObject) -> None:
    cut_wh = data.draw(st.integers(1, asset_wh))
    kept = [
        {wh: part[2:] for part in parts for wh in range(part.from_wh, part.to_wh)}
        for parts in (
            parts_of(KEPT, asset_wh, 0, asset_wh),
            parts_of(KEPT, asset_wh, 0, cut_wh) + (parts_of(KEPT, asset_wh, cut_wh, asset_wh)),
        )
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == asset_wh
