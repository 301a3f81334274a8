"""API keys. The server stores their digests only.

A key has 256 random bits, which cannot be guessed, so a single SHA-256 is enough at rest: slow and salted
hashes are for secrets that people choose.
"""

from __future__ import annotations

import hashlib
import re
import secrets

_PREFIX = "turret_"  # lets people and secret scanners recognise a leaked key
_BYTES = 32
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def digest_of(key: str) -> str:
    """The digest of a key, as the tenants file has it."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None
