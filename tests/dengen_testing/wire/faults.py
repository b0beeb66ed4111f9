"""The ways in which a wire-level meter may misbehave, as meters in the field do."""

from enum import Enum


class Fault(Enum):
    """What a meter does with its next answers, until it is set back to NONE."""

    NONE = "none"
    SILENT = "silent"
    """It does not answer, or pushes nothing."""
    GARBAGE = "garbage"
    """It sends bytes that are no frame."""
    WRONG_CHECKSUM = "wrong_checksum"
    """RTU and P1: the CRC is wrong. Modbus TCP, which has none: the answer carries another transaction id."""
    SHORT = "short"
    """Modbus: one register fewer than asked for, in a frame that is otherwise right. P1: the telegram breaks off."""
    LATE = "late"
    """Modbus: an answer is held back until the next request comes, and sent first. P1: no telegram but the last one."""
