"""Commits of a real CometBFT network of four validators, checked by our own code; and everything that must not pass.

`vectors/cometbft_commits.json` holds answers of v0.38.25: one commit that all signed, and one of a second round while
a validator was down.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.ledger.commit import (
    hash_header,
    read_validators,
    validator,
    validators_hash,
    verify_commit,
)
from broker.ledger.receipts import ProofFailed
from broker.protocol.errors import MalformedMessage, ProtocolError

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "vectors" / "cometbft_commits.json").read_text())
CHAIN = VECTORS["chain_id"]
SAMPLES = ("all_signed", "one_absent")


def commit_of(sample: str) -> dict[str, Any]:
    return copy.deepcopy(VECTORS[sample]["commit"])


def validators_of(sample: str) -> Any:
    return read_validators(json.dumps(VECTORS[sample]["validators"]))


@pytest.mark.parametrize(("sample", "height", "power"), [("all_signed", 31, 4), ("one_absent", 37, 3)])
def test_a_commit_of_a_real_network_holds(sample: str, height: int, power: int) -> None:
    commit = commit_of(sample)
    header = commit["signed_header"]["header"]
    certified = verify_commit(json.dumps(commit), validators_of(sample), CHAIN)
    assert (certified.chain_id, certified.signed_power, certified.total_power) == (CHAIN, power, 4)
    assert certified.height == height
    assert certified.app_hash.hex().upper() == header["app_hash"]
    assert certified.header_hash.hex().upper() == commit["signed_header"]["commit"]["block_id"]["hash"]
    assert validators_hash(validators_of(sample)) == certified.next_validators_hash
    # As the RPC wraps it, it is the same.
    assert verify_commit(json.dumps({"jsonrpc": "2.0", "result": commit}), validators_of(sample), CHAIN) == certified


def test_a_commit_of_another_chain_fails() -> None:
    raw = json.dumps(commit_of("all_signed"))
    with pytest.raises(ProofFailed, match="is of chain 'chain-ZdQFvg', not of another"):
        verify_commit(raw, validators_of("all_signed"), "another")
    # Renaming the chain in the header changes its hash, and the votes name the chain as well.
    renamed = raw.replace(CHAIN, "another")
    with pytest.raises(ProofFailed, match="the header was changed"):
        verify_commit(renamed, validators_of("all_signed"), "another")
    changed = json.loads(renamed)
    signed = changed["signed_header"]
    signed["commit"]["block_id"]["hash"] = hash_header(signed["header"]).hex()
    with pytest.raises(ProofFailed, match="does not verify"):
        verify_commit(json.dumps(changed), validators_of("all_signed"), "another")


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_field_of_the_header_is_under_the_signatures(sample: str) -> None:
    for name, value in commit_of(sample)["signed_header"]["header"].items():
        commit = commit_of(sample)
        header = commit["signed_header"]["header"]
        if isinstance(value, dict):
            if name == "version":
                header[name]["block"] = "12"
            else:
                header[name]["parts"]["total"] += 1
        elif name == "height":
            header[name] = str(int(value) + 1)
        elif name == "time":
            header[name] = value.replace("2026", "2027")
        elif name == "chain_id":
            continue
        else:
            header[name] = ("1" if value[:1] == "0" else "0") + value[1:]
        with pytest.raises(ProofFailed):
            verify_commit(json.dumps(commit), validators_of(sample), CHAIN)


def test_two_of_four_are_too_few() -> None:
    """With one of four away three have signed, which is enough; two of four are not."""
    commit = commit_of("one_absent")
    signatures = commit["signed_header"]["commit"]["signatures"]
    signatures[1] = dict(signatures[0])
    with pytest.raises(ProofFailed, match="validators with 2 of 4 signed height 37; more than two thirds are needed"):
        verify_commit(json.dumps(commit), validators_of("one_absent"), CHAIN)
    signatures[1] = signatures[2] | {"block_id_flag": 3}
    with pytest.raises(ProofFailed, match="validators with 2 of 4 signed"):
        verify_commit(json.dumps(commit), validators_of("one_absent"), CHAIN)


def test_signatures_count_for_their_own_validator_only() -> None:
    def with_signatures(change: Callable[[list[Any]], None]) -> str:
        commit = commit_of("all_signed")
        change(commit["signed_header"]["commit"]["signatures"])
        return json.dumps(commit)

    def twice(signatures: list[Any]) -> None:
        signatures[0] = signatures[1]

    def another_time(signatures: list[Any]) -> None:
        signatures[0]["timestamp"] = "2026-11-22T12:00:00.5Z"

    def one_more(signatures: list[Any]) -> None:
        signatures.append(signatures[0])

    for change, reason in ((twice, "does not verify"), (another_time, "does not verify"), (one_more, "5 places for 4")):
        with pytest.raises(ProofFailed, match=reason):
            verify_commit(with_signatures(change), validators_of("all_signed"), CHAIN)


def test_only_the_trusted_set_counts() -> None:
    raw = json.dumps(commit_of("all_signed"))
    trusted = validators_of("all_signed")
    for other in (
        trusted[:3],
        tuple(reversed(trusted)),
        (validator(bytes(31) + b"\x01", 1), *trusted[1:]),
        (validator(trusted[0].raw_key, 2), *trusted[1:]),
    ):
        with pytest.raises(ProofFailed, match="another set of validators"):
            verify_commit(raw, other, CHAIN)
    for none in ((), (*trusted, trusted[0])):
        with pytest.raises(ProofFailed, match="is empty, too large, or names a validator twice"):
            verify_commit(raw, none, CHAIN)


def test_what_is_no_answer_of_a_node_is_refused() -> None:
    for text in ("", "[]", "{", "null", '{"result": 1}', "[" * 2**20 + "[", '{"signed_header": {}}'):
        with pytest.raises(MalformedMessage):
            verify_commit(text, validators_of("all_signed"), CHAIN)
    for change in ({"validators": []}, {"total": "5"}, {"validators": [{}]}):
        with pytest.raises(MalformedMessage):
            read_validators(json.dumps(VECTORS["all_signed"]["validators"] | change))
    for path, value in (
        (("header", "height"), 22),
        (("header", "height"), "٢"),
        (("header", "height"), "9" * 19),
        (("header", "time"), "yesterday"),
        (("header", "time"), "2026-13-40T00:00:00Z"),
        (("header", "app_hash"), "zz"),
        (("header", "version"), None),
        (("commit", "round"), "0"),
        (("commit", "signatures"), [None] * 4),
    ):
        commit = commit_of("all_signed")
        commit["signed_header"][path[0]][path[1]] = value
        with pytest.raises(ProtocolError):
            verify_commit(json.dumps(commit), validators_of("all_signed"), CHAIN)
