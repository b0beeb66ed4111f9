"""The published CDDL and AsyncAPI page say exactly what the codec does, and the traffic check sees what is wrong."""

import dataclasses
import re
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.messages import ALL_CLASSES, messages_of, payload_of, read_payload
from support.schema import (
    SCHEMA_FOLDER,
    SchemaError,
    asyncapi,
    cddl_text,
    follows,
    require,
    schema_check,
    validate_traffic,
)

from broker.ledger.admitted import Admitted, decode_admitted
from broker.ledger.holding import Holding, decode_holding, encode_holding
from broker.ledger.operations import (
    AssetId,
    Close,
    Correct,
    CorrectDemand,
    Deliver,
    DeliveredSlice,
    Issue,
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
)
from broker.protocol.envelope import seal
from broker.protocol.errors import MalformedMessage
from broker.protocol.keys import generate_private_key
from broker.protocol.limits import MAX_METER_MESSAGE_BYTES
from broker.protocol.messages import (
    MESSAGE_CLASSES,
    Batch,
    Block,
    Carrier,
    MessageType,
    Page,
    Quality,
    QueryKind,
    Reading,
    Report,
    Stage,
)
from broker.protocol.sources import Source
from broker.protocol.topics import Topics

READING = Reading("meter-1", 0, 1800, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
KEY = generate_private_key()
ASSET = AssetId("wind-1", Carrier.ELECTRICITY, 0, 0)


def rule_of(message_class: type[Any]) -> str:
    """MeterStatus -> meter-status: how the CDDL rules are named."""
    return re.sub(r"(?<!^)([A-Z])", r"-\1", message_class.__name__).lower()


@pytest.mark.parametrize("message_class", ALL_CLASSES, ids=rule_of)
@given(data=st.data())
def test_every_encoded_message_follows_its_cddl(message_class: type[Any], data: st.DataObject) -> None:
    payload = payload_of(data.draw(messages_of(message_class)))
    require(rule_of(message_class), payload, "message")


@pytest.mark.parametrize("message_class", ALL_CLASSES, ids=rule_of)
def test_another_cddl_implementation_takes_every_encoded_message_too(message_class: type[Any]) -> None:
    pycddl = pytest.importorskip("pycddl", reason="pycddl has no wheels for this machine")
    # RFC 8610 takes .regexp from XSD, where an expression covers the whole text; pycddl only searches.
    anchored = re.sub(r'(\.regexp ")([^"]*)(")', r"\1^(?:\2)$\3", cddl_text())
    schema = pycddl.Schema(f"first-rule = {rule_of(message_class)}\n" + anchored)

    @given(messages_of(message_class))
    def accepts(message: Any) -> None:
        schema.validate_cbor(payload_of(message))

    accepts()


WRONG = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        254,
        256,
        65_536,
        2**53 - 1,
        2**53,
        1.5,
        "",
        "a",
        "A",
        "x" * 64,
        b"",
        b"x",
        b"x" * 32,
        [],
        {},
    ]
)


def mutated(data: Any, draw: Any) -> Any:
    """A copy of decoded CBOR with one thing changed: an entry dropped, added, replaced, or a part of it mutated."""
    if isinstance(data, dict):
        kind = draw(st.sampled_from(["drop", "add", "inside"]))
        copy = dict(data)
        if kind == "add":
            copy[draw(st.integers(0, 23))] = draw(WRONG)
        elif copy:
            key = draw(st.sampled_from(sorted(copy)))
            if kind == "drop":
                del copy[key]
            else:
                copy[key] = mutated(copy[key], draw)
        return dict(sorted(copy.items()))
    if isinstance(data, list) and data and draw(st.booleans()):
        kind = draw(st.sampled_from(["drop", "add", "inside"]))
        index = draw(st.integers(0, len(data) - 1))
        if kind == "drop":
            return data[:index] + data[index + 1 :]
        if kind == "add":
            return [*data, draw(WRONG)]
        return [*data[:index], mutated(data[index], draw), *data[index + 1 :]]
    return draw(WRONG)


@pytest.mark.parametrize("message_class", ALL_CLASSES, ids=rule_of)
@given(data=st.data())
def test_codec_and_cddl_agree_on_mutated_messages(message_class: type[Any], data: st.DataObject) -> None:
    """Whatever a change does, schema and codec take the result both or refuse it both."""
    original = cbor2.loads(payload_of(data.draw(messages_of(message_class))))
    payload = cbor2.dumps(mutated(original, data.draw))
    try:
        read_payload(message_class, payload)
        accepted = True
    except MalformedMessage:
        accepted = False
    assert follows(rule_of(message_class), payload) is accepted


OPERATIONS = [
    Register(b"statement"),
    Issue(b"statement"),
    Transfer(ASSET, 0, 500, "north", "east", 120_000, None),
    Transfer(ASSET, 0, 500, "north", "east", 120_000, b"order"),
    Deliver(bytes(16), 0, 1800, Window.INTERVAL, "north", 5, bytes(32), (DeliveredSlice(ASSET, 0, 5, 255),) * 2),
    Deliver(bytes(16), 0, 1800, Window.MONTH, "north", 5, bytes(32), ()),
    Close(0, 1800, 0, 3, 500, bytes(32)),
    Void(bytes(16)),
    Correct(b"statement"),
    CorrectDemand(bytes(16), 0, 1, 5, bytes(32), (ReturnedSlice(ASSET, 0, 3, 5),) * 2),
    CorrectDemand(bytes(16), 0, 1, 5, bytes(32), ()),
    RotateKey(b"statement"),
    RevokeKey(b"statement"),
    SetValidator((b"statement", b"another")),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: type(operation).__name__)
@given(data=st.data())
def test_codec_and_cddl_agree_on_operations_and_mutated_ones(operation: Any, data: st.DataObject) -> None:
    require("operation", encode_operation(operation), "operation")
    raw = cbor2.dumps(mutated(cbor2.loads(encode_operation(operation)), data.draw))
    try:
        decode_operation(raw)
        accepted = True
    except MalformedMessage:
        accepted = False
    assert follows("operation", raw) is accepted


@given(data=st.data())
def test_codec_and_cddl_agree_on_holdings_and_mutated_ones(data: st.DataObject) -> None:
    encoded = encode_holding(Holding(ASSET, Source.WIND, "north", 0, 5))
    require("holding", encoded, "holding")
    raw = cbor2.dumps(mutated(cbor2.loads(encoded), data.draw))
    try:
        decode_holding(raw)
        accepted = True
    except MalformedMessage:
        accepted = False
    assert follows("holding", raw) is accepted


@given(data=st.data())
def test_codec_and_cddl_agree_on_admitted_devices_and_mutated_ones(data: st.DataObject) -> None:
    encoded = Admitted("roof", "ola", Source.SOLAR, Carrier.ELECTRICITY, 5_000, "north", "a roof", 0).to_bytes()
    require("admitted", encoded, "admitted")
    raw = cbor2.dumps(mutated(cbor2.loads(encoded), data.draw))
    try:
        decode_admitted(raw)
        accepted = True
    except MalformedMessage:
        accepted = False
    assert follows("admitted", raw) is accepted


@pytest.mark.parametrize("message_class", MESSAGE_CLASSES.values(), ids=rule_of)
def test_the_protected_header_of_every_message_type_follows_the_cddl(message_class: type[Any]) -> None:
    header = {1: -19, 4: bytes(16), 16: 65_000 + message_class.TYPE}
    assert follows("protected-header", cbor2.dumps(header))


def test_asyncapi_names_every_message_once_with_its_type_rule_and_limit() -> None:
    described = asyncapi()["components"]["messages"]
    on_topics = {name for channel in asyncapi()["channels"].values() for name in channel["messages"]}
    # These travel inside batches only.
    inside = {
        MessageType.REGISTRATION,
        MessageType.ADMISSION,
        MessageType.MANDATE,
        MessageType.END_OF_MANDATE,
        MessageType.KEY_ROTATION,
        MessageType.KEY_REVOCATION,
        MessageType.VALIDATOR_CHANGE,
    }
    expected = {
        message_class.__name__: (rule_of(message_class), int(message_type), message_class.MAX_BYTES)
        for message_type, message_class in MESSAGE_CLASSES.items()
        if message_type not in inside
    } | {"Report": ("report", None, MAX_METER_MESSAGE_BYTES)}
    assert {
        name: (entry["x-rule"], entry["x-type"], entry["x-max-bytes"]) for name, entry in described.items()
    } == expected
    assert on_topics == set(expected)
    for entry in described.values():
        file = SCHEMA_FOLDER / entry["payload"]["schema"]["$ref"]
        assert re.search(rf"^{entry['x-rule']} = ", file.read_text(), re.MULTILINE)


def test_asyncapi_describes_exactly_the_topics_of_the_topic_builder() -> None:
    topics = Topics()
    leaves = ("reading", "demand", "status", "receipt", "delivery", "hint", "certificate", "certificate-part")
    built = {topics.meter("{broker}", "{meter}", leaf) for leaf in leaves} | {
        topics.request("{broker}"),
        topics.response("{broker}", "{peer}"),
        topics.cleared("{broker}"),
        topics.broker_status("{broker}"),
        topics.stock("{broker}"),
        topics.forecast("{broker}"),
        topics.wishes("{broker}"),
        topics.promises("{broker}"),
        topics.ledger_submit("{ledger}"),
        topics.ledger_result("{ledger}", "{client}"),
        topics.ledger_feed("{ledger}"),
        topics.ledger_checkpoint("{ledger}"),
        topics.ledger_witness("{ledger}", "{party}"),
        topics.time,
        topics.report("{participant}"),
    }
    page = asyncapi()
    assert {channel["address"] for channel in page["channels"].values()} == built
    operated = [operation["channel"]["$ref"] for operation in page["operations"].values()]
    assert sorted(operated) == sorted(f"#/channels/{name}" for name in page["channels"])
    for operation in page["operations"].values():
        assert operation["bindings"]["mqtt"]["qos"] in (0, 1)
        assert operation["bindings"]["mqtt"]["retain"] in (True, False)


def test_traffic_on_its_topic_passes_and_is_counted() -> None:
    topics = Topics()
    reading = seal(READING, KEY, "ledger-1", "meter-1")
    statement = seal(READING, KEY, "ledger-1", "meter-1")
    batch = seal(Batch(1800, (encode_operation(Issue(statement)),)), KEY, "ledger-1", "east")
    block = seal(Block(1, bytes(32), (batch,), 1, bytes(32), bytes(32)), KEY, "ledger-1", "node")
    page = seal(Page(bytes(8), QueryKind.BLOCKS, 1, (block,)), KEY, "ledger-1", "node")
    holding = encode_holding(Holding(ASSET, Source.WIND, "north", 0, 5))
    holdings = seal(Page(bytes(8), QueryKind.HOLDINGS, 1, (holding,)), KEY, "ledger-1", "node")
    admitted = Admitted("roof", "ola", Source.SOLAR, Carrier.ELECTRICITY, 5_000, "north", "a roof", 0)
    device = seal(Page(bytes(8), QueryKind.DEVICE, 1, (admitted.to_bytes(),)), KEY, "ledger-1", "node")
    report = Report("east", 0, Stage.MARKET, True).to_bytes()
    counts = validate_traffic(
        [
            (topics.meter("east", "meter-1", "reading"), reading),
            (topics.ledger_submit("ledger-1"), batch),
            (topics.ledger_feed("ledger-1"), block),
            (topics.ledger_result("ledger-1", "east"), page),
            (topics.ledger_result("ledger-1", "east"), holdings),
            (topics.ledger_result("ledger-1", "east"), device),
            (topics.report("east"), report),
            (topics.report("east"), report),
        ]
    )
    assert counts == {"reading": 1, "submit": 1, "feed": 1, "result": 3, "report": 2}


def test_the_traffic_check_refuses_what_does_not_belong() -> None:
    topics = Topics()
    reading = seal(READING, KEY, "ledger-1", "meter-1")
    block_of_readings = seal(Block(1, bytes(32), (reading,), 1, bytes(32), bytes(32)), KEY, "ledger-1", "node")
    no_operation = seal(Batch(1800, (b"\x82\x00\x80",)), KEY, "ledger-1", "east")
    issue_of_nothing = seal(Batch(1800, (encode_operation(Issue(b"reading")),)), KEY, "ledger-1", "east")
    no_device = seal(Page(bytes(8), QueryKind.DEVICE, 1, (b"\x80",)), KEY, "ledger-1", "node")
    no_holding = seal(Page(bytes(8), QueryKind.HOLDINGS, 1, (b"\x80",)), KEY, "ledger-1", "node")
    negative = seal(dataclasses.replace(READING, energy_wh=-1), KEY, "ledger-1", "meter-1")
    header_outside = list(cbor2.loads(reading).value)
    header_outside[1] = {4: b"x"}
    for topic, payload in [
        ("dengen/v1/elsewhere", reading),
        ("other/brokers/east/meters/meter-1/reading", reading),
        (topics.meter("east", "Meter-1", "reading"), reading),
        (topics.meter("east", "meter-1", "demand"), reading),
        (topics.meter("east", "meter-1", "reading"), b""),
        (topics.meter("east", "meter-1", "reading"), reading[:-1]),
        (topics.meter("east", "meter-1", "reading"), negative),
        (topics.meter("east", "meter-1", "reading"), cbor2.dumps(cbor2.CBORTag(18, header_outside))),
        (topics.ledger_feed("ledger-1"), block_of_readings),
        (topics.ledger_submit("ledger-1"), no_operation),
        (topics.ledger_submit("ledger-1"), issue_of_nothing),
        (topics.ledger_result("ledger-1", "east"), no_holding),
        (topics.ledger_result("ledger-1", "east"), no_device),
        (topics.report("east"), reading),
    ]:
        with pytest.raises(SchemaError):
            schema_check(topic, payload)
