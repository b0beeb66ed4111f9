"""The desk at which consumers ask for certificates: who may ask, how much waits, what is sent."""

from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from support.ledger_world import LEDGER, T0, key, seal

from broker.protocol.envelope import Signer, open_envelope
from broker.protocol.errors import BadSignature, MalformedMessage, UnknownKey
from broker.protocol.limits import CERTIFICATE_PART_BYTES, MAX_CERTIFICATE_PARTS
from broker.protocol.messages import CertificatePart, CertificateRequest, MeterStatus
from broker.protocol.topics import Topics
from broker.service.certificates import MAX_WAITING, PARTS_OF_A_TURN, CertificateDesk, Made
from broker.service.outputs import Identity, Publication
from broker.service.store import BrokerStore, ConsumerRow


class Desk:
    """A desk, and what it had begun to make."""

    def __init__(self, store: BrokerStore) -> None:
        self.store = store
        self.begun: list[tuple[CertificateRequest, Future[Made]]] = []
        self.desk = CertificateDesk(Identity("b1", key("b1"), LEDGER), Topics(), store, self._make)

    def _make(self, request: CertificateRequest) -> "Future[Made]":
        future: Future[Made] = Future()
        self.begun.append((request, future))
        return future

    def consumer(self, name: str) -> None:
        public = key(name).public
        self.store.begin()
        self.store.add_consumer(ConsumerRow(name, public.cose_key, public.key_id, b"s" * 32, T0))
        self.store.commit()

    def ask(self, name: str, number: int = 0) -> None:
        self.desk.take(name, seal(CertificateRequest(name, bytes([number] * 8), T0, T0 + 1_800), name))

    def parts(self) -> list[CertificatePart]:
        return [opened(publication) for publication in self.desk.publications()]


def opened(publication: Publication) -> CertificatePart:
    signer = Signer("b1", key("b1").public)
    message = open_envelope(publication.payload, LEDGER, lambda _: signer).message
    assert isinstance(message, CertificatePart)
    assert publication.topic == f"dengen/v1/brokers/b1/meters/{message.meter}/certificate-part"
    return message


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    store = BrokerStore(tmp_path / "broker.db")
    made = Desk(store)
    made.consumer("anna")
    made.consumer("ben")
    yield made
    store.close()


def test_a_certificate_is_sent_in_parts_some_a_turn(desk: Desk) -> None:
    desk.ask("anna")
    assert desk.parts() == []
    ((request, future),) = desk.begun
    assert not desk.desk.has_more
    content = bytes(range(256)) * (CERTIFICATE_PART_BYTES // 256) * 10 + b"end"
    future.set_result(Made(content, None))
    assert desk.desk.has_more
    first = desk.parts()
    assert len(first) == PARTS_OF_A_TURN
    parts = first + desk.parts()
    assert [part.part for part in parts] == list(range(11))
    assert {part.request_id for part in parts} == {request.request_id}
    assert b"".join(part.content for part in parts) == content
    assert not desk.desk.has_more


def test_one_is_made_after_the_other(desk: Desk) -> None:
    desk.ask("anna")
    desk.ask("ben")
    assert desk.parts() == []
    assert [request.meter for request, _ in desk.begun] == ["anna"]
    desk.begun[0][1].set_result(Made(b"a", None))
    assert [part.content for part in desk.parts()] == [b"a"]
    assert [request.meter for request, _ in desk.begun] == ["anna", "ben"]


def test_a_request_that_comes_again_is_one_request(desk: Desk) -> None:
    for _ in range(3):
        desk.ask("anna")
        assert desk.parts() == []
    assert len(desk.begun) == 1


def test_a_reason_reaches_who_asked(desk: Desk) -> None:
    desk.ask("anna")
    desk.parts()
    desk.begun[0][1].set_result(Made(b"", "x" * 1_000))
    (part,) = desk.parts()
    assert (part.parts, part.reason) == (0, "x" * 400)


def test_a_process_that_died_is_told_and_the_next_request_is_served(desk: Desk) -> None:
    desk.ask("anna")
    desk.parts()
    desk.begun[0][1].set_exception(BrokenProcessPool("killed"))
    (part,) = desk.parts()
    assert part.reason is not None
    assert "ask again" in part.reason
    desk.ask("anna", 1)
    desk.parts()
    assert len(desk.begun) == 2


def test_what_is_too_long_to_send_is_refused(desk: Desk) -> None:
    desk.ask("anna")
    desk.parts()
    desk.begun[0][1].set_result(Made(bytes(CERTIFICATE_PART_BYTES * MAX_CERTIFICATE_PARTS + 1), None))
    (part,) = desk.parts()
    assert "shorter periods" in (part.reason or "")


def test_only_so_many_wait_and_one_of_each_consumer(desk: Desk) -> None:
    desk.ask("anna")
    desk.parts()
    desk.ask("anna", 1)
    desk.ask("anna", 2)
    (part,) = desk.parts()
    assert part.request_id == bytes([2] * 8)
    for number in range(MAX_WAITING):
        desk.consumer(f"other-{number}")
        desk.ask(f"other-{number}")
    (part,) = desk.parts()
    assert "ask again" in (part.reason or "")
    assert part.meter == f"other-{MAX_WAITING - 1}"


def test_only_the_consumer_itself_is_heard(desk: Desk) -> None:
    of_anna = CertificateRequest("anna", bytes(8), T0, T0 + 1_800)
    with pytest.raises(UnknownKey):
        desk.desk.take("anna", seal(of_anna, "stranger"))
    with pytest.raises(BadSignature):
        desk.desk.take("anna", seal(of_anna, "ben"))
    with pytest.raises(BadSignature):
        desk.desk.take("ben", seal(of_anna, "ben"))
    with pytest.raises(MalformedMessage):
        desk.desk.take("anna", seal(MeterStatus("anna", True, T0, 0), "anna"))
    assert desk.parts() == []
    assert desk.begun == []
