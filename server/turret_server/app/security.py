"""Whether a server may listen where it is told to, and how its connections are encrypted."""

from __future__ import annotations

import logging

from turret_server.config import ServerConfig
from turret_server.errors import ConfigError
from turret_server.rpc.server import is_loopback
from turret_server.rpc.tls import TlsFiles
from turret_server.tenancy.tenants import TenantTable

log = logging.getLogger(__name__)


def check_tenants(config: ServerConfig, tenants: TenantTable) -> None:
    """See that the server lets in whom it knows and nobody else, unless only this machine reaches it.

    Whom it knows are tenants with keys or identities. Where there are none, an authority that signs clients'
    certificates says who comes in, and all of them are trusted alike.

    Raises:
        ConfigError: it would not.
    """
    if tenants.has_identities and not config.tls_client_ca:
        raise ConfigError(
            f"--tenants {config.tenants}: identities are those of clients' certificates; start the server "
            "with --tls-client-ca as well"
        )
    if is_loopback(config.listen):
        return
    if tenants.is_open and config.tls_client_ca:
        log.warning(
            "whoever has a certificate that %s signed may do everything, as any tenant: give tenants "
            "identities or keys in the file of --tenants to keep them apart",
            config.tls_client_ca,
        )
    elif tenants.is_open and not config.allow_unauthenticated:
        raise ConfigError(
            f"--listen {config.listen}: whoever reaches that could do everything; give tenants keys (`turret "
            "tenants key NAME`) in the file of --tenants, listen on 127.0.0.1, ask for certificates with "
            "--tls-client-ca, or say --allow-unauthenticated"
        )
    if not config.tls_cert:
        log.warning("prompts and API keys go over the network as they are: use --tls-cert and --tls-key")


def tls_files(config: ServerConfig) -> TlsFiles | None:
    """The certificates to encrypt with; None where nothing is encrypted.

    Raises:
        ConfigError: one is missing, or cannot be used.
    """
    if config.tls_cert and config.tls_key:
        return TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    if config.tls_cert or config.tls_key or config.tls_client_ca:
        raise ConfigError("--tls-cert and --tls-key belong together, and --tls-client-ca to both")
    return None
