"""The MQTT shell on a real mosquitto: order, acknowledgement, retained messages, wills, and coming back."""

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dengen_testing.certificates import Authority
from dengen_testing.mosquitto import Mosquitto
from dengen_testing.waiting import wait_until

from broker.protocol.limits import MAX_BLOCK_BYTES
from broker.protocol.mqtt_link import Incoming, MqttConfig, MqttLink

pytestmark = pytest.mark.integration

OpenLink = Callable[..., MqttLink]


@pytest.fixture
def open_link() -> Iterator[OpenLink]:
    """`open_link(config, "name", "topic/filter", …)`: a link, closed after the test."""
    links: list[MqttLink] = []

    def open_one(config: MqttConfig, name: str, *filters: str, connect: bool = True, **more: object) -> MqttLink:
        link = MqttLink(config, name, [(topic, 1) for topic in filters], **more)  # type: ignore[arg-type]
        links.append(link)
        if connect:
            received(link, until=lambda: link.connected)
        return link

    yield open_one
    for link in links:
        link.close()


def received(link: MqttLink, count: int = 0, until: Callable[[], bool] | None = None) -> list[Incoming]:
    """What comes until there are so many messages, or until something is true."""
    messages: list[Incoming] = []

    def done() -> bool:
        messages.extend(link.poll(0.02))
        return until() if until is not None else len(messages) >= count

    wait_until(done, f"{count} messages" if until is None else "the link", detail=lambda: link.last_failure)
    return messages


def test_messages_of_both_qualities_keep_their_order(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    config = mosquitto.mqtt_config()
    receiver, sender = open_link(config, "receiver", "a/#"), open_link(config, "sender")
    for number in range(300):
        sender.publish("a/b", str(number).encode(), qos=number % 2)
    sender.flush()
    messages: list[Incoming] = []

    def all_here() -> bool:
        sender.poll(0.0)
        for message in receiver.poll(0.02):
            receiver.acknowledge(message)
            messages.append(message)
        return len(messages) == 300

    wait_until(all_here, "300 messages")
    assert [int(message.payload) for message in messages] == list(range(300))


def test_the_server_sends_no_more_than_may_be_unacknowledged(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    config = mosquitto.mqtt_config()
    receiver = open_link(config, "receiver", "a", "end", receive_maximum=2)
    sender = open_link(config, "sender")
    for number in range(5):
        sender.publish("a", bytes([number]))
    sender.publish("end", b"", qos=0)
    # QoS 0 is not held back, so when it is here, so is all that the server will send for now.
    messages: list[Incoming] = []

    def end_is_here() -> bool:
        sender.poll(0.0)
        messages.extend(receiver.poll(0.02))
        return any(message.topic == "end" for message in messages)

    wait_until(end_is_here, "the end")
    before = [message for message in messages if message.topic == "a"]
    assert len(before) == 2
    for message in before:
        receiver.acknowledge(message)
    rest: list[Incoming] = []

    def all_here() -> bool:
        for message in receiver.poll(0.02):
            receiver.acknowledge(message)
            rest.append(message)
        return len(rest) == 3

    wait_until(all_here, "the rest")
    assert [message.payload for message in rest] == [b"\2", b"\3", b"\4"]


def test_a_retained_message_reaches_who_comes_later(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    config = mosquitto.mqtt_config()
    sender = open_link(config, "sender", "echo")
    sender.publish("status", b"here", retain=True)
    sender.publish("echo", b"")
    received(sender, 1)
    (message,) = received(open_link(config, "late", "status", connect=False), 1)
    assert (message.payload, message.retained) == (b"here", True)


def test_the_will_speaks_for_who_is_cut_off_but_not_for_who_leaves(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    config = mosquitto.mqtt_config()
    watcher = open_link(config, "watcher", "will/+")
    polite = open_link(config, "polite", will=("will/polite", b"gone"))
    cut_off = open_link(config, "cut-off", will=("will/cut-off", b"gone"))
    polite.close()
    polite.close = lambda: None  # type: ignore[method-assign]
    assert cut_off._client is not None
    cut_off._client.socket().shutdown(socket.SHUT_RDWR)
    (message,) = received(watcher, 1)
    assert message.topic == "will/cut-off"


def test_after_a_server_restart_the_link_comes_back_and_counts_it(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    link = open_link(mosquitto.mqtt_config(), "link", "a")
    assert link.connections == 1
    mosquitto.kill()
    received(link, until=lambda: not link.connected)
    assert link.last_failure
    link.publish("a", b"while it was down")
    mosquitto.start()
    received(link, until=lambda: link.connected)
    assert link.connections == 2
    link.publish("a", b"afterwards")
    (message,) = received(link, 1)
    assert message.payload == b"afterwards", "subscribed again, and nothing is sent from an old queue"


def test_acknowledging_on_a_later_connection_is_void(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    link = open_link(mosquitto.mqtt_config(), "link", "a")
    link.publish("a", b"1")
    (old,) = received(link, 1)
    mosquitto.restart()
    received(link, until=lambda: link.connections == 2 and link.connected)
    link.acknowledge(old)
    link.publish("a", b"2")
    (new,) = received(link, 1)
    link.acknowledge(new)
    assert link.connected
    assert new.connection == 2


def test_wake_ends_a_wait(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    link = open_link(mosquitto.mqtt_config(), "link")
    waker = threading.Timer(0.05, link.wake)
    waker.start()
    assert link.poll(30.0) == []
    waker.join()


def test_a_wake_after_the_end_writes_into_nobody_elses_file(tmp_path: Path) -> None:
    link = MqttLink(MqttConfig(), "link", [])
    link.close()
    # The descriptors that the link has let go of are the next to be given out.
    files = [(tmp_path / str(number)).open("wb") for number in range(4)]
    link.wake()
    for file in files:
        file.close()
    assert [(tmp_path / str(number)).read_bytes() for number in range(4)] == [b""] * 4


def test_the_largest_page_of_the_ledger_passes(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    link = open_link(mosquitto.mqtt_config(), "link", "a")
    payload = bytes(2 * MAX_BLOCK_BYTES)
    link.publish("a", payload)
    (message,) = received(link, 1)
    assert message.payload == payload


def test_a_server_that_is_not_there_is_named(mosquitto: Mosquitto, open_link: OpenLink) -> None:
    config = mosquitto.mqtt_config()
    mosquitto.kill()
    link = open_link(config, "link", connect=False)
    received(link, until=lambda: bool(link.last_failure))
    assert f"127.0.0.1:{config.port}" in link.last_failure
    link.publish("a", b"nobody hears this")
    assert not link.connected


def test_tls_trusts_its_own_authority_only(tls_mosquitto: Mosquitto, open_link: OpenLink, tmp_path: Path) -> None:
    config = tls_mosquitto.mqtt_config()
    link = open_link(config, "link", "a")
    for number in range(50):
        link.publish("a", bytes([number]), qos=number % 2)
    assert [message.payload[0] for message in received(link, 50)] == list(range(50))
    (tmp_path / "other").mkdir()
    stranger = replace(config, ca_file=Authority(tmp_path / "other").ca_file)
    distrustful = open_link(stranger, "distrustful", connect=False)
    received(distrustful, until=lambda: bool(distrustful.last_failure))
    assert "certificate" in distrustful.last_failure.lower()
    assert not distrustful.connected
