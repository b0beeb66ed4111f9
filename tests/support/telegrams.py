"""Telegrams written by hand, for tests and fuzzing: SML in hex, IEC 62056-21 as text, and where the samples are.

SML is put together from its fields, after BSI TR-03109-1, annex "Feinspezifikation drahtgebundene LMN-Schnittstelle,
Teil b", with checksums computed here, bit by bit, so that the code under test has no part in its own input.
"""

import os
from functools import reduce
from operator import xor
from pathlib import Path

SAMPLES = Path(os.environ.get("DENGEN_SAMPLES", Path(__file__).parents[3] / "shared" / "data")) / "sml"
"""Bytes as real meters pushed them. Nobody stated a licence, so they are not part of the repository."""

START, END = "1B1B1B1B 01010101", "1B1B1B1B 1A"
DZG = "0A 01 445A47 00 0282225E"
"""Server id of 1DZG0042082910, one of the meters that cut the sign off (libsml pull/136)."""

DZG_RIGHT = "0A 01 445A47 00 039E2053"
"""Server id of a DZG meter that does not (libsml-testing pull/15)."""

ISK = "09 01 49534B 00 04010203"


def crc(data: bytes, kind: str = "x25") -> bytes:
    """CRC-16/X.25, low byte first, or CRC-16/KERMIT, high byte first."""
    value = 0xFFFF if kind == "x25" else 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x8408 if value & 1 else 0)
    return (value ^ 0xFFFF).to_bytes(2, "little") if kind == "x25" else value.to_bytes(2, "big")


def entry(code: str, value: str, unit: str = "62 1E", scaler: str = "52 FF", status: str = "01") -> str:
    """One value of a list in hex: OBIS code as six bytes; unit Wh and tenths unless told."""
    return f"77 07{code} {status} 01 {unit} {scaler} {value} 01"


def maker(letters: str) -> str:
    return f"77 07 0100603201 01 01 01 01 01 04{letters.encode().hex()} 01"


def power(value: str, scaler: str = "52 FE", code: str = "0100100700FF") -> str:
    return entry(code, value, unit="62 1B", scaler=scaler)


def message(body: str, kind: str = "x25") -> bytes:
    content = bytes.fromhex("76 05 00112233 62 00 62 00" + body)
    return content + b"\x63" + crc(content, kind) + b"\x00"


def value_list(*entries: str, server_id: str = ISK, kind: str = "x25") -> bytes:
    """A GetList.Response."""
    head = f"72 63 0701 77 01 0B {server_id} 07 0100620AFFFF 72 62 01 65 07AFF5DC"
    long_list = f"F{len(entries) >> 4:X} 0{len(entries) & 15:X}" if len(entries) > 15 else f"7{len(entries):X}"
    return message(head + long_list + "".join(entries) + "01 01", kind)


def frame(payload: bytes, kind: str = "x25") -> bytes:
    """What goes over the wire: start, payload with escapes doubled and padding, end, CRC."""
    escape = bytes.fromhex("1B1B1B1B")
    padding = -len(payload) % 4
    body = payload.replace(escape, escape * 2) + bytes(padding)
    raw = bytes.fromhex(START) + body + bytes.fromhex(END) + bytes([padding])
    return raw + crc(raw, kind)


def sml(*entries: str, server_id: str = ISK, kind: str = "x25") -> bytes:
    """A whole frame as a meter sends it: open, list, close."""
    return frame(
        message(f"72 63 0101 76 01 01 05 00112233 0B {server_id} 01 01", kind)
        + value_list(*entries, server_id=server_id, kind=kind)
        + message("72 63 0201 71 01", kind),
        kind,
    )


IMPORT_12345_6_WH = entry("0100010800FF", "65 0001E240", status="65 001C0104")
EXPORT_7_8_WH = entry("0100020800FF", "62 4E")
GOOD_SML = sml(maker("ISK"), IMPORT_12345_6_WH, EXPORT_7_8_WH, power("55 FFFFFFE2", "52 00"))
"""12345.6 Wh, 7.8 Wh, -30 W."""

EASYMETER = (
    "/ESY5Q3DA1004 V3.02\r\n"
    "\r\n"
    "1-0:0.0.0*255(0273011003684)\r\n"
    "1-0:1.8.0*255(00026107.7034231*kWh)\r\n"
    "1-0:21.7.255*255(000200.13*W)\r\n"
    "1-0:41.7.255*255(000122.31*W)\r\n"
    "1-0:61.7.255*255(000014.01*W)\r\n"
    "1-0:1.7.255*255(000336.45*W)\r\n"
    "1-0:96.5.5*255(82)\r\n"
    "0-0:96.1.255*255(1ESY1011003684)\r\n"
    "!\r\n"
)
"""Pushed by an EasyMeter Q3D; published by its owner in the comments of a script that reads it."""

LANDIS_GYR_IDENTIFICATION = "/LGZ4ZMF100AC.M23\r\n"
LANDIS_GYR_LINES = (
    "F.F(00)\r\n"
    "C.1.0(12314330)\r\n"
    "0.0(00188123        )\r\n"
    "C.1.1(        )\r\n"
    "1.8.1(001234.120*kWh)\r\n"
    "1.8.0(001234.120*kWh)\r\n"
    "2.8.0(000000.000*kWh)\r\n"
    "15.8.0(001234.120*kWh)\r\n"
    "C.7.0(0005)\r\n"
    "32.7(229*V)\r\n"
    "52.7(230*V)\r\n"
    "72.7(230*V)\r\n"
    "31.7(000.03*A)\r\n"
    "51.7(000.04*A)\r\n"
    "71.7(000.09*A)\r\n"
    "C.5.0(0400)\r\n"
    "0.2.0(M23)\r\n"
    "16.7(000.00*kW)\r\n"
    "!\r\n"
)
"""What a Landis+Gyr E350 answers: https://wiki.volkszaehler.org/hardware/channels/meters/power/edl-ehz/landisgyr_e350.
The page shows neither STX nor the check character."""


def block(lines: str) -> bytes:
    """Lines as a data block: STX, lines, ETX, BCC."""
    data = lines.encode("ascii") + b"\x03"
    return b"\x02" + data + bytes([reduce(xor, data)])


def even(data: bytes) -> bytes:
    """Seven bits and even parity, as they come out of a port with eight data bits."""
    return bytes(byte | (bin(byte).count("1") % 2) << 7 for byte in data)


LANDIS_GYR = LANDIS_GYR_IDENTIFICATION.encode() + block(LANDIS_GYR_LINES)


ASKED, PUSHED = even(LANDIS_GYR), even(EASYMETER.encode())
"""As they come in: with parity bits."""

P1_TELEGRAM = (
    b"/ISk5\\2MT382-1000\r\n\r\n1-3:0.2.8(50)\r\n0-0:96.1.1(4B384547303034303436333935353037)\r\n"
    b"1-0:1.8.1(000004.426*kWh)\r\n1-0:1.8.2(000002.399*kWh)\r\n1-0:2.8.1(000002.444*kWh)\r\n"
    b"1-0:2.8.2(000000.000*kWh)\r\n1-0:1.7.0(00.244*kW)\r\n1-0:2.7.0(00.000*kW)\r\n!F9C3\r\n"
)
"""DSMR 5, values of a recorded telegram (https://github.com/ndokter/dsmr_parser test/example_telegrams.py)."""

SMARTY_FRAME = bytes.fromhex(
    "DB08534147677001BD5482027A300005A8E3806EE6E639274C7BC57095F872B0"
    "8DDE621FB74EE81E5EBE342C93D8E73781FB2A1EB8710074A54FC57AA7D1D992"
    "36C42E2EC01A0324EFC7F02E3BA2FA43196CA603838AB8322DFFA83F7E83932E"
    "6007406B112B41745F38805646D53FEA7A029FA79C36D9D777DA8B5A03ED3EC6"
    "E485DEC0C98D7D53C0BD175B228E01F466D9843777808503D630158C8236D868"
    "088EB13977BDFC474367E557136FEB6D537F18304484A014B49099A63C18D430"
    "3A4C53853A0CA8C5B0E3E805BFD8425410FAB522B35A8F258B57BB1E97E2489B"
    "6F37071753AFFBB4EEBCA502EEA592B88085AE155BCEA8F732D6B0115BB9CED7"
    "6BE5B893B2A7EFC8163C171E77C3D29A72B7478ED6DFE2C48BF3F9D8F895CA1C"
    "B42EAAC4CB21D6EAB51E77E4D6029D788427DD5BFC46BDD3E8A32DBB6F93B484"
    "2B073E9B6FE6E5DFC058B5F454AA3EF162BDF93CB1E0C452DBB2BE4CB4C67D16"
    "9E2A30618FA2165441B6D3C22F1C3627E35FFFCF9F1947D7A6AE942FC21E246F"
    "0EFC456A7889C961C93EA089EEF6D1A44056BAAAB352CBEA7D7E206757AF0D42"
    "7064B058D57235A78F8DB91CE4D60A3C6BABD99A61169B172F2414F565BDE023"
    "9654EAC77552FBCC2A2FA102D7CD003DDBEB9C1F811DBC695376336E2E9D6CFC"
    "73FCB4A29446BD7CE3170E5856766B25E82049EE5508EC1816685F1DCEC23819"
    "1216DFFBA0647D32A1559D99640A15F24AB02172DB3D564454E7A0346C099399"
    "B8770A9BDAA619C7C5230526D6B80499A0EE0CD4FC46A677AF68EF4DEE9E76B7"
    "8AC8A04F431DB3986FCFD45EE1F10799AF0B794A4103735D6DDA3829173F80F1"
    "38A5301AFDF1DB8774F0C40E6E71264B334A943FC10552B0752F3A0D7FD80458"
    "595408F2850F17"
)
SMARTY_KEY = bytes.fromhex("D491470F47126332B07D1923B3504188")
LUXEMBOURG_AUTHENTICATION_KEY = bytes.fromhex("00112233445566778899AABBCCDDEEFF")
"""A frame of an encrypted P1 port in Luxembourg and the key of its meter, a test device whose owner published both:
https://github.com/NEXXTLAB/go-smarty-reader/blob/646ef1a0a779737fb2b8740be2342ea28c0fbda8/smarty/Decryption_test.go.
The authentication key is the same for the whole country."""
