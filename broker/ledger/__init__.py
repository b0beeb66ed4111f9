"""The ledger: who owns which watt-hours, in a record that nobody can quietly rewrite.

`rules` decides, over the rows of `state` and the values of `operations`; `chain` makes blocks of it; all of that is
pure. `embedded` is the engine over one SQLite file (`store`), `gateway` serves an engine over MQTT, `client` follows
one. `verify` re-derives a stored ledger from its genesis, `inspect` shows it.
"""
