"""Whose devices the energy in stock comes from, where it was not generated for this broker.

Contracts name providers, but an asset names its device only. The feed shows each admission; a broker that came later,
or loads its holdings at a start, asks the ledger about each device of whose energy it comes to hold, and keeps the
answer. What is decided about that energy waits meanwhile (`core`), or it would depend on how quick the answer is.

A ledger of an earlier version never answers. Once a question has had no answer in time, nothing waits any more, and one
device is asked about in an interval, until an answer comes.
"""

from collections.abc import Callable
from typing import Final

from broker.ledger.limits import MAX_DEVICES_ASKED
from broker.service.store import BrokerStore

MAX_UNKNOWN: Final = 65_536
"""Devices that wait to be asked about. More are noted when their energy is looked at again."""


class Owners:
    """`ask` asks the ledger about a device; it comes to `answered` or `unanswered`."""

    def __init__(self, store: BrokerStore, ask: Callable[[str], None]) -> None:
        self._store = store
        self._ask = ask
        self._waiting: dict[str, None] = {}
        self._asked: set[str] = set()
        self._nobodys: set[str] = set()
        """Devices of which the ledger says that it has none such."""
        self._silent = False
        self._probes = False

    @property
    def pending(self) -> bool:
        """True while an answer is to be expected: nothing is decided about energy in stock then."""
        return not self._silent and bool(self._waiting or self._asked)

    def of(self, device: str) -> str:
        """The device's provider; empty if that is not known, and then it is asked for."""
        owner = self._store.owner_of(device)
        if owner is not None:
            return owner
        is_noted = device in self._asked or device in self._nobodys
        if not is_noted and len(self._waiting) < MAX_UNKNOWN:
            self._waiting[device] = None
        return ""

    def advance(self) -> None:
        """Ask about as many as may be asked about at a time."""
        if self._silent and not self._probes:
            return
        most = 1 if self._silent else MAX_DEVICES_ASKED
        while self._waiting and len(self._asked) < most:
            device = next(iter(self._waiting))
            del self._waiting[device]
            self._asked.add(device)
            self._ask(device)
        self._probes = False

    def next_interval(self) -> None:
        """Another interval is in work: a ledger that was silent is tried once more."""
        self._probes = self._silent and not self._asked

    # What is learned

    def seen(self, device: str, owner: str) -> bool:
        """The feed shows an admission. True if it was not known whose energy in stock is."""
        self._store.set_owner(device, owner)
        was_unknown = device in self._asked or device in self._waiting
        self._asked.discard(device)
        self._waiting.pop(device, None)
        return was_unknown

    def answered(self, device: str, owner: str | None) -> bool:
        """The ledger says whose device it is, or that there is none such. True if that makes an owner known."""
        self._silent = False
        if owner is not None:
            return self.seen(device, owner)
        self._asked.discard(device)
        self._nobodys.add(device)
        return False

    def unanswered(self, device: str) -> bool:
        """Nobody has answered in time. True if that is the first time since an answer came."""
        if device not in self._asked:
            return False
        self._asked.discard(device)
        self._waiting[device] = None
        was_silent, self._silent = self._silent, True
        return not was_silent
