"""docs/market.md says what the code does: every row of its table of examples is decided again."""

from pathlib import Path

import pytest

from broker.market.contracts import WHOLE_PPM, History
from broker.market.mix import quotas

PAGE = Path(__file__).parents[3] / "docs" / "market.md"
HEAD = "| case | shares in % | delivered by line | delivered in all | demand | quotas |"


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = []
    for line in lines[lines.index(HEAD) + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def numbers(cell: str) -> tuple[int, ...]:
    return tuple(int(number) for number in cell.split(","))


def test_the_table_is_there() -> None:
    assert len(rows()) >= 10


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_page_shows_what_is_decided(row: list[str]) -> None:
    _, shares, by_line, total, demand_wh, expected = row
    lines_ppm = tuple(percent * WHOLE_PPM // 100 for percent in numbers(shares))
    assert sum(lines_ppm) == WHOLE_PPM
    assert quotas(lines_ppm, History(numbers(by_line), int(total)), int(demand_wh)) == numbers(expected)
