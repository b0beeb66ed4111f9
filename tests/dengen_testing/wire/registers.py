"""Which value stands in which register of which meter: pure, from the makers' manuals.

Each function gives the whole register image of one meter family. Addresses are protocol addresses (from 0); numbers
are big-endian. The families were chosen so that every type the agent must read is there: 64-bit integers in Wh,
32-bit floats in kWh, scaled 64-bit integers, and SunSpec's scale factors.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from dengen_testing.wire.modbus import READ_HOLDING_REGISTERS, READ_INPUT_REGISTERS, Block, RegisterImage

SUNSPEC_BASE: Final = 40_000
_SDM_REGISTERS: Final = 0x180


@dataclass(frozen=True, slots=True)
class MeterState:
    """What a meter has counted and measures. `power_w` is positive for drawn, negative for fed-in power."""

    time_s: int
    import_wh: int
    export_wh: int
    power_w: int
    serial: int


def iem3000(state: MeterState) -> RegisterImage:
    """Schneider iEM3155 and its family, function code 3: counters s64 in Wh, power f32 in kW.

    "iEM3000 Series Energy Meters User Guide" DOCA0005EN, register list: 3060 total active power, 3204 total active
    energy import, 3208 export, 130 serial number, 50 meter model; the manual counts from 1. The power register is also
    read at 3059 in https://github.com/htvekov/iem3155_esphome.
    """
    model = b"iEM3155".ljust(40, b"\0")
    return RegisterImage(
        (
            Block(READ_HOLDING_REGISTERS, 0x0031, model),
            Block(READ_HOLDING_REGISTERS, 0x0081, struct.pack(">I", state.serial)),
            Block(READ_HOLDING_REGISTERS, 0x0BF3, struct.pack(">f", state.power_w / 1_000)),
            Block(READ_HOLDING_REGISTERS, 0x0C83, struct.pack(">qq", state.import_wh, state.export_wh)),
        )
    )


def sdm630(state: MeterState) -> RegisterImage:
    """Eastron SDM630, function code 4: f32, counters in kWh, power in W; parameters that are not measured are zero.

    "SDM630 Modbus Protocol Implementation": 30053 total system power 0x0034, 30073 total import 0x0048, 30075 total
    export 0x004A, 30343 import + export 0x0156. The serial number, function code 3, stands at 0xFC00 in
    https://github.com/nmakel/sdm_modbus.
    """
    return _sdm(state, power_address=0x34)


def sdm120(state: MeterState) -> RegisterImage:
    """Eastron SDM120, SDM220 and SDM230: as the SDM630, but single-phase, with the power at 30013, 0x000C."""
    return _sdm(state, power_address=0x0C)


def abb_b23(state: MeterState) -> RegisterImage:
    """ABB B21, B23 and B24, function code 3: counters u64 in 0.01 kWh, power s32 in 0.01 W.

    "B23/B24 User Manual" 2CMC485003M0201, mapping tables: 0x5000 active import, 0x5004 active export, 0x5008 active
    net (signed), 0x5B14 active power total, 0x8900 serial number.
    """
    counters = struct.pack(
        ">QQq", state.import_wh // 10, state.export_wh // 10, (state.import_wh - state.export_wh) // 10
    )
    return RegisterImage(
        (
            Block(READ_HOLDING_REGISTERS, 0x5000, counters),
            Block(READ_HOLDING_REGISTERS, 0x5B14, struct.pack(">i", 100 * state.power_w)),
            Block(READ_HOLDING_REGISTERS, 0x8900, struct.pack(">I", state.serial)),
        )
    )


def sunspec_inverter(state: MeterState) -> RegisterImage:
    """A three-phase inverter after SunSpec (models 1 and 103), function code 3, base address 40000.

    https://github.com/sunspec/models json/model_1.json and model_103.json: offsets from the model's id: 14 W (int16)
    with its factor at 15, 24 WH (acc32) with its factor at 26. What is not implemented shows the value that SunSpec
    defines for that. The factor of W follows the power, as it does in inverters over 32 kW.
    """
    power_w = -state.power_w
    power_factor = 0 if abs(power_w) <= 32_767 else 1 if abs(power_w) <= 327_670 else 2
    common = struct.pack(
        ">HH32s32s16s16s32sHH",
        1,
        66,
        b"dengen",
        b"wire-level inverter",
        b"",
        b"1.0",
        str(state.serial).encode(),
        1,
        0x8000,
    )
    inverter = struct.pack(
        ">HH"
        "4Hh"  # A, AphA, AphB, AphC, A_SF
        "6Hh"  # PPVphAB, PPVphBC, PPVphCA, PhVphA, PhVphB, PhVphC, V_SF
        "hh"  # W, W_SF
        "Hh"  # Hz, Hz_SF
        "hh"  # VA, VA_SF
        "hh"  # VAr, VAr_SF
        "hh"  # PF, PF_SF
        "Ih"  # WH, WH_SF
        "HhHhhh"  # DCA, DCA_SF, DCV, DCV_SF, DCW, DCW_SF
        "hhhhh"  # TmpCab, TmpSnk, TmpTrns, TmpOt, Tmp_SF
        "HH"  # St, StVnd
        "6I",  # Evt1, Evt2, EvtVnd1 to EvtVnd4
        *(103, 50),
        *(0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, -0x8000),
        *(0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, -0x8000),
        *(power_w // 10**power_factor, power_factor),
        *(5_000, -2),
        *(-0x8000, -0x8000),
        *(-0x8000, -0x8000),
        *(-0x8000, -0x8000),
        *(state.export_wh % 2**32, 0),
        *(0xFFFF, -0x8000, 0xFFFF, -0x8000, -0x8000, -0x8000),
        *(-0x8000, -0x8000, -0x8000, -0x8000, -0x8000),
        *(4 if power_w > 0 else 2, 0xFFFF),
        *(0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
    )
    end = struct.pack(">HH", 0xFFFF, 0)
    return RegisterImage((Block(READ_HOLDING_REGISTERS, SUNSPEC_BASE, b"SunS" + common + inverter + end),))


REGISTER_IMAGES: Final[dict[str, Callable[[MeterState], RegisterImage]]] = {
    "iem3000": iem3000,
    "sdm630": sdm630,
    "sdm120": sdm120,
    "abb_b23": abb_b23,
    "sunspec_inverter": sunspec_inverter,
}
"""The meter kinds that speak Modbus, by the name in a street's config."""


def _sdm(state: MeterState, power_address: int) -> RegisterImage:
    values = bytearray(2 * _SDM_REGISTERS)
    for address, value in (
        (power_address, float(state.power_w)),
        (0x46, 50.0),
        (0x48, state.import_wh / 1_000),
        (0x4A, state.export_wh / 1_000),
        (0x156, (state.import_wh + state.export_wh) / 1_000),
    ):
        struct.pack_into(">f", values, 2 * address, value)
    # The manuals of the family allow 30 parameters a request (https://www.easymanua.ls/eastron/sdm72d-m/manual?p=14).
    return RegisterImage(
        (
            Block(READ_INPUT_REGISTERS, 0, bytes(values)),
            Block(READ_HOLDING_REGISTERS, 0xFC00, struct.pack(">I", state.serial)),
        ),
        max_registers=60,
    )
