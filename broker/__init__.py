"""The energy broker: decides which source each Wh comes from, and has the ledger say so.

Rooms: `protocol` (what everyone says to each other), `ledger` (rules, log, engines), `market` (contracts, mix decision,
clearing, stock, sourcing; pure), `service` (the running broker around them), `cli` (the command `energy-broker`).
"""
