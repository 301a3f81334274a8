"""API keys: made here, and kept nowhere but with the tenant.

A key holds 256 bits from the system's random source. Nobody guesses one, however fast guesses are hashed, so
a single SHA-256 is enough at rest: hashes that are slow and salted are for secrets that people choose.
"""

from __future__ import annotations

import hashlib
import re
import secrets

_PREFIX = "turret_"  # for people and scanners that find one where it should not be
_BYTES = 32
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def new_key() -> str:
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def digest_of(key: str) -> str:
    """What the tenants file says of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None
