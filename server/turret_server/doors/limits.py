"""Bounds on what any client may do to the transport, whichever door it uses."""

from __future__ import annotations

import resource

# Larger than any prompt or chunk of an upload.
MAX_MESSAGE_BYTES = 4 * 2**20
# Time limit for the one request of a call. 4 MiB take as long at 140 kB a second.
READ_SECONDS = 30.0
# A connection must finish TLS within this time.
HANDSHAKE_SECONDS = 20.0

_MOST_FILES = 2**16
_OWN_FILES = 512


def max_connections() -> int:
    """Maximum number of connections of all doors. It leaves file descriptors for adapters, the store and
    logs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max(soft, _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(allowed - _OWN_FILES, allowed // 2)
