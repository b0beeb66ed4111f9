"""Markets that several simulations use."""

from dataclasses import replace

from broker.market.contracts import ShortageChoice
from broker.protocol.sources import Source
from simulation.world import ConsumerPlan, DevicePlan, Plan

PAIR = Plan(
    ("east", "west"),
    "east",
    (
        ConsumerPlan("anna", "east", (("solar", 40), ("wind", 30), ("any", 30)), (500, 300, 400, 250)),
        ConsumerPlan("ben", "west", (("wind", 100),), (300, 310, 320, 330)),
        ConsumerPlan(
            *("cleo", "west", (("renewable", 60), ("hydro", 40)), (200, 0, 201, 203)),
            *(ShortageChoice.SUBSTITUTES, ("natural_gas",)),
        ),
    ),
    (
        DevicePlan("roof", "ola", "east", Source.SOLAR, (700, 0, 150, 90)),
        DevicePlan("mill", "ola", "east", Source.WIND, (900, 700, 100, 500)),
        DevicePlan("dam", "pia", "west", Source.HYDRO, (150, 60, 300, 0)),
        DevicePlan("burner", "pia", "west", Source.NATURAL_GAS, (100, 100, 100, 100)),
    ),
)
"""Two brokers; west has no wind and orders it from east, which hosts the ledger."""

RETAILER = Plan(
    ("east", "west"),
    "east",
    PAIR.consumers,
    tuple(replace(device, broker="east") for device in PAIR.devices),
)
"""The same, but west has no providers: nothing of its own holds it up while the ledger is out of reach."""


TRIO = Plan(
    ("east", "south", "west"),
    "south",
    (
        ConsumerPlan("anna", "east", (("solar", 40), ("wind", 30), ("any", 30)), (500, 300, 400)),
        ConsumerPlan("ben", "west", (("wind", 100),), (300, 310, 320)),
        ConsumerPlan("cleo", "west", (("renewable", 60), ("hydro", 40)), (200, 200, 201)),
        ConsumerPlan("dora", "south", (("hydro", 50), ("wind", 50)), (100, 150, 170)),
    ),
    (
        DevicePlan("roof", "ola", "east", Source.SOLAR, (700, 0, 150)),
        DevicePlan("mill", "ola", "south", Source.WIND, (900, 700, 100)),
        DevicePlan("dam", "pia", "south", Source.HYDRO, (150, 260, 300)),
        DevicePlan("burner", "pia", "west", Source.NATURAL_GAS, (100, 100, 100)),
    ),
)
"""Three brokers. Only south has wind; west asks east first, by name, and then south."""
