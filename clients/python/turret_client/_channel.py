"""What the channels of both clients have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import grpc

from turret_client.errors import InvalidArgumentError

DEFAULT_ADDRESS = "127.0.0.1:50051"

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 * 1024 * 1024),)

_TENANT_KEY = "turret-tenant"
_API_KEY = "authorization"


class ConnectionOptions(TypedDict, total=False):
    """How to come to a server.

    Attributes:
        tenant: For whom every call is made: tenants share the server fairly. A server that knows tenants by
            their keys knows it without; any other takes calls without it for "default".
        api_key: By which the server knows the tenant. Without it the environment's TURRET_API_KEY.
        tls: Encrypt, and trust the authorities that gRPC trusts. The next ones imply it.
        ca: PEM file of the authority that signed the server's certificate.
        cert: PEM file of the client's certificate and its chain, for a server that asks for one.
        key: PEM file of the certificate's key.
    """

    tenant: str | None
    api_key: str | None
    tls: bool
    ca: str | Path | None
    cert: str | Path | None
    key: str | Path | None


@dataclass(frozen=True, slots=True)
class Connection:
    """Goes with every call, and makes the channel; without credentials nothing is encrypted."""

    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.ChannelCredentials | None


def connection(
    *,
    tenant: str | None = None,
    api_key: str | None = None,
    tls: bool = False,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
) -> Connection:
    """From `ConnectionOptions`.

    Raises:
        InvalidArgumentError: The tenant's name or the key cannot be sent, let alone be one.
        OSError: A file cannot be read.
    """
    api_key = os.environ.get("TURRET_API_KEY") if api_key is None else api_key
    metadata = []
    if tenant is not None:
        metadata.append((_TENANT_KEY, _sendable(_TENANT_KEY, "a tenant's name", tenant)))
    if api_key:
        metadata.append((_API_KEY, f"Bearer {_sendable(_API_KEY, 'an API key', api_key)}"))
    if (cert is None) != (key is None):
        raise _refused("cert", "cert and key belong together; give both")
    if not (tls or ca or cert):
        return Connection(tuple(metadata), None)
    pems = [Path(file).read_bytes() if file else None for file in (ca, key, cert)]
    return Connection(tuple(metadata), grpc.ssl_channel_credentials(*pems))


def _sendable(field: str, what: str, text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        # What a key holds is for nobody to read.
        found = f"; found {text!r}" if field == _TENANT_KEY else ", found others"
        raise _refused(field, f"{what} has only printable characters of ASCII{found}")
    return text


def _refused(field: str, message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        message,
        reason="INVALID_REQUEST",
        metadata={"field": field},
        code=grpc.StatusCode.INVALID_ARGUMENT,
    )
