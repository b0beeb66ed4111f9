"""The agent on the gateway: meter registers → intervals → journal → signed readings and demands to the broker.

Start reading at `service.py` (the loop) and `intervals.py` (how registers become whole Wh per interval, pure).
`readings.py` is what readers and core agree on; `readers/` has one module for each meter protocol.
"""

from broker.protocol.lean_import import deferred

# Before anything else imports it: all dataclasses of the agent have docstrings, and need no `inspect`.
with deferred("inspect"):
    import dataclasses  # noqa: F401
