"""A node's pages of holdings: of one height while the network goes on, and bounded however many ask."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ledger_world as world

from broker.ledger import holdings_view
from broker.ledger.cometbft import views as module
from broker.ledger.cometbft.views import HoldingsViews
from broker.ledger.embedded import EmbeddedLedger
from broker.ledger.store import FILE_NAME
from broker.protocol.errors import MalformedMessage


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedLedger]:
    monkeypatch.setattr(holdings_view, "MAX_HOLDINGS_ON_PAGE", 2)
    made = world.found(tmp_path)
    for number in range(5):
        add_holding(made, number)
    yield made
    made.close()


@pytest.fixture
def views(ledger: EmbeddedLedger, tmp_path: Path) -> Iterator[HoldingsViews]:
    made = HoldingsViews(tmp_path / FILE_NAME)
    yield made
    made.close()


def add_holding(ledger: EmbeddedLedger, number: int) -> None:
    start_s = world.T0 + number * world.INTERVAL_S
    raw = world.batch(world.issue("solar-1", 10, start_s), world.take("solar-1", 0, 10, start_s=start_s))
    assert ledger.submit(raw) is None
    assert ledger.commit().blocks


def test_all_pages_are_of_the_height_of_the_first(ledger: EmbeddedLedger, views: HoldingsViews) -> None:
    began = ledger.height
    entries: list[bytes] = []
    cursor = None
    for number in range(5, 8):
        page = views.page("b1", cursor)
        assert page.height == began
        entries += page.entries
        cursor = page.next_cursor
        add_holding(ledger, number)
    assert cursor is None
    assert len(set(entries)) == 5


def test_two_parties_do_not_end_each_others_pages(ledger: EmbeddedLedger, views: HoldingsViews) -> None:
    first = views.page("b1", None)
    assert views.page("b2", None).next_cursor is None
    add_holding(ledger, 5)
    assert views.page("b1", first.next_cursor).height == first.height


def test_whose_view_is_gone_begins_anew_at_another_height(
    ledger: EmbeddedLedger, views: HoldingsViews, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_OPEN_VIEWS", 2)
    first = views.page("b1", None)
    for number in range(5, 7):
        add_holding(ledger, number)
        views.page("b1", None)
    again = views.page("b1", first.next_cursor)
    assert (again.height, len(again.entries)) == (ledger.height, 2)


def test_old_views_are_dropped_so_that_the_log_does_not_grow_behind_them(
    ledger: EmbeddedLedger, views: HoldingsViews
) -> None:
    first = views.page("b1", None)
    views.drop_old(first.height + module.MAX_VIEW_AGE)
    add_holding(ledger, 5)
    assert views.page("b1", first.next_cursor).height == first.height
    first = views.page("b1", None)
    views.drop_old(first.height + module.MAX_VIEW_AGE + 1)
    add_holding(ledger, 6)
    assert views.page("b1", first.next_cursor).height == ledger.height


@pytest.mark.parametrize("cursor", [b"", b"x", b"\x80"])
def test_a_cursor_that_is_none_is_refused(views: HoldingsViews, cursor: bytes) -> None:
    with pytest.raises(MalformedMessage):
        views.page("b1", cursor)
