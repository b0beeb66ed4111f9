"""The bytes between CometBFT and the application: those of CometBFT's own library, and anything else."""

import json
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.ledger.cometbft import abci, framing
from broker.ledger.cometbft.framing import FrameReader, framed
from broker.ledger.cometbft.protobuf import MalformedProtobuf, Message, encode_varint, read_varint, wrapped

VECTORS: Final = json.loads((Path(__file__).parents[2] / "vectors" / "abci.json").read_text())


def key(value: int) -> abci.PublicKey:
    return abci.PublicKey(bytes((value,)) * 32)


def fill(value: int, count: int = 32) -> bytes:
    return bytes((value,)) * count


SNAPSHOT = abci.Snapshot(1_000, 1, 3, fill(9), b"manifest")
REQUESTS: Final[dict[str, Message]] = {
    "echo": abci.EchoRequest("hallo"),
    "flush": abci.FlushRequest(),
    "info": abci.InfoRequest("0.38.25"),
    "init_chain": abci.InitChainRequest(
        "chain", (abci.ValidatorUpdate(key(1), 1), abci.ValidatorUpdate(key(2), 10)), b"{}", 1
    ),
    "init_chain_other_key": abci.InitChainRequest(validators=(abci.ValidatorUpdate(abci.PublicKey(), 1),)),
    "query": abci.QueryRequest(b"\x01\x02", "/head", 5, True),
    "check_tx": abci.CheckTxRequest(b"tx"),
    "recheck_tx": abci.CheckTxRequest(b"tx", abci.CheckType.RECHECK),
    "commit": abci.CommitRequest(),
    "list_snapshots": abci.ListSnapshotsRequest(),
    "offer_snapshot": abci.OfferSnapshotRequest(SNAPSHOT, fill(8)),
    "load_snapshot_chunk": abci.LoadSnapshotChunkRequest(1_000, 1, 2),
    "apply_snapshot_chunk": abci.ApplySnapshotChunkRequest(2, b"chunk", "peer"),
    "prepare_proposal": abci.PrepareProposalRequest(100, (b"a", b"", b"b"), 9),
    "process_proposal": abci.ProcessProposalRequest((b"a",), fill(6), 9),
    "extend_vote": abci.ExtendVoteRequest(fill(6), 9),
    "verify_vote_extension": abci.VerifyVoteExtensionRequest(fill(6), fill(5, 20), 9, b"x"),
    "finalize_block": abci.FinalizeBlockRequest((b"a", b"b"), fill(6), 1 << 40),
}
RESPONSES: Final[dict[str, Message]] = {
    "exception": abci.ExceptionResponse("wrong"),
    "echo": abci.EchoResponse("hallo"),
    "flush": abci.FlushResponse(),
    "info": abci.InfoResponse("ledger", "1", 1, 300, fill(7)),
    "init_chain": abci.InitChainResponse(
        abci.ConsensusParams(abci.BlockParams(2_097_152, -1), abci.VersionParams(1)),
        (abci.ValidatorUpdate(key(1), 1),),
        fill(7),
    ),
    "query": abci.QueryResponse(1, "no", b"k", b"v", 12),
    "check_tx": abci.CheckTxResponse(2, b"d", "why"),
    "commit": abci.CommitResponse(4),
    "list_snapshots": abci.ListSnapshotsResponse((SNAPSHOT, SNAPSHOT)),
    "offer_snapshot": abci.OfferSnapshotResponse(abci.OfferResult.REJECT),
    "load_snapshot_chunk": abci.LoadSnapshotChunkResponse(b"chunk"),
    "apply_snapshot_chunk": abci.ApplySnapshotChunkResponse(abci.ChunkResult.RETRY, (1, 300), ("peer",)),
    "prepare_proposal": abci.PrepareProposalResponse((b"a", b"")),
    "process_proposal": abci.ProcessProposalResponse(abci.ProposalStatus.REJECT),
    "extend_vote": abci.ExtendVoteResponse(b"x"),
    "verify_vote_extension": abci.VerifyVoteExtensionResponse(abci.VoteStatus.ACCEPT),
    "finalize_block": abci.FinalizeBlockResponse(
        (abci.TxResult(), abci.TxResult(1, b"d", "why")),
        (abci.ValidatorUpdate(key(1), 0), abci.ValidatorUpdate(key(2), -1)),
        fill(7),
    ),
}


def test_every_message_has_a_vector() -> None:
    assert REQUESTS.keys() == VECTORS["requests"].keys()
    assert RESPONSES.keys() == VECTORS["responses"].keys()


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_read_as_comet_writes_them(name: str) -> None:
    assert abci.decode_request(bytes.fromhex(VECTORS["requests"][name])) == REQUESTS[name]
    assert abci.decode_request(abci.encode_request(REQUESTS[name])) == REQUESTS[name]


@pytest.mark.parametrize("name", RESPONSES)
def test_responses_are_the_very_bytes_that_comet_would_write(name: str) -> None:
    raw = bytes.fromhex(VECTORS["responses"][name])
    assert abci.encode_response(RESPONSES[name]) == raw
    assert abci.decode_response(raw) == RESPONSES[name]


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "end inside"),
        (b"\x0a", "end inside"),
        (b"\x0a\x05a", "longer than its message"),
        (wrapped(4, b""), "does not have"),
        (wrapped(1, b"") + wrapped(2, b""), "exactly one"),
        (b"\x08\x01", "exactly one"),
        (wrapped(1, b"\x0b"), "wire type 3"),
        (wrapped(1, wrapped(1, b"\xff")), "UTF-8"),
        (wrapped(1, b"\x08\x01"), "another wire type"),
        (wrapped(8, b"\x12\x01a"), "another wire type"),
        (wrapped(8, b"\x10" + b"\xff" * 10), "more than 64 bits"),
        (wrapped(8, b"\x10" + b"\xff" * 9 + b"\x7f"), "more than 64 bits"),
        (wrapped(8, b"\x10" + b"\xff" * 3), "end inside"),
    ],
)
def test_what_is_no_request_is_refused(raw: bytes, complaint: str) -> None:
    with pytest.raises(MalformedProtobuf, match=complaint):
        abci.decode_request(raw)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_message_or_refused(raw: bytes) -> None:
    for number in range(1, 22):
        for decode in (abci.decode_request, abci.decode_response):
            try:
                decode(wrapped(number, raw))
            except MalformedProtobuf:
                continue


@given(st.integers(0, 2**64 - 1))
def test_numbers_come_back(value: int) -> None:
    raw = encode_varint(value)
    assert read_varint(raw, 0) == (value, len(raw))
    assert read_varint(raw[:-1], 0) is None


@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_frames_come_out_however_the_socket_cuts_them(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(framed(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader = FrameReader()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += list(reader.feed(stream[start:end]))
    assert found == messages


def test_a_frame_over_the_limit_is_refused_before_it_has_come() -> None:
    with pytest.raises(MalformedProtobuf, match="the most"):
        list(FrameReader().feed(encode_varint(framing.MAX_MESSAGE_BYTES + 1)))
    assert list(FrameReader().feed(encode_varint(framing.MAX_MESSAGE_BYTES))) == []
