"""What a turn of the broker wants done once it is committed: messages to publish and batches to submit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.protocol.envelope import seal
from broker.protocol.keys import PrivateKey
from broker.protocol.messages import Message


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this broker is: its name, its signing key, and the ledger that it works on."""

    name: str
    key: PrivateKey
    ledger: str

    def seal(self, message: Message) -> bytes:
        """The message signed by this broker."""
        return seal(message, self.key, self.ledger, self.name)


class Publication(NamedTuple):
    """One MQTT message to send after the commit."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


@dataclass(slots=True)
class Outputs:
    """Filled during a turn, taken by the shell after its commit; what a crash loses in between can be made again."""

    publications: list[Publication] = field(default_factory=list)
    batches: list[bytes] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Sentences for the operator's log."""

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        self.publications.append(Publication(topic, payload, qos, retain))

    def submit(self, batch: bytes) -> None:
        self.batches.append(batch)

    def complain(self, sentence: str) -> None:
        self.complaints.append(sentence)

    def hand_over(
        self,
        publish: Callable[[Publication], None],
        submit: Callable[[bytes], None],
        complain: Callable[[str], None],
    ) -> None:
        """Give everything to the shell, batches first, and start empty again."""
        batches, self.batches = self.batches, []
        publications, self.publications = self.publications, []
        complaints, self.complaints = self.complaints, []
        for batch in batches:
            submit(batch)
        for publication in publications:
            publish(publication)
        for complaint in complaints:
            complain(complaint)
