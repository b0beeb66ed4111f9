"""What one demand costs a broker, from PUBLISH to committed delivery and receipt, over what no broker can do without.

All CPU time of the broker's process counts: receiving, checking, storing, the receipt, clearing, the ledger's batches,
rules, blocks and commits, the delivery message, the close, ticks and readings. The bare loop of `floor` gets the same
demands over the same mosquitto, in turn with the broker (A B A B …) and on the same core, so that the ratio holds on a
noisy machine. The first round fills both sides' caches and is not counted.

    python -m bench.hot_path [--profile 40]     (with PYTHONPATH=tests) alone; with a profile of the broker
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dengen_testing.mosquitto import Mosquitto
from dengen_testing.processes import ManagedProcess

from bench import floor
from bench.processes import TESTS_FOLDER, Helper, HelperFailed, cpu_s, share_a_core
from bench.sampler import Samples, by_function, by_step
from bench.world import (
    FIRST_INTERVAL_S,
    GATE_2_S,
    INTERVAL_S,
    MAX_DEMAND_WH,
    BrokerFolder,
    RunningBroker,
    add_consumers,
    make_broker,
)
from broker.protocol.topics import DEFAULT_ROOT

WINDOW: Final = 2_000
"""Demands under way at once: as many as fill a group commit, and far below what a queue could hide."""


@dataclass(frozen=True, slots=True)
class Round:
    """One interval of all consumers: CPU seconds of broker and bare loop."""

    broker_s: float
    floor_s: float
    wall_s: float
    """How long the broker took from the first demand to the last delivery."""


def hot_path(folder: Path, consumers: int, rounds: int, samples: Path | None = None) -> dict[str, Any]:
    """The `hot_path` figures. Raises HelperFailed if a demand was not answered, or not delivered, exactly once."""
    measured = measure(folder, consumers, rounds, samples)
    cpu_us = statistics.median(one.broker_s for one in measured) / consumers * 1e6
    floor_us = statistics.median(one.floor_s for one in measured) / consumers * 1e6
    return {"cpu_us_per_demand": round(cpu_us, 1), "floor_us": round(floor_us, 1), "ratio": round(cpu_us / floor_us, 3)}


def measure(folder: Path, consumers: int, rounds: int, samples: Path | None = None) -> list[Round]:
    """Run the rounds, after one that is not counted."""
    with Mosquitto(folder / "mosquitto") as server:
        mqtt = server.mqtt_config()
        broker = make_broker(folder / "east", mqtt, 2 * consumers * MAX_DEMAND_WH)
        add_consumers(broker, consumers, range(consumers))
        process = None if samples is None else sampled_broker(broker, samples)
        bare_loop = ManagedProcess(
            "bare loop",
            [
                *(sys.executable, "-m", "bench.floor", str(server.port), str(folder / "floor.db")),
                *(str(broker.folder / "east.pem"), str(consumers)),
            ],
            folder / "floor.log",
            environment={"PYTHONPATH": str(TESTS_FOLDER)},
        )
        with (
            RunningBroker(broker, mqtt, process) as running,
            bare_loop,
            Helper("bench.load", str(server.port), str(broker.key_file)) as load,
        ):
            assert bare_loop.pid is not None
            assert server.pid is not None
            share_a_core((running.pid, bare_loop.pid), (load.pid, server.pid))
            running.tick(FIRST_INTERVAL_S)
            running.wait_idle(FIRST_INTERVAL_S)
            measured = []
            for number in range(rounds + 1):
                start_s = FIRST_INTERVAL_S + number * INTERVAL_S
                load.run({"do": "sign", "start_s": [start_s], "first": 0, "count": consumers, "step": 1})
                before_s = cpu_s(running.pid)
                sent = one_interval(running, load, start_s, consumers)
                broker_s = cpu_s(running.pid) - before_s
                before_s = cpu_s(bare_loop.pid)
                check(load.run(send_job(floor.ROOT, start_s, deliveries=False)), consumers, deliveries=False)
                measured.append(Round(broker_s, cpu_s(bare_loop.pid) - before_s, sent["seconds"]))
    return measured[1:]


def one_interval(running: RunningBroker, load: Helper, start_s: int, demands: int) -> dict[str, Any]:
    """Let an interval pass: readings, all signed demands of that interval, clearing, close."""
    end_s = start_s + INTERVAL_S
    running.tick(end_s)
    running.wait_told(end_s)
    running.generate(start_s, demands * MAX_DEMAND_WH)
    load.send(send_job(DEFAULT_ROOT, start_s, deliveries=True))
    sent = load.answer()
    check(sent, demands, deliveries=True)
    running.tick(end_s + GATE_2_S)
    running.wait_idle(end_s + GATE_2_S)
    return sent


def send_job(root: str, start_s: int, *, deliveries: bool) -> dict[str, Any]:
    return {
        "do": "send",
        "root": root,
        "rounds": [{"start_s": start_s, "at_s": 0.0}],
        "over_s": 0.0,
        "window": WINDOW,
        "deliveries": deliveries,
        "resend_s": 20.0,
        "limit_s": 60.0,
    }


def check(sent: dict[str, Any], demands: int, *, deliveries: bool) -> None:
    """Raises HelperFailed unless every demand had one receipt and, with `deliveries`, was delivered in full."""
    faults = {name: sent[name] for name in ("resent", "refused", "wrong", "extra_receipts") if sent[name]}
    if sent["answered"] != demands or (deliveries and sent["delivered"] != demands) or faults:
        raise HelperFailed(f"{demands} demands: {sent['answered']} answered, {sent['delivered']} delivered, {faults}")


def sampled_broker(broker: BrokerFolder, output: Path) -> ManagedProcess:
    """`energy-broker run` under the sampler, which writes to `output` when the broker ends."""
    return ManagedProcess(
        "energy-broker under the sampler",
        [
            *(sys.executable, "-m", "bench.sampler", str(output), "broker.cli"),
            *("run", "--config", str(broker.config)),
        ],
        broker.log_file,
        environment={"PYTHONPATH": str(TESTS_FOLDER)},
    )


STEPS: Final = {
    "check the meter's signature": ("broker.protocol.keys.verifies",),
    "sign receipts and deliveries": ("broker.protocol.keys.sign",),
    "receive (paho, socket)": ("broker.protocol.mqtt_link.poll",),
    "send, acknowledge (own packets, socket)": (
        "broker.service.run._publish",
        "broker.protocol.mqtt_link.publish",
        "broker.protocol.mqtt_link.acknowledge",
        "broker.protocol.mqtt_link.flush",
    ),
    "take in: parse, decode, look up": ("broker.service.core.take_message",),
    "take in: pseudonym and commitment": ("hmac.digest", "broker.service.pseudonyms.commitment"),
    "take in: the message's row": ("broker.service.store.message", "broker.service.store.add_message"),
    "receipt: encode and seal": ("broker.service.intake._send_receipt",),
    "clear: read rows, quotas, fill lines": ("broker.service.cycle.clear",),
    "clear: cut slices, make deliver operations": ("broker.service.cycle._carry_out",),
    "clear: rows of deliveries, accounts, quotas": (
        "broker.service.cycle._note_deliveries",
        "broker.service.registry.keep_accounts",
        "broker.service.store.set_delivered",
    ),
    "ledger: decode the batch": ("broker.ledger.embedded.submit",),
    "ledger: rules": ("broker.ledger.rules.apply_batch",),
    "ledger: state rows, state hash, Merkle leaves": ("broker.ledger.chain.apply",),
    "ledger: write blocks and rows": ("broker.ledger.store.write", "broker.ledger.embedded.commit"),
    "deliveries: encode and seal": ("broker.service.cycle._send_delivery",),
    "commit the broker's store": ("broker.service.store.commit",),
    "close: Merkle root of all demands": ("broker.service.cycle._settle",),
}
"""What a demand goes through; a sample counts for the innermost of these functions that is on its stack."""

TURN: Final = "broker.service.run.turn"


def print_profile(samples: Samples, cpu_us: float, functions: int) -> None:
    """µs a demand by step, then by function."""
    steps = by_step(samples, STEPS, TURN)
    total = sum(steps.values())
    for step, count in steps.items():
        print(f"{count / total * cpu_us:7.1f} us  {step or 'the rest of the turn'}")
    print(f"{'own':>9} {'with calls':>11}")
    for name, own, within in by_function([one for one in samples if TURN in one[1]])[:functions]:
        print(f"{own / total * cpu_us:9.1f} {within / total * cpu_us:11.1f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--consumers", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", type=int, metavar="FUNCTIONS", help="sample the broker; print steps and functions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = None if options.profile is None else Path(folder) / "samples.json"
        measured = measure(Path(folder), options.consumers, options.rounds, output)
        for one in measured:
            print(
                f"broker {one.broker_s / options.consumers * 1e6:6.1f} us   floor"
                f" {one.floor_s / options.consumers * 1e6:6.1f} us   ratio {one.broker_s / one.floor_s:5.2f}"
                f"   {options.consumers / one.wall_s:6.0f} demands/s"
            )
        if output is not None:
            cpu_us = statistics.median(one.broker_s for one in measured) / options.consumers * 1e6
            print_profile(json.loads(output.read_text()), cpu_us, options.profile)


if __name__ == "__main__":
    main()
