"""The published test harness: real servers, real processes, and meters that are simulated only at the wire.

`plugin.py` is a pytest plugin that comes with the installed package, so that anybody can test their own gateway or
broker against ours; docs/testing.md shows how. The pieces work without pytest too (the demo uses them):

- `mosquitto.py`: a real mosquitto on a free port, that can be killed and started again
- `wire/`: meters that speak Modbus TCP, Modbus RTU and DSMR P1, written from the manuals; a street moves them
- `conductor.py`: ticks simulated calendar time when everybody has done the work of the last tick
- `processes.py`: agents, brokers and streets as processes of their own
- `certificates.py`: certificates for TLS, made at run time
- `listener.py`: waits for messages on MQTT
- `waiting.py`: waits for a condition, with a limit
"""
