"""Connection options of both clients."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

import grpc

from turret_client.errors import invalid_argument

DEFAULT_ADDRESS = "127.0.0.1:50051"

CHANNEL_OPTIONS = (("grpc.max_receive_message_length", 64 * 1024 * 1024),)

# Forms of gRPC's own: https://github.com/grpc/grpc/blob/master/doc/naming.md
_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):([0-9]{1,6})")
_MAX_PORT = 2**16 - 1

Metadata: TypeAlias = tuple[tuple[str, str], ...]

_TENANT_KEY = "turret-tenant"
_API_KEY = "authorization"


class ConnectionOptions(TypedDict, total=False):
    """Tenant, API key and TLS of a connection; all are optional.

    Attributes:
        tenant: Tenant of every call. Default: the API key's tenant, or "default" on a server without keys.
        api_key: API key. Default: the environment variable TURRET_API_KEY.
        tls: Encrypt the connection; the certificate authorities are gRPC's. Implied by `ca` and `cert`.
        ca: PEM file of the certificate authority that signed the server's certificate.
        cert: PEM file of the client's certificate chain, for servers that require one.
        key: PEM file of the certificate's private key.
    """

    tenant: str | None
    api_key: str | None
    tls: bool
    ca: str | Path | None
    cert: str | Path | None
    key: str | Path | None


@dataclass(frozen=True, slots=True)
class Connection:
    """Metadata of every call, and the channel's credentials; None is an unencrypted channel."""

    metadata: Metadata
    credentials: grpc.ChannelCredentials | None


def connection(
    address: str,
    *,
    tenant: str | None = None,
    api_key: str | None = None,
    tls: bool = False,
    ca: str | Path | None = None,
    cert: str | Path | None = None,
    key: str | Path | None = None,
) -> Connection:
    """The connection to an address with these `ConnectionOptions`.

    Raises:
        InvalidArgumentError: The address is not HOST:PORT, the tenant or the API key contains characters that
            gRPC cannot send, or only one of `cert` and `key` is given.
        OSError: A certificate file cannot be read.
    """
    _check_address(address)
    metadata = call_metadata(tenant, os.environ.get("TURRET_API_KEY") if api_key is None else api_key)
    if (cert is None) != (key is None):
        missing = "key" if key is None else "cert"
        raise invalid_argument(missing, f"cert and key must be given together; {missing} is missing")
    if not (tls or ca or cert):
        return Connection(metadata, None)
    pems = [Path(file).read_bytes() if file else None for file in (ca, key, cert)]
    return Connection(metadata, grpc.ssl_channel_credentials(*pems))


def call_metadata(tenant: str | None, api_key: str | None) -> Metadata:
    """The metadata of every call of a tenant or of a key.

    Raises:
        InvalidArgumentError: One contains characters that gRPC cannot send.
    """
    metadata = []
    if tenant is not None:
        metadata.append((_TENANT_KEY, _checked(_TENANT_KEY, "the tenant", tenant)))
    if api_key:
        metadata.append((_API_KEY, f"Bearer {_checked(_API_KEY, 'the API key', api_key)}"))
    return tuple(metadata)


def _check_address(address: str) -> None:
    """GRPC takes a missing port for 443, and the rest of one that is too large for the port."""
    if address.startswith(_SCHEMES):
        return
    scheme, mark, rest = address.rpartition("://")
    if mark:
        hint = " and TLS options" if scheme == "https" else ""
        raise invalid_argument(
            "address",
            f"the server's address is HOST:PORT, without {scheme}://; found {address!r}; use "
            f"{rest.partition('/')[0]!r}{hint}",
        )
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise invalid_argument(
            "address", f"the server's address is HOST:PORT, such as {DEFAULT_ADDRESS}; found {address!r}"
        )
    if not 0 < int(found[1]) <= _MAX_PORT:
        raise invalid_argument(
            "address", f"the port of the server's address is from 1 to {_MAX_PORT}; found {address!r}"
        )


def _checked(key: str, name: str, value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        # Errors are logged: an API key must not appear in them.
        found = f"found {value!r}" if key == _TENANT_KEY else "found others"
        raise invalid_argument(key, f"{name} must consist of printable ASCII characters; {found}")
    return value
