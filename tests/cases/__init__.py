"""The eight cases that show what dengen is for, told as tests: DESIGN section 1 as things that happen.

| case | shows | file |
|---|---|---|
| 1 | a broker asks the ledger for all assets that it owns, and keeps itself current | test_own_assets.py |
| 2 | the source of the next Wh is decided from history and shares | test_mix.py |
| 3 | an owned, undelivered asset of that source goes from broker to consumer | test_own_assets.py |
| 4 | without one: three change requests, each of them refused, lost, repeated or late | test_change_requests.py |
| 5 | no neighbour has it either: the contract's choice, and the unmatched on record | test_mix.py |
| 6 | all sources; several in one contract; several devices of one provider | test_mix.py |
| 7 | two brokers, many, one on its own, and somebody else's program | test_many_brokers.py, test_foreign_broker.py |
| 8 | users, providers, contracts and history can be listed and exported | test_tables.py |
| – | after the gates: corrections, certificates, restored backups, a gateway that was away | test_afterwards.py |

Each runs on both ledger engines: `embedded` (one broker hosts the ledger) and `cometbft` (four validators keep it).
Brokers, ledger, nodes and MQTT server are processes of their own. The tests speak for the meters, and for the conductor
that says what time it is, so half an hour of the market passes as fast as everybody has done their work.

How a test goes (`marketplace.py` has every verb):

    anna = east.takes_on_consumer("anna", {"solar": 60, "wind": 40})
    roof = east.takes_on_device("roof", "solar")
    market.next_half_hour()                     # it has just ended
    roof.reports(900)
    anna.reports(500)                           # signed, over MQTT, until there is a receipt
    market.gate_1()                             # brokers clear their own stock and ask neighbours
    market.gate_2()                             # shortage choice, unmatched on record, close
    assert anna.got() == {"solar": 300}

One market serves all tests of a file; each test takes on meters of its own and uses a half hour of its own.
"""
