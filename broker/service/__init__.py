"""The running broker: what it keeps (`store`), what it does with each message and at each gate (`intake`, `cycle`,
`neighbours`, put together in `core`), and the event loop around it (`run`).
"""
