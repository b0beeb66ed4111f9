"""Listens on MQTT and waits for messages: how tests see what agents and brokers say."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from broker.protocol.mqtt_link import Incoming, MqttConfig, MqttLink
from dengen_testing.waiting import WaitedTooLong

MAX_KEPT: Final = 100_000
"""More messages than a test looks at; a test that receives more wants another tool."""

_POLL_S: Final = 0.2


class Listener:
    """Collects what comes on some topics, in `messages`, oldest first. Use it in a `with`."""

    def __init__(self, mqtt: MqttConfig, filters: Sequence[str], client_id: str = "listener") -> None:
        """`filters` are whole topic filters, root included."""
        self._link = MqttLink(mqtt, client_id, [(topic, 0) for topic in filters])
        self.messages: list[Incoming] = []

    def connect(self, limit_s: float = 10.0) -> Self:
        """Wait until the connection stands. Raises WaitedTooLong."""
        self._until(lambda: self._link.connected, "the MQTT connection", limit_s)
        return self

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Send a message, as somebody else's program would."""
        self._link.publish(topic, payload, qos=qos, retain=retain)
        self._link.flush()

    def wait_for(
        self, wanted: Callable[[Incoming], bool], what: str, *, limit_s: float = 10.0, since: int = 0
    ) -> Incoming:
        """The first message from `messages[since]` on that is `wanted`, waited for. Raises WaitedTooLong."""
        looked_at = since

        def found() -> bool:
            nonlocal looked_at
            while looked_at < len(self.messages) and not wanted(self.messages[looked_at]):
                looked_at += 1
            return looked_at < len(self.messages)

        self._until(found, what, limit_s)
        return self.messages[looked_at]

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _until(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while not condition():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise WaitedTooLong(what, limit_s, self._link.last_failure)
            self.messages.extend(self._link.poll(min(left_s, _POLL_S)))
            if len(self.messages) > MAX_KEPT:
                raise ValueError(f"more than {MAX_KEPT} messages; listen to fewer topics")
