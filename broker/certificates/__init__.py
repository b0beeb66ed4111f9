"""Certificates: where a consumer's energy in a period came from, in a file that anybody checks offline.

document.py    the file: its fields, its bytes, the broker's signature       codes.py     technology codes, factors
contents.py    what it says: lines and totals, by integer arithmetic         evidence.py  operations rebuilt from it
verify.py      whether it is true, by the ledger's trust file alone          gather.py    made from store and ledger
index.py       where on a ledger it stands what they are made of              standing.py  what the ledger has of it now
energytag.py   the same as granular certificates for a registry              page.py      the same as a page to print
workers.py     verified on all processors
"""
