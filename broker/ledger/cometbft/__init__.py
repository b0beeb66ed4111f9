"""The ledger on a CometBFT network: the same rules as an ABCI application, driven by CometBFT v0.38 over a unix socket.

`application` decides nothing by itself: it drives `chain.Step` as the embedded engine does, and writes at Commit only.
`server` is the shell around it. `protobuf`, `abci` and `framing` are the bytes between the two, all of them pure.

Nothing imports this package unless a command or config asks for a network.
"""
