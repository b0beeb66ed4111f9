"""The one topic builder. `root` is `dengen/v1` unless the config says otherwise.

Under `brokers/<broker>/` stands what concerns that broker: its meters, its requests and the answers to them
(`response/<peer>` is written by that peer), and what it announces. Topics are operator-global: nobody needs the
Response Topic property, which bridges do not remap.
"""

from dataclasses import dataclass
from typing import Final

DEFAULT_ROOT: Final = "dengen/v1"


@dataclass(frozen=True, slots=True)
class Topics:
    """Builds every topic below one root."""

    root: str = DEFAULT_ROOT

    def meter(self, broker: str, meter: str, leaf: str) -> str:
        """`reading`, `demand` and `status` come from the agent; `receipt`, `delivery` and `hint` go to it."""
        return f"{self.root}/brokers/{broker}/meters/{meter}/{leaf}"

    def request(self, broker: str) -> str:
        """Where neighbours put their orders for `broker`."""
        return f"{self.root}/brokers/{broker}/request"

    def response(self, broker: str, peer: str) -> str:
        """Where `peer` answers the orders of `broker`."""
        return f"{self.root}/brokers/{broker}/response/{peer}"

    def cleared(self, broker: str) -> str:
        return f"{self.root}/brokers/{broker}/cleared"

    def broker_status(self, broker: str) -> str:
        return f"{self.root}/brokers/{broker}/status"

    def stock(self, broker: str) -> str:
        return f"{self.root}/brokers/{broker}/stock"

    def forecast(self, broker: str) -> str:
        """What `broker` expects of the next day."""
        return f"{self.root}/brokers/{broker}/forecast"

    def wishes(self, broker: str) -> str:
        """What `broker` would like to have of its neighbours on the next day."""
        return f"{self.root}/brokers/{broker}/wishes"

    def promises(self, broker: str) -> str:
        """What `broker` promises its neighbours of the next day."""
        return f"{self.root}/brokers/{broker}/promises"

    def ledger_submit(self, ledger: str) -> str:
        """Batches and queries to the ledger."""
        return f"{self.root}/ledger/{ledger}/submit"

    def ledger_result(self, ledger: str, client: str) -> str:
        """Results and pages for one client."""
        return f"{self.root}/ledger/{ledger}/result/{client}"

    def ledger_feed(self, ledger: str) -> str:
        """Every block, as it is committed."""
        return f"{self.root}/ledger/{ledger}/feed"

    def ledger_checkpoint(self, ledger: str) -> str:
        return f"{self.root}/ledger/{ledger}/checkpoint"

    def ledger_witness(self, ledger: str, party: str) -> str:
        """The last checkpoint that `party` co-signed."""
        return f"{self.root}/ledger/{ledger}/checkpoint/{party}"

    @property
    def time(self) -> str:
        """The conductor's ticks, retained."""
        return f"{self.root}/time"

    def report(self, participant: str) -> str:
        """A participant's answers to ticks, retained."""
        return f"{self.root}/time/{participant}"

    def split(self, topic: str) -> tuple[str, ...]:
        """The levels below the root; empty for a topic outside it."""
        prefix = self.root + "/"
        return tuple(topic[len(prefix) :].split("/")) if topic.startswith(prefix) else ()
