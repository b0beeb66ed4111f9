"""Runs in an environment of its own with `cwt` (a COSE library by others): verifies and signs COSE_Sign1 messages.

Reads one JSON list on standard input and writes one on standard output. A request is {"key", "aad", "message"} to
verify, answered with the payload; or {"key", "aad", "protected", "payload"} to sign, answered with the message. `key`
is a COSE_Key map with the algorithm in it (and -4, the private part, to sign). All bytes are hex of CBOR or raw bytes.
"""

import json
import sys
from typing import Any

import cbor2
from cwt import COSE, COSEKey, CWTError


def answer(request: dict[str, str]) -> str:
    given = {name: bytes.fromhex(value) for name, value in request.items()}
    key = COSEKey.new(cbor2.loads(given["key"]))
    cose = COSE.new()
    if "message" in given:
        payload: bytes = cose.decode(given["message"], key, external_aad=given["aad"])
        return payload.hex()
    protected: dict[Any, Any] = cbor2.loads(given["protected"])
    message: bytes = cose.encode_and_sign(given["payload"], key, protected=protected, external_aad=given["aad"])
    return message.hex()


def safely(request: dict[str, str]) -> str:
    """The answer, or "refused: " and why: that a signature does not fit is an answer too."""
    try:
        return answer(request)
    except (ValueError, CWTError) as error:
        return f"refused: {error}"


if __name__ == "__main__":
    json.dump([safely(request) for request in json.load(sys.stdin)], sys.stdout)
