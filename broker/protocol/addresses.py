"""Hosts, ports and topics as configs and command lines name them: rules for `Annotated`, and for arguments.

What does not pass here cannot be looked up either, and the libraries below say so each in another way.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

MAX_PORT: Final = 65_535
MAX_TOPIC_BYTES: Final = 200

_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST: Final = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}(?:\.{_LABEL})*\.?|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*)")
_TOPIC: Final = re.compile(r"[^+#$/\x00-\x1f]+(?:/[^+#$/\x00-\x1f]+)*")
_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]*)):([0-9]{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Host:
    """A name (in ASCII, up to 253 characters) or an address, IPv6 without brackets; no port."""

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        if _HOST.fullmatch(value):
            return None
        return f"the name or address of a host, without a port, got {value[:60]!r}"


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port that can be connected to."""

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        return None if 0 < value <= MAX_PORT else f"a port from 1 to {MAX_PORT}, got {value}"


@dataclass(frozen=True, slots=True)
class Seconds:
    """Whole seconds as MQTT carries them in two bytes, at least one."""

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        return None if 0 < value <= MAX_PORT else f"seconds from 1 to {MAX_PORT}, got {value}"


@dataclass(frozen=True, slots=True)
class Topic:
    """The beginning of topics: levels with `/` between them, none empty, without what MQTT gives a meaning."""

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        if _TOPIC.fullmatch(value) and len(value.encode()) <= MAX_TOPIC_BYTES:
            return None
        return f"a topic of up to {MAX_TOPIC_BYTES} bytes as `dengen/v1`, without + # $, got {value[:60]!r}"


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT, IPv6 in brackets; to listen the host may be left out (all interfaces) and the port be 0 (any)."""

    def check(self, value: Any) -> str | None:
        """None if `value` is fine, else what was expected."""
        match = _ADDRESS.fullmatch(value)
        if match is not None and int(match[3]) <= MAX_PORT:
            host = match[1] or match[2]
            if not host or _HOST.fullmatch(host):
                return None
        return f"HOST:PORT, got {value[:60]!r}"
