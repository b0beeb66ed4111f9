"""Verifies a certificate on all processors: they share the meters' signatures, which are most of the work."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self

from broker.certificates.evidence import MeterSignature
from broker.certificates.verify import Verified, one_by_one, verify_certificate
from broker.ledger.trust import Trust
from broker.protocol.keys import public_key_from_cose
from broker.protocol.messages import Checkpoint

_FEW: Final = 1_000
"""A share below this is checked here: the first process takes longer to start than its signatures to check."""

_Portable = tuple[bytes, bytes, bytes]


def verify_on_all_processors(raw: bytes, trust: Trust, known: Checkpoint | None = None) -> Verified:
    """As `verify.verify_certificate`, quicker for a long period."""
    with AllProcessors() as processors, _uncollected():
        return verify_certificate(raw, trust, known, processors.check)


class AllProcessors:
    """As many processes as there are processors, started when there is work for them. Use it in a `with`."""

    def __init__(self) -> None:
        self._workers = len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def check(self, signatures: Sequence[MeterSignature]) -> Callable[[], int | None]:
        """As `verify.one_by_one`, but begun at once."""
        if self._workers == 1 or len(signatures) < _FEW:
            return one_by_one(signatures)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers)
        portable = [(key.cose_key, signature, message) for key, signature, message, _, _ in signatures]
        return self._pool.submit(_first_that_fails, portable).result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Millions of values come to be, none in a cycle; to look for cycles among them again and again is a sixth of all
    the work beside the signatures."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _first_that_fails(share: list[_Portable]) -> int | None:
    for index, (key, signature, message) in enumerate(share):
        if not public_key_from_cose(key).verifies(signature, message):
            return index
    return None
