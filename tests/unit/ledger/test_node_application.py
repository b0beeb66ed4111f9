"""The ABCI application without a socket: what it answers, what it writes and when, and that all nodes agree."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.comet_driver import block, init_chain_request
from support.ledger_world import (
    GENESIS,
    LEDGER,
    SET_UP,
    T0,
    batch,
    close,
    deliver,
    found,
    issue,
    key,
    order,
    register,
    revoke,
    seal,
    set_validator,
    take,
)
from support.node import NETWORK, NODES, Node

from broker.ledger.admitted import decode_admitted
from broker.ledger.chain import block_id_of
from broker.ledger.cometbft import abci, application
from broker.ledger.cometbft.application import (
    ApplicationStopped,
    NodeApplication,
    TxCode,
    consensus_key,
)
from broker.ledger.holding import decode_holding
from broker.ledger.limits import MAX_BLOCK_BATCHES
from broker.ledger.operations import SetValidator, Void
from broker.ledger.proofs import read_proof
from broker.ledger.receipts import verify_consistency_receipt
from broker.ledger.rows_digest import NO_DIGEST, app_hash_of, bucket_digests, rows_digest
from broker.ledger.state import TOTAL, encode_key
from broker.ledger.store import LedgerError
from broker.ledger.trust import read_trust, trust_of
from broker.ledger.verify import verify_ledger
from broker.protocol import cbor, envelope
from broker.protocol.keys import Algorithm, generate_private_key
from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.messages import QueryKind
from broker.protocol.sources import Source


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "node")
    node.init_chain()
    yield node
    node.application.close()


@pytest.fixture
def traded(node: Node) -> Node:
    node.make_block(*SET_UP)
    node.make_block(batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)))
    return node


def codes(response: abci.FinalizeBlockResponse) -> list[int]:
    return [result.code for result in response.tx_results]


def test_a_block_of_the_network_becomes_a_block_of_the_ledger(traded: Node) -> None:
    assert (traded.application.network_height, traded.application.head.height) == (2, 2)
    assert traded.query("/blocks", [1, 10_000_000])[0] == 2
    report = verify_ledger(traded.path)
    assert (report.errors, report.height, report.batches) == ((), 2, 3)


def test_every_node_agrees_and_seals_the_same_blocks_with_its_own_key(tmp_path: Path) -> None:
    nodes = [Node(tmp_path / name, name) for name in NODES]
    hashes = []
    for node in nodes:
        node.init_chain()
        hashes.append([node.make_block(*SET_UP).app_hash, node.make_block(batch(issue("solar-1", 9))).app_hash])
    assert hashes[0] == hashes[1] == hashes[2]
    copies = [node.query("/blocks", [1, 10_000_000])[1] for node in nodes]
    assert copies[0][0] != copies[1][0]
    assert [block_id_of(raw) for raw in copies[0]] == [block_id_of(raw) for raw in copies[1]]
    for node in nodes:
        node.application.close()
        assert verify_ledger(node.path).ok


def test_the_result_is_that_of_the_embedded_engine(traded: Node, tmp_path: Path) -> None:
    embedded = found(tmp_path / "embedded", set_up=False)
    for raw in (*SET_UP, batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000))):
        embedded.submit(raw)
        embedded.commit()
    # The state hash begins with the genesis, which names other validators here; rows are what can be compared.
    rows = dict(embedded._store.state_rows())
    assert rows == dict(traded.application._store.state_rows())
    embedded.close()


def test_the_app_hash_changes_only_with_the_ledger(traded: Node) -> None:
    head = traded.application.head
    empty = traded.make_block()
    refused = traded.make_block(batch(take("solar-1", 0, 9)))
    assert empty.app_hash == refused.app_hash == app_hash_of(head.block_id, NO_DIGEST)
    assert traded.application.head == head
    assert traded.make_block(batch(Void(b"v" * 16))).app_hash != empty.app_hash


def test_what_the_rules_refuse_is_a_code_and_stays_out_of_the_block(traded: Node) -> None:
    good, bad = batch(deliver(1, 100, ("solar-1", 0, 100))), batch(take("solar-1", 0, 9))
    unknown = batch(Void(b"q" * 16), by="stranger")
    response = traded.make_block(bad, unknown, good, b"\x00", good)
    assert codes(response) == [
        TxCode.REFUSED,
        TxCode.UNKNOWN_SENDER,
        TxCode.APPLIED,
        TxCode.UNKNOWN_SENDER,
        TxCode.REFUSED,
    ]
    assert response.tx_results[0].data == cbor.encode([0, "not_held"])
    assert response.tx_results[4].data == cbor.encode([None, "already_applied"])
    assert response.tx_results[2].data == cbor.encode(3)
    (raw,) = traded.query("/blocks", [3, 10_000_000])[1]
    assert envelope.parse(raw).payload.count(good) == 1
    assert bad not in raw
    bad_id, good_id = (envelope.sealed_id(raw, LEDGER, "b1") for raw in (bad, good))
    assert traded.query("/result", bad_id)[:4] == [1, 3, 0, "not_held"]
    assert traded.query("/result", good_id) == [0, 3]
    assert traded.query("/result", b"x" * 32) is None


def test_a_batch_may_build_on_one_of_the_same_block(node: Node) -> None:
    first = batch(register("b3"), by="b3")
    second = batch(Void(b"v" * 16), by="b3")
    assert codes(node.make_block(first, second)) == [TxCode.APPLIED, TxCode.APPLIED]


def test_check_tx_knows_signers_and_nothing_of_the_rules(traded: Node) -> None:
    def check(raw: bytes, kind: abci.CheckType = abci.CheckType.NEW) -> int:
        code: int = traded.ask(abci.CheckTxRequest(raw, kind)).code
        return code

    late = batch(take("solar-1", 0, 9))
    assert check(late) == check(late, abci.CheckType.RECHECK) == TxCode.APPLIED
    assert check(late[:-1] + bytes((late[-1] ^ 1,))) == TxCode.UNKNOWN_SENDER
    assert check(batch(Void(b"v" * 16), by="stranger")) == TxCode.UNKNOWN_SENDER
    assert check(seal(order(), "b2")) == TxCode.UNKNOWN_SENDER
    introduction = batch(register("b3"), by="b3")
    assert check(introduction) == check(introduction, abci.CheckType.RECHECK) == TxCode.APPLIED
    assert check(SET_UP[1]) == check(SET_UP[1], abci.CheckType.RECHECK) == TxCode.COMMITTED_BEFORE


def test_what_passed_check_tx_is_judged_in_its_block_as_if_it_had_not(traded: Node, tmp_path: Path) -> None:
    """The mempool of a node is its own affair: one that has seen a batch before must not answer otherwise."""
    late = batch(Void(b"w" * 16), by="b2")
    txs = (batch(Void(b"v" * 16)), batch(revoke("b2")), late)
    other = Node(tmp_path / "other", "node-2")
    other.init_chain()
    other.make_block(*SET_UP)
    other.make_block(batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)))
    for raw in txs:
        assert traded.ask(abci.CheckTxRequest(raw)).code == TxCode.APPLIED
    response = traded.make_block(*txs)
    assert codes(response) == [TxCode.APPLIED, TxCode.APPLIED, TxCode.UNKNOWN_SENDER]
    assert other.make_block(*txs) == response
    other.application.close()


def test_batches_that_wait_for_their_block_take_bounded_memory(traded: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [batch(Void(bytes((number,)) * 16)) for number in range(10)]
    monkeypatch.setattr(application, "MAX_CHECKED_BYTES", 3 * len(waiting[0]))
    for raw in waiting * 2:
        traded.ask(abci.CheckTxRequest(raw))
    assert list(traded.application._checked._batches) == waiting[-3:]
    assert codes(traded.make_block(*waiting)) == [TxCode.APPLIED] * 10
    assert traded.application._checked._bytes == 0


def test_a_proposal_holds_batches_only_and_fits_the_ledger_block(traded: Node) -> None:
    first, second = batch(Void(b"v" * 16)), batch(Void(b"w" * 16))

    def prepared(most: int, *txs: bytes) -> tuple[bytes, ...]:
        found: tuple[bytes, ...] = traded.ask(abci.PrepareProposalRequest(most, txs)).txs
        return found

    assert prepared(10_000_000, second, b"nothing", first) == (second, first)
    assert prepared(len(second) + 10, second, first) == (second,)
    assert len(prepared(10_000_000, *[first] * (MAX_BLOCK_BATCHES + 1))) == MAX_BLOCK_BATCHES

    def processed(*txs: bytes) -> int:
        status: int = traded.ask(abci.ProcessProposalRequest(txs)).status
        return status

    assert processed() == processed(first, batch(take("solar-1", 0, 9))) == abci.ProposalStatus.ACCEPT
    assert processed(first, b"nothing") == abci.ProposalStatus.REJECT
    assert processed(seal(order(), "b2")) == abci.ProposalStatus.REJECT
    assert processed(*[first] * (MAX_BLOCK_BATCHES + 1)) == abci.ProposalStatus.REJECT


def test_a_block_that_is_too_large_all_the_same_fills_one_ledger_block(traded: Node) -> None:
    large = [batch(*(Void(bytes((n, i >> 8, i & 255)) + bytes(13)) for i in range(4_000))) for n in range(30)]
    assert sum(len(raw) for raw in large) > MAX_BLOCK_BYTES
    answers = codes(traded.make_block(*large))
    assert set(answers) == {TxCode.APPLIED, TxCode.BLOCK_FULL}
    assert traded.application.head.height == 3
    assert len(traded.query("/blocks", [3, 1])[1][0]) <= MAX_BLOCK_BYTES


def test_nothing_is_written_before_commit(traded: Node) -> None:
    head = traded.application.head
    raw = batch(Void(b"v" * 16))
    response = traded.ask(block(3, raw))
    assert traded.application.head == head
    assert traded.query("/result", envelope.sealed_id(raw, LEDGER, "b1")) is None
    traded.restart()
    assert (traded.application.head, traded.application.network_height) == (head, 2)
    assert traded.ask(block(3, raw)) == response
    traded.ask(abci.CommitRequest())
    traded.restart()
    assert traded.application.network_height == 3
    assert traded.ask(abci.InfoRequest()).last_block_app_hash == response.app_hash


def test_a_block_is_carried_out_once_and_another_one_in_its_place_from_the_start(traded: Node) -> None:
    first, other = block(3, batch(Void(b"v" * 16))), block(3, batch(Void(b"w" * 16)))
    response = traded.ask(first)
    assert traded.ask(first) is response
    replaced = traded.ask(other)
    assert replaced.app_hash != response.app_hash
    traded.ask(abci.CommitRequest())
    assert traded.application.head.height == 3
    with pytest.raises(ApplicationStopped, match="has not handed in"):
        traded.ask(abci.CommitRequest())


@pytest.mark.parametrize("height", [2, 4])
def test_a_block_of_another_height_stops_the_node(traded: Node, height: int) -> None:
    with pytest.raises(ApplicationStopped, match=f"hands in block {height}"):
        traded.ask(block(height))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"app_state": b"{}"}, "app_state"),
        ({"app_state": b"no json"}, "app_state"),
        ({"app_state": init_chain_request(GENESIS).app_state}, "app_state"),
        ({"validators": ()}, "validators"),
        ({"validators": init_chain_request(GENESIS).validators}, "validators"),
        ({"validators": init_chain_request(NETWORK).validators[:1] * 3}, "validators"),
        ({"initial_height": 7}, "initial_height"),
    ],
)
def test_a_network_of_another_genesis_does_not_start(tmp_path: Path, changes: Any, complaint: str) -> None:
    node = Node(tmp_path)
    with pytest.raises(ApplicationStopped, match=complaint):
        node.ask(init_chain_request(NETWORK, **changes))
    assert node.ask(init_chain_request(NETWORK)).app_hash == app_hash_of(node.application.head.block_id, NO_DIGEST)
    assert node.ask(init_chain_request(NETWORK)).consensus_params.block.max_bytes == MAX_BLOCK_BYTES
    node.application.close()


def test_a_network_that_begins_anew_over_an_old_ledger_stops(traded: Node) -> None:
    with pytest.raises(ApplicationStopped, match="empty both"):
        traded.ask(init_chain_request(NETWORK))


def test_a_directory_of_the_embedded_engine_is_not_taken(tmp_path: Path) -> None:
    found(tmp_path).close()
    with pytest.raises(LedgerError, match="embedded engine"):
        NodeApplication(tmp_path, GENESIS, "node", key("node"))


def test_a_directory_has_one_process(traded: Node) -> None:
    with pytest.raises(LedgerError, match="in use"):
        NodeApplication(traded.path, NETWORK, "node", key("node"))


def test_damaged_progress_is_said(traded: Node, tmp_path: Path) -> None:
    traded.application._store._db.execute("UPDATE meta SET value = x'00' WHERE name = 'network'")
    traded.application._store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damaged = shutil.copytree(traded.path, tmp_path / "damaged")
    with pytest.raises(LedgerError, match="where the network stands"):
        NodeApplication(damaged, NETWORK, "node", key("node"))


def test_questions(traded: Node) -> None:
    height, entries, cursor = traded.query("/holdings", ["b1", None])
    (holding,) = [decode_holding(entry) for entry in entries]
    assert (height, holding.asset.start_s, holding.to_wh, cursor) == (2, T0, 1_000, None)
    assert traded.query("/signer", key("b2").public.key_id) == ["b2", key("b2").public.cose_key]
    assert traded.query("/signer", b"k" * 16) is None
    (admitted,) = traded.query("/device", ["solar-1"])
    assert decode_admitted(admitted).owner == "alice"
    assert traded.query("/device", ["solar-9"]) == []
    trust = read_trust(json.dumps(trust_of(NETWORK)))
    (proof,) = traded.query("/prove", [int(QueryKind.OPERATION), 0])
    assert read_proof(proof).check(trust)[0] == traded.application.head.checkpoint()
    newest, receipt = traded.query("/prove", [int(QueryKind.CONSISTENCY), traded.application.head.tree_size])
    root = traded.application.head.checkpoint().root
    assert verify_consistency_receipt(receipt, root, trust).root == root
    assert newest == traded.ask(abci.QueryRequest(path="/checkpoint")).value
    assert traded.query("/prove", [int(QueryKind.OPERATION), 9_999]) == []
    head, network_height, digest = traded.query("/head")
    assert (head, network_height, digest) == (traded.application.head.to_bytes(), 2, NO_DIGEST)
    assert traded.ask(abci.QueryRequest(path="/genesis")).value == NETWORK.to_bytes()
    signed = traded.ask(abci.QueryRequest(path="/checkpoint")).value
    signer = envelope.Signer("node", key("node").public)
    assert envelope.open_envelope(signed, LEDGER, lambda _: signer).message == traded.application.head.checkpoint()
    assert len(traded.query("/blocks", [1, 1])[1]) == 1
    for path, data in (("/nowhere", b""), ("/blocks", b""), ("/blocks", cbor.encode([0, 1])), ("/signer", b"\x40")):
        assert traded.ask(abci.QueryRequest(data, path)).code == 1
    assert traded.ask(abci.QueryRequest(cbor.encode(["b1", b"x"]), "/holdings")).code == 1
    assert traded.ask(abci.QueryRequest(cbor.encode(["no name"]), "/device")).code == 1


def test_only_ed25519_keys_are_validators_of_a_network() -> None:
    assert consensus_key(key("node").public.cose_key) == key("node")._key.public_key().public_bytes_raw()
    with pytest.raises(ValueError, match="Ed25519"):
        consensus_key(generate_private_key(Algorithm.ESP256).public.cose_key)


@pytest.mark.parametrize("every", [1, 3])
def test_the_rows_digest_of_a_snapshot_height_is_that_of_all_rows(tmp_path: Path, every: int) -> None:
    """Made from the buckets that have changed only, through restarts, and the same on a node that kept no digests."""
    kept, forgetful = Node(tmp_path / "kept", every=every), Node(tmp_path / "forgetful", every=every)
    blocks: list[tuple[bytes, ...]] = [SET_UP, (), (batch(issue("solar-1", 1_000), take("solar-1", 0, 1_000)),)]
    blocks += [(batch(deliver(n, 9, ("solar-1", 9 * n, 9 * n + 9))),) for n in range(3)]
    # The rest of the asset is delivered, so its row among those held goes away.
    blocks += [(), (batch(deliver(9, 973, ("solar-1", 27, 1_000))),), (batch(close()),), ()]
    for node in (kept, forgetful):
        node.init_chain()
    digest = NO_DIGEST
    for height, txs in enumerate(blocks, start=1):
        response = kept.make_block(*txs)
        assert codes(response) == [TxCode.APPLIED] * len(txs)
        assert forgetful.make_block(*txs) == response
        if height % every == 0:
            digest = rows_digest(bucket_digests(kept.application._store.state_rows()))
        assert response.app_hash == app_hash_of(kept.application.head.block_id, digest)
        assert kept.query("/head")[2] == digest
        forgetful.application._store._db.execute("DELETE FROM buckets")
        forgetful.restart()
        if height % 4 == 0:
            kept.restart()
    for node in (kept, forgetful):
        node.application.close()


def test_a_row_that_was_altered_on_disk_changes_the_app_hash_of_its_node(tmp_path: Path) -> None:
    honest, altered = Node(tmp_path / "honest", every=4), Node(tmp_path / "altered", every=4)
    for node in (honest, altered):
        node.init_chain()
        node.make_block(*SET_UP)
        node.make_block(batch(issue("solar-1", 1_000), issue("wind-1", 500)))
    damaged = encode_key((TOTAL, T0, int(Source.WIND)))
    altered.application._store._db.execute("UPDATE state SET value = x'80' WHERE key = ?", (damaged,))
    assert honest.make_block(batch(Void(b"v" * 16))) == altered.make_block(batch(Void(b"v" * 16)))
    assert honest.make_block().app_hash != altered.make_block().app_hash
    for node in (honest, altered):
        node.application.close()


def test_changed_validators_reach_the_network_in_the_block_that_changes_them(traded: Node) -> None:
    def update(name: str, power: int) -> abci.ValidatorUpdate:
        return abci.ValidatorUpdate(abci.PublicKey(consensus_key(key(name).public.cose_key)), power)

    def updates(*operations: SetValidator) -> set[abci.ValidatorUpdate]:
        response = traded.make_block(batch(*operations))
        assert codes(response) == [TxCode.APPLIED]
        found = response.validator_updates
        assert list(found) == sorted(found, key=lambda update: update.public_key.ed25519)
        return set(found)

    assert traded.make_block(batch(Void(b"v" * 16))).validator_updates == ()
    assert updates(set_validator("node-4", 1)) == {update("node-4", 1)}
    assert updates(set_validator("node-3", 0, 2)) == {update("node-3", 0)}
    # Another key is another validator to CometBFT.
    changed = updates(set_validator("node-2", 1, 3, validator_key="new-2"))
    assert changed == {update("node-2", 0), update("new-2", 1)}
    # Taken back in the same block, it was never there.
    assert updates(set_validator("node-5", 1, 4), set_validator("node-5", 0, 5)) == set()
    assert traded.make_block(batch(set_validator("node-6", 1, 9))).validator_updates == ()


def test_votes_carry_nothing_of_the_application(node: Node) -> None:
    assert node.ask(abci.ExtendVoteRequest()).vote_extension == b""
    assert node.ask(abci.VerifyVoteExtensionRequest()).status == abci.VoteStatus.ACCEPT
    assert node.ask(abci.VerifyVoteExtensionRequest(vote_extension=b"x")).status == abci.VoteStatus.REJECT
