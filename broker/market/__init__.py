"""The market: contracts, the mix decision, clearing, stock, and what brokers say to each other about energy.

`contracts` says what a consumer asked for, `mix` decides which line the next Wh belong to, `clearing` fills the lines
from what there is, `stock` keeps the broker's own slices in order, `sourcing` runs the conversation with neighbours.
Everything is pure and in integers: the same input gives the same output, on every machine and in any order of arrival.
"""
