"""Operations become bytes and come back, and nothing else comes back."""

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ledger_world import asset, close, deliver, issue, register, sell

from broker.ledger.operations import (
    Admit,
    AssetId,
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    DeliveredSlice,
    EndMandate,
    Issue,
    MandateOp,
    Operation,
    OperationCode,
    Register,
    ReturnedSlice,
    RevokeKey,
    RotateKey,
    SetValidator,
    Transfer,
    Void,
    Window,
    decode_operation,
    encode_operation,
    operation_code,
)
from broker.protocol.errors import MalformedMessage
from broker.protocol.messages import Carrier

names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
numbers = st.integers(0, 2**53 - 1)
statements = st.binary(min_size=1, max_size=1_024)
revisions = st.integers(0, 65_535)
asset_ids = st.builds(AssetId, names, st.just(Carrier.ELECTRICITY), numbers, revisions)
hashes = st.binary(min_size=32, max_size=32)
pseudonyms = st.binary(min_size=16, max_size=16)
slices = st.builds(DeliveredSlice, asset_ids, numbers, numbers, st.integers(0, 255))
returned = st.builds(ReturnedSlice, asset_ids, numbers, numbers, numbers)
any_operation: st.SearchStrategy[Operation] = st.one_of(
    *(
        st.builds(kind, statements)
        for kind in (Register, Admit, MandateOp, EndMandate, Issue, Correct, RotateKey, RevokeKey)
    ),
    st.builds(Transfer, asset_ids, numbers, numbers, names, names, numbers, st.none() | statements),
    st.builds(
        Deliver,
        pseudonyms,
        numbers,
        numbers,
        st.sampled_from(Window),
        names,
        numbers,
        hashes,
        st.lists(slices, max_size=5).map(tuple),
    ),
    st.builds(Close, numbers, numbers, revisions, numbers, numbers, hashes),
    st.builds(Void, pseudonyms),
    st.builds(
        CorrectDemand, pseudonyms, numbers, revisions, numbers, hashes, st.lists(returned, max_size=5).map(tuple)
    ),
    st.builds(SetValidator, st.lists(statements, min_size=1, max_size=16).map(tuple)),
)


@given(any_operation)
def test_operations_come_back_as_they_were(operation: Operation) -> None:
    raw = encode_operation(operation)
    assert decode_operation(raw) == operation
    assert encode_operation(decode_operation(raw)) == raw
    assert operation_code(raw) == raw[1]


@given(any_operation, st.data())
def test_changed_bytes_are_refused_or_are_another_operation(operation: Operation, data: st.DataObject) -> None:
    raw = bytearray(encode_operation(operation))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        changed = decode_operation(bytes(raw))
    except MalformedMessage:
        return
    assert encode_operation(changed) == bytes(raw)
    assert changed != operation


@pytest.mark.parametrize(
    ("data", "names_the_field"),
    [
        ([6, [["d", 0, 0, 0], -1, 2, "a", "b", 0, None]], "transfer.from_wh"),
        ([6, [["d", 0, 0, 0], 1, 2, "A", "b", 0, None]], "transfer.sender"),
        ([6, [["D", 0, 0, 0], 1, 2, "a", "b", 0, None]], "asset"),
        ([6, [["d", [], 0, 0], 1, 2, "a", "b", 0, None]], "transfer.asset"),
        ([6, [["d", False, 0, 0], 1, 2, "a", "b", 0, None]], "transfer.asset"),
        ([7, [b"p" * 15, 0, 1, 0, "n", 5, b"c" * 32, []]], "deliver.pseudonym"),
        ([7, [b"p" * 16, 0, 1, 3, "n", 5, b"c" * 32, []]], "deliver.window"),
        ([7, [b"p" * 16, 0, 1, 0, "n", 5, b"c" * 32, [["d", 0, 0, 0, 1, 2, 256]]]], "deliver.slices"),
        ([7, [b"p" * 16, 0, 1, 0, "n", True, b"c" * 32, []]], "deliver.demanded_wh"),
        ([7, [b"p" * 16, 0, 1, 0, "n", 5.0, b"c" * 32, []]], "deliver.demanded_wh"),
        ([9, [b"o" * 16, 1]], "void"),
        ([11, [b"p" * 16, 0, 1, 5, b"c" * 32, [["d", 0, 0, 0, 0, 2]]]], "correct_demand.returned"),
        ([11, [b"p" * 16, 0, 1, 5, b"c" * 32, [["d", 0, 0, 0, 0, -1, 2]]]], "correct_demand.returned"),
        ([11, [b"p" * 16, 0, 65_536, 5, b"c" * 32, []]], "correct_demand.revision"),
        ([14, [[]]], "set_validator.statements"),
        ([14, [[b"s"] * 17]], "set_validator.statements"),
        ([15, [b"o" * 16]], "operation"),
        ([True, [b"s"]], "operation"),
        ({}, "operation"),
    ],
)
def test_what_is_wrong_is_named(data: object, names_the_field: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode_operation(cbor2.dumps(data))
    assert caught.value.where == names_the_field


def test_other_encodings_of_the_same_values_are_refused() -> None:
    raw = encode_operation(Void(b"o" * 16))
    assert decode_operation(raw) == Void(b"o" * 16)
    for other in (raw + b"\x00", raw.replace(b"\x50", b"\x58\x10"), b"\x9f" + raw[1:] + b"\xff"):
        with pytest.raises(MalformedMessage):
            decode_operation(other)


def test_codes_are_seen_without_decoding() -> None:
    assert operation_code(encode_operation(deliver(1, 5))) == OperationCode.DELIVER
    assert operation_code(encode_operation(sell("solar-1", 0, 1, None))) == OperationCode.TRANSFER
    assert operation_code(b"") == operation_code(b"\x83\x01") == -1


def test_equal_assets_hash_alike() -> None:
    assert hash(asset("solar-1")) == hash(asset("solar-1"))
    assert asset("solar-1") != AssetId("solar-1", Carrier.ELECTRICITY, asset("solar-1").start_s, 1)
    assert {register("b1"), issue("solar-1", 1), close()} == {close(), issue("solar-1", 1), register("b1")}
