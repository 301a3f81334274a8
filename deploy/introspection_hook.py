"""Authenticates calls by OAuth 2.0 token introspection (RFC 7662) at $INTROSPECTION_URL.

Put this folder on PYTHONPATH and start: turret serve --auth-hook introspection_hook:tenant_of …
"""  # noqa: INP001 (copied as a single file)

import json
import os
import urllib.parse
import urllib.request
from collections.abc import Sequence

from turret_server.errors import UnauthenticatedError


def tenant_of(metadata: Sequence[tuple[str, str | bytes]], _identities: Sequence[str]) -> str | None:
    token = str(dict(metadata).get("authorization", "")).removeprefix("Bearer ")
    if not token or token.startswith("turret_"):
        return None  # an API key or a certificate decides
    form = urllib.parse.urlencode({"token": token}).encode()
    with urllib.request.urlopen(os.environ["INTROSPECTION_URL"], form, timeout=3) as answer:  # noqa: S310
        found = json.load(answer)
    if not found["active"]:
        raise UnauthenticatedError("the token is invalid or has expired; sign in again")
    return str(found["client_id"])
