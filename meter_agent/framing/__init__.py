"""Framing of the protocols that push bytes at us: bytes in, whole messages out. Pure: no port, no clock."""
