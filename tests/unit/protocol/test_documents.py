"""docs/protocol.md shows bytes, limits and topics that are those of the code."""

import re
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from broker.protocol import cbor
from broker.protocol.envelope import Signer, open_envelope, parse, seal
from broker.protocol.keys import load_private_key
from broker.protocol.limits import MAX_BATCH_BYTES, MAX_BLOCK_BYTES, MAX_BROKER_MESSAGE_BYTES, MAX_METER_MESSAGE_BYTES
from broker.protocol.messages import Carrier, Page, Quality, Reading

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "protocol.md").read_text()


def test_the_worked_example_is_what_the_code_makes(tmp_path: Path) -> None:
    # The private key of RFC 8032 section 7.1, test 1.
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        ed25519.Ed25519PrivateKey.from_private_bytes(seed).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    key = load_private_key(pem)
    reading = Reading("meter-1", 1789999200, 1790001000, 0, 500, Quality.MEASURED, Carrier.ELECTRICITY)
    raw = seal(reading, key, "island", "meter-1")
    opened = open_envelope(raw, "island", {key.public.key_id: Signer("meter-1", key.public)}.get)
    shown = dict(re.findall(r"^\| ([A-Za-z_ ]+) \| `([0-9a-f]+)` \|$", TEXT, re.MULTILINE))
    assert shown == {
        "external_aad": cbor.encode([1, "island", "meter-1"]).hex(),
        "COSE_Key": key.public.cose_key.hex(),
        "key id": key.public.key_id.hex(),
        "protected": parse(raw).protected.hex(),
        "payload": parse(raw).payload.hex(),
        "envelope": raw.hex(),
        "message id": opened.message_id.hex(),
    }


def test_the_limits_are_those_of_the_code() -> None:
    shown = {int(number.replace(" ", "")) for number in re.findall(r"([\d ]+) bytes", TEXT)}
    limits = {MAX_METER_MESSAGE_BYTES, MAX_BROKER_MESSAGE_BYTES, MAX_BATCH_BYTES, MAX_BLOCK_BYTES, Page.MAX_BYTES}
    assert limits <= shown


def test_the_topics_are_those_of_the_asyncapi_page() -> None:
    page = yaml.safe_load((ROOT / "broker/protocol/schema/asyncapi.yaml").read_text())
    expected = {}
    for name, channel in page["channels"].items():
        topic = re.sub(r"\{(\w+)\}", r"<\1>", channel["address"].removeprefix("dengen/v1/"))
        mqtt = page["operations"][name]["bindings"]["mqtt"]
        expected[topic] = f"{mqtt['qos']}{', retained' if mqtt['retain'] else ''}"
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| [^|]+ → [^|]+ \| ([^|]+) \|$", TEXT, re.MULTILINE)
    assert dict(rows) == expected
