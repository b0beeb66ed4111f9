"""`meter-agent status`: how the agent stands, from the agent itself if it runs, and from its journal."""

from collections.abc import Sequence
from typing import Any

from broker.protocol.envelope import parse
from broker.protocol.messages import Delivery
from meter_agent.clock import SystemClock
from meter_agent.config import AgentConfig
from meter_agent.journal import JournalView
from meter_agent.shown import kwh, utc
from meter_agent.status_socket import ask


def gather(config: AgentConfig, meters: Sequence[str], last: int, now_s: int) -> dict[str, Any]:
    """Everything as one JSON object: what `docs/agent.md` describes. Raises JournalError if there is no journal."""
    journal = JournalView(config.agent.data_dir)
    try:
        return _gathered(config, meters, last, now_s, journal, ask(config.agent.data_dir))
    finally:
        journal.close()


def _gathered(
    config: AgentConfig,
    meters: Sequence[str],
    last: int,
    now_s: int,
    journal: JournalView,
    live: dict[str, Any] | None,
) -> dict[str, Any]:
    broker: dict[str, Any] = {"name": config.agent.broker.name, "host": config.mqtt.host, "port": config.mqtt.port}
    if live is None:
        broker |= {"connected": False, "failure": None}
        # The agent's own clock goes with it; this one says at least whether the machine's is right.
        clock = {"source": config.agent.clock, "synchronised": SystemClock(require_synchronised=True).trusted()}
        home = None
    else:
        broker |= {"connected": live["broker"]["connected"], "failure": live["broker"]["failure"]}
        clock, home = live["clock"], live["home"]
    return {
        "agent": config.name,
        "running": live is not None,
        "time_s": live["time_s"] if live is not None else now_s,
        "clock": clock,
        "broker": broker,
        "home": home,
        "meters": [
            _meter(config, name, last, journal, live["meters"].get(name) if live is not None else None)
            for name in meters
        ],
        "events": [
            {"time_s": time_s, "meter": meter, "kind": kind, "detail": detail}
            for time_s, meter, kind, detail in reversed(journal.events(last))
        ],
    }


def _meter(
    config: AgentConfig, name: str, last: int, journal: JournalView, live: dict[str, Any] | None
) -> dict[str, Any]:
    waiting, oldest_s = journal.waiting(name)
    deliveries = [Delivery.from_payload(parse(raw).payload) for raw in reversed(journal.deliveries(name, last))]
    return {
        "meter": name,
        "reading": live["reading"] if live is not None else _last_counted(config, name, journal),
        "fault": live["fault"] if live is not None else None,
        # What the agent has noted and not yet written is not in the journal.
        "waiting": live["waiting"] if live is not None else waiting,
        "oldest_waiting_s": oldest_s,
        "hint": live["hint"] if live is not None else None,
        "intervals": [
            {
                "start_s": record.start_s,
                "end_s": record.end_s,
                "energy_wh": record.energy_wh,
                "quality": record.quality.name.lower(),
                "state": record.state.name.lower(),
            }
            for record in reversed(journal.intervals(name, last))
        ],
        "deliveries": [
            {
                "start_s": delivery.start_s,
                "state": delivery.state.name.lower(),
                "lines": [{"source": line.source.label, "energy_wh": line.energy_wh} for line in delivery.lines],
                "unmatched_wh": delivery.unmatched_wh,
            }
            for delivery in deliveries
        ],
    }


def _last_counted(config: AgentConfig, name: str, journal: JournalView) -> dict[str, Any] | None:
    """The reading behind the last sealed interval; older ones are in no file."""
    counted = journal.last_counted(name)
    if counted is None:
        return None
    reading: dict[str, Any] = dict.fromkeys(("time_s", "import_mwh", "export_mwh", "power_w", "serial_number"))
    reading["time_s"] = counted[0]
    reading[f"{config.meters[name].register_name}_mwh"] = counted[1]
    return reading


def text(status: dict[str, Any]) -> str:
    """The same for people, a fact a line."""
    clock, broker, home = status["clock"], status["broker"], status["home"]
    running = "running" if status["running"] else "not running; this is what its journal says"
    lines = [f"agent {status['agent']}: {running}"]
    lines.append(f"clock {clock['source']}: {'' if clock['synchronised'] else 'not '}synchronised")
    if status["running"]:
        lines.append(f"broker {broker['name']} at {broker['host']}:{broker['port']}: {_connection(broker)}")
        if home is not None:
            lines.append(f"home: {_connection(home)}")
    for meter in status["meters"]:
        lines += _meter_lines(meter, status["time_s"])
    lines += [
        f"{event['meter']} event {utc(event['time_s'])} {event['kind']}: {event['detail']}"
        for event in status["events"]
    ]
    return "\n".join(lines)


def _connection(link: dict[str, Any]) -> str:
    if link["connected"]:
        return "connected"
    return f"not connected ({link['failure']})" if link["failure"] else "not connected"


def _meter_lines(meter: dict[str, Any], now_s: int) -> list[str]:
    name, reading = meter["meter"], meter["reading"]
    lines = [f"{name} reading {_reading_text(reading, now_s)}"]
    if meter["fault"] is not None:
        lines.append(f"{name} fault {meter['fault']}")
    oldest = f", the oldest from {utc(meter['oldest_waiting_s'])}" if meter["oldest_waiting_s"] is not None else ""
    lines.append(f"{name} outbox {meter['waiting']} waiting for a receipt{oldest}")
    hint = meter["hint"]
    if hint is not None:
        plentiful = f"plentiful from {utc(hint['next_plentiful_s'])}" if hint["next_plentiful_s"] is not None else ""
        lines.append(f"{name} supply {hint['level'] or 'unknown'} now; {plentiful or 'not plentiful'}")
    for interval in meter["intervals"]:
        energy = f"{interval['energy_wh']} Wh {interval['quality']}"
        lines.append(f"{name} interval {utc(interval['start_s'])} {energy} {interval['state']}")
    for delivery in meter["deliveries"]:
        shares = ", ".join(f"{line['source']} {line['energy_wh']} Wh" for line in delivery["lines"]) or "nothing"
        lines.append(
            f"{name} delivery {utc(delivery['start_s'])} {delivery['state']}: {shares}; "
            f"unmatched {delivery['unmatched_wh']} Wh"
        )
    return lines


def _reading_text(reading: dict[str, Any] | None, now_s: int) -> str:
    if reading is None:
        return "none yet"
    parts = [f"{utc(reading['time_s'])}, {max(0, now_s - reading['time_s'])} s ago:"]
    parts += [
        f"{key} {kwh(reading[f'{key}_mwh'])} kWh" for key in ("import", "export") if reading[f"{key}_mwh"] is not None
    ]
    if reading["power_w"] is not None:
        parts.append(f"power {reading['power_w']} W")
    return " ".join(parts)
