"""Meters at the wire: they answer Modbus TCP and Modbus RTU requests and push DSMR P1 telegrams, as devices do.

Everything is written by hand from the manuals and standards that each module names. Nothing here imports the agent, its
meter profiles or a Modbus library, so a mistake in one of those cannot hide behind the same mistake here.

- `modbus.py`: frames and answers, pure
- `registers.py`: which value stands in which register of which meter, pure
- `dsmr.py`: the text of a P1 telegram, pure
- `curve.py`: energy over time, pure
- `faults.py`: the ways in which a meter may misbehave
- `devices.py`: sockets and pseudo-terminals around them
- `street.py`: a street of meters that follows the conductor; `config.py` reads its file
"""
