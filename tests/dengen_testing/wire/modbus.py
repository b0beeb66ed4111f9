"""The server side of Modbus as pure functions: bytes and registers in, bytes out.

Sources: "MODBUS Application Protocol Specification V1.1b3" (function codes, exceptions), "MODBUS over Serial Line
Specification and Implementation Guide V1.02" (RTU frames, CRC) and "MODBUS Messaging on TCP/IP Implementation Guide
V1.0b" (MBAP header), all from https://modbus.org/specs.php. Addresses are protocol addresses: the register that a
manual numbers 40001 has the address 0.
"""

from dataclasses import dataclass
from typing import Final

from dengen_testing.wire.faults import Fault

READ_HOLDING_REGISTERS: Final = 0x03
READ_INPUT_REGISTERS: Final = 0x04

ILLEGAL_FUNCTION: Final = 0x01
ILLEGAL_DATA_ADDRESS: Final = 0x02
ILLEGAL_DATA_VALUE: Final = 0x03
GATEWAY_TARGET_FAILED: Final = 0x0B

MAX_REGISTERS: Final = 125
RTU_REQUEST_BYTES: Final = 8
"""Device, function, address, count, CRC: the length of a request for function codes 3 and 4."""

MAX_RTU_FRAME_BYTES: Final = 256
MBAP_BYTES: Final = 7
MAX_TCP_FRAME_BYTES: Final = 260

_GARBAGE: Final = bytes.fromhex("fe 00 ff 55 aa 0d 0a 00 81")
"""No Modbus frame: too long for an exception and without a CRC that fits."""


@dataclass(frozen=True, slots=True)
class Block:
    """Registers that stand one after the other: two bytes each, high byte first."""

    function: int
    start: int
    values: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.values) // 2


@dataclass(frozen=True, slots=True)
class RegisterImage:
    """All registers of a meter at one moment. A read must stay inside one block.

    `max_registers` is how many the meter answers at once; asking for more is exception 3.
    """

    blocks: tuple[Block, ...]
    max_registers: int = MAX_REGISTERS

    def read(self, function: int, address: int, count: int) -> bytes | int:
        """The registers' bytes, or the number of a Modbus exception."""
        if function not in {block.function for block in self.blocks}:
            return ILLEGAL_FUNCTION
        if not 1 <= count <= self.max_registers:
            return ILLEGAL_DATA_VALUE
        for block in self.blocks:
            if block.function == function and block.start <= address and address + count <= block.end:
                offset = 2 * (address - block.start)
                return block.values[offset : offset + 2 * count]
        return ILLEGAL_DATA_ADDRESS


def crc16(data: bytes) -> int:
    """CRC-16 with the reflected polynomial 0xA001 and start value 0xFFFF (serial line guide, section 2.5.1.2)."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0xA001 if crc & 1 else crc >> 1
    return crc


def with_crc(frame: bytes) -> bytes:
    """The frame followed by its CRC, low byte first."""
    return frame + crc16(frame).to_bytes(2, "little")


def answer_pdu(request: bytes, image: RegisterImage, *, short: bool = False) -> bytes:
    """The answer to a request PDU (function code and data). `short` leaves the last register away."""
    function = request[0]
    if function not in (READ_HOLDING_REGISTERS, READ_INPUT_REGISTERS) or len(request) != 5:
        return bytes((function | 0x80, ILLEGAL_FUNCTION))
    address, count = int.from_bytes(request[1:3], "big"), int.from_bytes(request[3:5], "big")
    values = image.read(function, address, count)
    if isinstance(values, int):
        return bytes((function | 0x80, values))
    if short:
        values = values[:-2]
    return bytes((function, len(values))) + values


class RtuServer:
    """One device on a serial line. Feed it what arrives; it returns what goes back.

    The caller tells it of silence on the line (`line_idle`), which ends a frame; it owns the clock.
    """

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id
        self._received = b""
        self._held: bytes | None = None

    @property
    def waiting_for_more(self) -> bool:
        """True while a frame has begun and not ended: then `line_idle` is due after a pause."""
        return bool(self._received)

    def receive(self, data: bytes, image: RegisterImage, fault: Fault = Fault.NONE) -> bytes:
        """Take bytes from the line; the answer if they complete a read request, else nothing."""
        self._received = (self._received + data)[-MAX_RTU_FRAME_BYTES:]
        frame = self._received[:RTU_REQUEST_BYTES]
        complete = len(frame) == RTU_REQUEST_BYTES and frame[1] in (READ_HOLDING_REGISTERS, READ_INPUT_REGISTERS)
        if not complete or with_crc(frame[:-2]) != frame:
            return b""
        self._received = self._received[RTU_REQUEST_BYTES:]
        return self._answer(frame, image, fault)

    def line_idle(self, image: RegisterImage, fault: Fault = Fault.NONE) -> bytes:
        """The line has been silent: what was received is a whole frame, or noise. The answer, if it asks for one."""
        frame, self._received = self._received, b""
        if len(frame) < 4 or with_crc(frame[:-2]) != frame:
            return b""
        return self._answer(frame, image, fault)

    def _answer(self, frame: bytes, image: RegisterImage, fault: Fault) -> bytes:
        if frame[0] != self._device_id or fault is Fault.SILENT:
            return b""
        if fault is Fault.GARBAGE:
            return _GARBAGE
        answer = with_crc(frame[:1] + answer_pdu(frame[1:-2], image, short=fault is Fault.SHORT))
        if fault is Fault.WRONG_CHECKSUM:
            return answer[:-1] + bytes((answer[-1] ^ 0xFF,))
        held, self._held = self._held, answer if fault is Fault.LATE else None
        if fault is Fault.LATE:
            return held or b""
        return (held or b"") + answer


class TcpServer:
    """One connection to a device, or to a gateway in front of it. Feed it what arrives; it returns what goes back."""

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id
        self._received = b""
        self._held: bytes | None = None

    def receive(self, data: bytes, image: RegisterImage, fault: Fault = Fault.NONE) -> bytes:
        """Take bytes of the stream and return the answers to the requests that they complete.

        Raises ValueError for what is no Modbus TCP; a device closes the connection then.
        """
        self._received += data
        answers = []
        while len(self._received) >= MBAP_BYTES:
            protocol, length = int.from_bytes(self._received[2:4], "big"), int.from_bytes(self._received[4:6], "big")
            if protocol != 0 or not 2 <= length <= MAX_TCP_FRAME_BYTES - 6:
                raise ValueError("expected an MBAP header with protocol 0 and a length of 2 to 254")
            if len(self._received) < 6 + length:
                break
            frame, self._received = self._received[: 6 + length], self._received[6 + length :]
            answers.append(self._answer(frame, image, fault))
        return b"".join(answers)

    def _answer(self, frame: bytes, image: RegisterImage, fault: Fault) -> bytes:
        transaction, unit, request = frame[0:2], frame[6], frame[7:]
        if fault is Fault.SILENT:
            return b""
        if fault is Fault.GARBAGE:
            return _GARBAGE
        if fault is Fault.WRONG_CHECKSUM:
            transaction = bytes((transaction[0] ^ 0xFF, transaction[1]))
        if unit != self._device_id:
            pdu = bytes((request[0] | 0x80, GATEWAY_TARGET_FAILED))
        else:
            pdu = answer_pdu(request, image, short=fault is Fault.SHORT)
        answer = transaction + b"\0\0" + (1 + len(pdu)).to_bytes(2, "big") + bytes((unit,)) + pdu
        held, self._held = self._held, answer if fault is Fault.LATE else None
        if fault is Fault.LATE:
            return held or b""
        return (held or b"") + answer
