from __future__ import annotations

from turret_server.tenancy.keys import digest_of, is_digest, new_key


def test_no_two_keys_are_the_same_and_all_are_long():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    # 256 bits are 43 characters of 6 bits.
    assert all(key.startswith("turret_") and len(key) == len("turret_") + 43 for key in keys)


def test_a_digest_says_nothing_of_its_key():
    key = new_key()
    assert is_digest(digest_of(key))
    assert key not in digest_of(key)
    assert not is_digest(key)
    assert digest_of(key) == digest_of(key) != digest_of(new_key())
