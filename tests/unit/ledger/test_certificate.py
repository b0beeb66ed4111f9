"""Certificates of a network: what its validators' votes prove, and everything that must not pass.

Votes are made here with the validators' keys as CometBFT makes them; `test_network_certificate` has real ones.
"""

import json
from dataclasses import replace
from hashlib import sha256
from typing import Any

import cbor2
import pytest
from support.ledger_world import LEDGER, genesis, key, set_validator
from support.schema import require

from broker.ledger.certificate import Certificate, chain_id_of
from broker.ledger.chain import genesis_hash
from broker.ledger.cometbft.home import chain_id
from broker.ledger.commit import APP_HASH, VALIDATORS_HASH, BlockId, Header, validator, validators_hash, vote_sign_bytes
from broker.ledger.operations import encode_operation
from broker.ledger.receipts import ProofFailed
from broker.ledger.rows_digest import app_hash_of
from broker.ledger.trust import Trust, read_trust, trust_of
from broker.protocol.errors import MalformedMessage, ProtocolError
from broker.protocol.messages import NamedKey

NAMES = ("v1", "v2", "v3", "v4")


def founded(*names: str, **changes: Any) -> Any:
    return genesis(validators=tuple(NamedKey(name, key(name).public.cose_key) for name in names), **changes)


NETWORK = founded(*NAMES)
BLOCK_ID, ROWS = b"b" * 32, b"d" * 32


def trust(of: Any = NETWORK) -> Trust:
    return read_trust(json.dumps(trust_of(of)))


def raw_key(name: str) -> bytes:
    return key(name).public.ed25519_bytes()


def certificate(
    voters: tuple[str, ...] = NAMES,
    powers: dict[str, int] | None = None,
    of: Any = NETWORK,
    changes: tuple[bytes, ...] = (),
    app_hash: bytes | None = None,
) -> Certificate:
    """What `voters` of the set `powers` (by default those of NETWORK) sign for BLOCK_ID and ROWS."""
    powers = powers or dict.fromkeys(NAMES, 1)
    ordered = sorted(powers.items(), key=lambda item: (-item[1], sha256(raw_key(item[0])).digest()[:20]))
    validators = [validator(raw_key(name), power) for name, power in ordered]
    hashes = [bytes((number,)) * 32 for number in range(9)]
    hashes[VALIDATORS_HASH] = validators_hash(validators)
    hashes[APP_HASH] = app_hash_of(BLOCK_ID, ROWS) if app_hash is None else app_hash
    chain = chain_id(of)
    header = Header(11, 1, chain, 7, (1_700_000_000, 5), BlockId(b"l" * 32, 1, b"p" * 32), tuple(hashes))
    certified = BlockId(header.hash, 1, b"q" * 32)
    votes = []
    for place, (name, _) in enumerate(ordered):
        if name in voters:
            time = (1_700_000_000, place)
            votes.append((place, time, key(name).sign(vote_sign_bytes(chain, 7, 0, certified, time))))
    members = tuple((raw_key(name), power) for name, power in ordered)
    return Certificate(of.ledger, BLOCK_ID, ROWS, header, 0, certified, tuple(votes), members, changes)


def test_more_than_two_thirds_stand_for_a_block() -> None:
    for voters, power in ((NAMES, 4), (NAMES[:3], 3)):
        made = certificate(voters)
        found = made.check(trust())
        assert (found.signed_power, found.total_power, found.height) == (power, 4, 7)
        assert Certificate.from_bytes(made.to_bytes()) == made
        require("certificate", made.to_bytes(), "certificate")
    assert chain_id_of(LEDGER, genesis_hash(NETWORK)) == chain_id(NETWORK)


def test_too_few_votes_prove_nothing() -> None:
    with pytest.raises(ProofFailed, match="validators with 2 of 4 signed"):
        certificate(NAMES[:2]).check(trust())
    # By power, not by heads.
    heavy = replace(trust(), now=replace_powers({"v1": 9}))
    powers = dict.fromkeys(NAMES, 1) | {"v1": 9}
    assert certificate(("v1",), powers).check(heavy).signed_power == 9
    with pytest.raises(ProofFailed, match="validators with 3 of 12 signed"):
        certificate(NAMES[1:], powers).check(heavy)


def replace_powers(powers: dict[str, int]) -> Any:
    now = trust().now
    return now._replace(validators=tuple(each._replace(power=powers.get(each.name, 1)) for each in now.validators))


def test_altered_votes_and_headers_fail() -> None:
    made = certificate(NAMES[:3])
    (place, time, signature), *others = made.votes
    altered = signature[:-1] + bytes((signature[-1] ^ 1,))
    free = ({0, 1, 2, 3} - {vote[0] for vote in made.votes}).pop()
    for changed, reason in (
        ({"votes": ((place, time, altered), *others)}, "does not verify"),
        ({"votes": ((place, (time[0], time[1] + 9), signature), *others)}, "does not verify"),
        ({"votes": tuple(sorted([(free, time, signature), *others]))}, "does not verify"),
        ({"votes": (made.votes[0], made.votes[0], *others)}, "stands twice"),
        ({"votes": tuple(reversed(made.votes))}, "out of order"),
        ({"votes": (*made.votes[:2], (9, time, signature))}, "is of nobody"),
        ({"round": 1}, "does not verify"),
        ({"certified": made.certified._replace(parts=2)}, "does not verify"),
        ({"certified": made.certified._replace(hash=b"x" * 32)}, "the header was changed"),
        ({"header": made.header._replace(height=8)}, "the header was changed"),
        ({"block_id": b"x" * 32}, "another block or other rows"),
        ({"rows_digest": b"x" * 32}, "another block or other rows"),
    ):
        with pytest.raises(ProofFailed, match=reason):
            replace(made, **changed).check(trust())
    with pytest.raises(ProofFailed, match="another block or other rows"):
        certificate(app_hash=b"a" * 32).check(trust())


def test_a_certificate_of_another_ledger_fails() -> None:
    made = certificate()
    with pytest.raises(ProofFailed, match="a certificate of ledger"):
        made.check(trust(founded(*NAMES, ledger="another")))
    # The same name and validators, founded anew.
    with pytest.raises(ProofFailed, match="the commit is of chain"):
        made.check(trust(founded(*NAMES, currency="GBP")))


def test_only_the_trusted_set_counts_or_what_registrars_made_of_it() -> None:
    others = ("w1", "w2", "w3", "w4")
    forged = certificate(others, dict.fromkeys(others, 1))
    with pytest.raises(ProofFailed, match="does not name"):
        forged.check(trust())
    with pytest.raises(ProofFailed, match="does not name"):
        certificate(NAMES[:3], dict.fromkeys(NAMES[:3], 1)).check(trust())
    made = certificate()
    with pytest.raises(ProofFailed, match="another set of validators"):
        replace(made, validators=tuple(reversed(made.validators))).check(trust())
    five = (*NAMES, "v5")
    change = encode_operation(set_validator("v5", 1))
    grown = certificate(five[1:], dict.fromkeys(five, 1), changes=(change,))
    assert grown.check(trust()).total_power == 5
    with pytest.raises(ProofFailed, match="does not name"):
        replace(grown, changes=()).check(trust())
    with pytest.raises(ProtocolError):
        replace(grown, changes=(encode_operation(set_validator("v5", 1, by=("v1",))),)).check(trust())
    # An old set proves nothing to whom trusts the new one.
    newer = read_trust(json.dumps(trust_of(NETWORK, trust_after(change), 12)))
    assert grown.check(newer).signed_power == 4
    with pytest.raises(ProofFailed, match="does not name"):
        certificate().check(newer)


def trust_after(*changes: bytes) -> Any:
    from broker.ledger.validator_set import sets_after

    return sets_after(trust().now, changes, LEDGER, trust().registrars)[-1]


def test_registrars_alone_cannot_make_a_history() -> None:
    """Where hardly anybody is left whom the trust file names, registrars could have made up the rest."""
    one = founded("v1")
    changes = tuple(
        encode_operation(operation)
        for operation in (set_validator("w1", 2), set_validator("w2", 2, 2), set_validator("w3", 1, 3))
    )
    made = certificate(("w1", "w2", "w3"), {"v1": 1, "w1": 2, "w2": 2, "w3": 1}, one, changes)
    with pytest.raises(ProofFailed, match="more than a third must"):
        made.check(trust(one))
    with_old = certificate(("v1", "w1", "w2"), {"v1": 1, "w1": 2, "w2": 2, "w3": 1}, one, changes)
    assert with_old.check(trust(one)).signed_power == 5


def test_bytes_that_are_no_certificate_are_refused() -> None:
    raw = certificate().to_bytes()
    for broken in (b"", raw[:-1], raw + b"\x00", b"\xa0", cbor2.dumps({0: 4}, canonical=True)):
        with pytest.raises(MalformedMessage):
            Certificate.from_bytes(broken)
    for byte in range(0, len(raw), 7):
        for bit in (1, 128):
            flipped = raw[:byte] + bytes((raw[byte] ^ bit,)) + raw[byte + 1 :]
            with pytest.raises(ProtocolError):
                Certificate.from_bytes(flipped).check(trust())
