"""Pseudonyms and commitments against values made here with `hashlib` alone, by the definition of HMAC (RFC 2104)."""

from hashlib import sha256

from broker.service.pseudonyms import commitment, day_key, day_of, interval_key, pseudonym

BLOCK_BYTES = 64


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    padded = key.ljust(BLOCK_BYTES, b"\0")
    inner = sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    return sha256(bytes(byte ^ 0x5C for byte in padded) + inner).digest()


SECRET = bytes(range(32))
START_S = 1_769_900_400  # 2026-01-31T23:00:00Z, day 20484
KEY_ID = b"k" * 16


def test_the_hmac_of_this_test_is_hmac() -> None:
    # RFC 4231, test case 2.
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert hmac_sha256(b"Jefe", b"what do ya want for nothing?").hex() == expected


def test_the_chain_of_keys_is_as_documented() -> None:
    k_day = hmac_sha256(SECRET, b"day" + (20_484).to_bytes(8, "big"))
    k_interval = hmac_sha256(k_day, b"interval" + START_S.to_bytes(8, "big"))
    assert day_of(START_S) == 20_484
    assert day_key(SECRET, 20_484) == k_day
    assert interval_key(k_day, START_S) == k_interval
    assert pseudonym(k_interval, KEY_ID) == hmac_sha256(k_interval, b"pseudonym" + KEY_ID)[:16]
    salt = hmac_sha256(k_interval, b"commitment")
    assert commitment(k_interval, b"the signed demand") == sha256(salt + b"the signed demand").digest()


def test_two_intervals_of_one_meter_have_nothing_in_common() -> None:
    k_day = day_key(SECRET, day_of(START_S))
    names = {pseudonym(interval_key(k_day, START_S + step * 1_800), KEY_ID) for step in range(48)}
    assert len(names) == 48


def test_a_disclosed_day_opens_that_day_only() -> None:
    today, tomorrow = day_key(SECRET, 20_484), day_key(SECRET, 20_485)
    next_start_s = 20_485 * 86_400
    assert pseudonym(interval_key(today, next_start_s), KEY_ID) != pseudonym(
        interval_key(tomorrow, next_start_s), KEY_ID
    )
