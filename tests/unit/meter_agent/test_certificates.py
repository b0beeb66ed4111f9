"""A certificate's parts as an agent collects them: in any order, some twice, and only the broker's."""

from pathlib import Path

import pytest
from support.ledger_world import LEDGER, key, seal

from broker.protocol.envelope import Signer
from broker.protocol.errors import ProtocolError
from broker.protocol.limits import CERTIFICATE_PART_BYTES
from broker.protocol.messages import CertificatePart, CertificateRequest, Message, MeterStatus
from meter_agent.certificates import Collected, NoCertificate

REQUEST = CertificateRequest("anna", b"request!", 0, 1_800)
CONTENT = bytes(range(256)) * (2 * CERTIFICATE_PART_BYTES // 256) + b"the end"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "anna.part"
    file.touch()
    return file


@pytest.fixture
def collected(path: Path) -> Collected:
    return Collected(REQUEST, Signer("east", key("east").public), LEDGER, path)


def part(number: int, by: str = "east", request_id: bytes = REQUEST.request_id) -> bytes:
    content = CONTENT[number * CERTIFICATE_PART_BYTES : (number + 1) * CERTIFICATE_PART_BYTES]
    return seal(CertificatePart("anna", request_id, number, 3, content), by)


def test_parts_come_in_any_order_and_some_twice(collected: Collected, path: Path) -> None:
    assert [collected.take(part(number)) for number in (2, 0, 2, 0, 1)] == [False, False, False, False, True]
    assert path.read_bytes() == CONTENT


def test_what_the_broker_did_not_sign_is_no_part(collected: Collected, path: Path) -> None:
    with pytest.raises(ProtocolError):
        collected.take(part(0, by="west"))
    assert path.read_bytes() == b""


def test_parts_of_another_request_are_passed_over(collected: Collected, path: Path) -> None:
    other: list[Message] = [MeterStatus("anna", True, 0, 0)]
    assert not collected.take(part(0, request_id=b"another!"))
    assert not any(collected.take(seal(message, "east")) for message in other)
    assert path.read_bytes() == b""


def test_a_refusal_says_why(collected: Collected) -> None:
    with pytest.raises(NoCertificate, match="east issues no certificate: not closed yet"):
        collected.take(seal(CertificatePart("anna", REQUEST.request_id, 0, 0, b"", "not closed yet"), "east"))
