"""Checks many signatures on all processors: they are most of the work of verifying a certificate."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Final, Self

from broker.certificates.evidence import MeterSignature
from broker.certificates.verify import one_by_one
from broker.protocol.keys import public_key_from_cose

_FEW: Final = 2_000
"""Below this the processes take longer to start than the signatures to check."""

_SHARE: Final = 4_096

_Portable = tuple[bytes, bytes, bytes]


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
        found = []
        for first in range(0, len(signatures), _SHARE):
            share = signatures[first : first + _SHARE]
            portable = [(key.cose_key, signature, message) for key, signature, message, _, _ in share]
            found.append(self._pool.submit(_first_that_fails, portable))

        def first_that_fails() -> int | None:
            for number, future in enumerate(found):
                failed = future.result()
                if failed is not None:
                    return number * _SHARE + failed
            return None

        return first_that_fails

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _first_that_fails(share: list[_Portable]) -> int | None:
    for index, (key, signature, message) in enumerate(share):
        if not public_key_from_cose(key).verifies(signature, message):
            return index
    return None
