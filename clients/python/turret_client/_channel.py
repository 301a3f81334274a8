"""What the channels of both clients have in common."""

from __future__ import annotations

import grpc

from turret_client.errors import InvalidArgumentError

DEFAULT_ADDRESS = "127.0.0.1:50051"

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 * 1024 * 1024),)

_TENANT_KEY = "turret-tenant"


def call_metadata(tenant: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call.

    Raises:
        InvalidArgumentError: The tenant's name cannot be sent, let alone be one.
    """
    if tenant is None:
        return ()
    if not (tenant.isascii() and tenant.isprintable()):
        raise InvalidArgumentError(
            f"a tenant's name has 1 to 128 of the characters a-z A-Z 0-9 . _ -; found {tenant!r}",
            reason="INVALID_REQUEST",
            metadata={"field": _TENANT_KEY},
            code=grpc.StatusCode.INVALID_ARGUMENT,
        )
    return ((_TENANT_KEY, tenant),)
