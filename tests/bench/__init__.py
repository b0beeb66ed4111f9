"""The benchmarks behind `make bench`: real processes on a real mosquitto, measured from outside.

`run.py` runs all parts and writes `bench-out/bench.json` and a table. Each part is a module with a function that
returns its figures: `hot_path`, `growth`, `fleet`, `neighbour`, `ledger`, `network`, `start`, `agent`. What they share:
`world` (a broker with as many consumers as wanted, and the conductor's hand), `load` (a process of meters), `floor`
(the bare loop that the hot path is held against) and `processes` (CPU time and memory of a process, read from /proc).
`sampler` shows where a program spends its time.
"""
