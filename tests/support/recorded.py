"""The recorded half hours that the demo carries, as Wh by UTC epoch seconds (local time is UTC+10, as in the demo)."""

import csv
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final

DEMO_DATA: Final = Path(__file__).parents[2] / "deploy/demo/data"
_LOCAL: Final = timezone(timedelta(hours=10))


def recorded(path: Path) -> dict[int, tuple[int, int]]:
    """By start of the half hour: (consumed, generated) Wh."""
    found = {}
    with path.open(newline="") as file:
        for time, consumed_kw, generated_kw in list(csv.reader(file))[1:]:
            start_s = int(datetime.fromisoformat(time).replace(tzinfo=_LOCAL).timestamp())
            found[start_s] = (round(float(consumed_kw) * 500), round(float(generated_kw) * 500))
    return found
