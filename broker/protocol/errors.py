"""Errors of the protocol: each carries its data and a sentence that an operator can act on."""


class ProtocolError(Exception):
    """Input from the wire that is not a valid message. Nothing is changed by it; the reason goes back to the sender."""


class MalformedMessage(ProtocolError):
    """Bytes that are no message of ours: wrong shape, wrong encoding, over a limit.

    `where` names the message and field, `expected` says what belongs there.
    """

    def __init__(self, where: str, expected: str) -> None:
        super().__init__(f"{where}: expected {expected}")
        self.where = where
        self.expected = expected


class UnknownKey(ProtocolError):
    """A message signed with a key that nobody registered here."""

    def __init__(self, key_id: bytes) -> None:
        super().__init__(
            f"key {key_id.hex()} is not registered here, or is revoked; register the meter or party that uses it first"
        )
        self.key_id = key_id


class BadSignature(ProtocolError):
    """The signature does not fit message, type, ledger and sender."""

    def __init__(self, sender: str, message_type: str) -> None:
        super().__init__(
            f"the signature of this {message_type} does not verify for {sender}; "
            "check that both sides use the same ledger id and key"
        )
        self.sender = sender
        self.message_type = message_type


class KeyFileError(Exception):
    """A file with a key, certificate or password that cannot be used. `path` names it, the text says what to do."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
