"""The demo's progress bar and its table at the end: a summary as text for a terminal. Pure."""

from typing import Any, Final

_BAR_CHARACTERS: Final = 40


def progress_line(done: int, total: int, seconds: float, moment: str) -> str:
    """One line of progress, for example `[#####.....]  42 %  141/336 intervals  2011-10-12 22:30  14 s`."""
    filled = _BAR_CHARACTERS * done // total
    bar = "#" * filled + "." * (_BAR_CHARACTERS - filled)
    return f"[{bar}] {100 * done // total:3d} %  {done}/{total} half hours  {moment}  {seconds:.0f} s"


def summary_table(summary: dict[str, Any]) -> str:
    """What a person wants to know at the end: contracted against delivered, the neighbour's part, the unmatched."""
    lines = [""]
    for consumer in summary["consumers"]:
        lines += _consumer_lines(consumer)
    requests, transfers = summary["neighbour_requests"], summary["neighbour_transfers"]
    ledger = summary["ledger"]
    issued = ", ".join(f"{source} {_kwh(energy_wh)}" for source, energy_wh in summary["issued_wh"].items())
    lines += [
        f"issued (kWh)   {issued}",
        f"neighbours     {requests} requests, {transfers} transfers on the ledger, {_kwh(summary['neighbour_wh'])} kWh",
        f"ledger         {ledger['engine']}, height {ledger['height']}, "
        + ("verified from the first block" if ledger["verified"] else "NOT VERIFIED"),
        f"{summary['intervals']} half hours in {summary['seconds']} s",
    ]
    return "\n".join(lines)


def _consumer_lines(consumer: dict[str, Any]) -> list[str]:
    consumed_wh, delivered = consumer["consumed_wh"], dict(consumer["delivered_wh"])
    contract = consumer["contract"]
    lines = [
        f"{consumer['meter']} at {consumer['broker']}: {_kwh(consumed_wh)} kWh consumed",
        f"  {'source':<12} {'contracted':>10} {'delivered':>10} {'kWh':>10}",
    ]
    for target in [*contract, *sorted(source for source in delivered if source not in contract)]:
        contracted = f"{contract[target] / 10_000:.1f} %" if target in contract else "-"
        energy_wh = delivered.get(target, 0)
        lines.append(f"  {target:<12} {contracted:>10} {_percent(energy_wh, consumed_wh):>10} {_kwh(energy_wh):>10}")
    unmatched_wh = consumer["unmatched_wh"]
    lines.append(f"  {'unmatched':<12} {'':>10} {_percent(unmatched_wh, consumed_wh):>10} {_kwh(unmatched_wh):>10}")
    return [*lines, ""]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _kwh(energy_wh: int) -> str:
    return f"{energy_wh // 1_000}.{energy_wh % 1_000:03d}"
