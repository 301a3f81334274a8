"""Who may call a server, and the store that it keeps adapters in; then the server is built around them.

All that is decided here is decided before torch and the model's libraries are imported, which takes seconds:
what is wrong with it is reported at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turret_adapters.store.store import AdapterStore
from turret_server import logs
from turret_server.config import ServerConfig, parse_size
from turret_server.doors.tls import TlsFiles
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.auth_hook import AuthHook, load_hook
from turret_server.tenancy.tenants import TenantTable
from turret_server.tenancy.tenants_file import TenantsFile

if TYPE_CHECKING:
    from turret_server.app.build import Parts
    from turret_server.model.sampler import Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may call, and how connections are encrypted."""

    tenants: TenantsFile
    auth_hook: AuthHook | None
    tls: TlsFiles | None


@contextmanager
def assemble(config: ServerConfig, sampler: Sampler | None = None) -> Iterator[Parts]:
    """Load the model and start the engine; stop it when the block ends.

    Raises:
        ConfigError: a setting is invalid, or does not fit this machine.
        StoreBusyError: another server uses the store.
        UnsupportedModelError: the model cannot be served.
    """
    access = load_access(config)
    with ExitStack() as stack:
        store = stack.enter_context(closing(open_store(config)))
        from turret_server.app.build import build  # noqa: PLC0415 -- torch and the model's libraries

        logs.take_over("transformers", "huggingface_hub")
        yield build(config, access, store, sampler, stack)


def load_access(config: ServerConfig) -> Access:
    """Read the tenants file, the authentication hook and the certificates.

    Raises:
        ConfigError: one of them is invalid, or together they would open the server to everybody.
    """
    limits = TenantLimits(max_queued_requests=config.max_queue, max_queued_tokens=config.max_queue_tokens)
    auth_hook = load_hook(config.auth_hook) if config.auth_hook else None
    tenants = TenantsFile(config.tenants, limits, hooked=auth_hook is not None)
    _check_access(config, tenants.table)
    tls = None
    if config.tls_cert and config.tls_key:
        tls = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    return Access(tenants=tenants, auth_hook=auth_hook, tls=tls)


def _check_access(config: ServerConfig, tenants: TenantTable) -> None:
    """A server that other machines reach must authenticate its callers, unless the operator waives that.

    Where no tenant has a key or an identity, the authority of --tls-client-ca decides who gets in, and
    everybody whose certificate it signed has every permission.
    """
    if tenants.has_identities and not config.tls_client_ca:
        raise ConfigError(
            f"--tenants {config.tenants}: identities are names in client certificates; start the server with "
            "--tls-client-ca as well"
        )
    opened = config.open_address
    if opened is None:
        return
    if tenants.is_open and config.tls_client_ca:
        log.warning(
            "every client with a certificate signed by %s has every permission, as any tenant; to keep "
            "tenants apart, give them identities or keys in the file of --tenants",
            config.tls_client_ca,
        )
    elif tenants.is_open and not config.allow_unauthenticated:
        raise ConfigError(
            f"{opened[0]} {opened[1]}: other machines could use this server without authentication; give "
            "tenants keys in the file of --tenants (`turret tenants key NAME`), require certificates with "
            "--tls-client-ca, listen on 127.0.0.1, or allow it with --allow-unauthenticated"
        )
    if not config.tls_cert:
        log.warning("prompts and API keys cross the network unencrypted: use --tls-cert and --tls-key")


def open_store(config: ServerConfig) -> AdapterStore:
    size = parse_size(config.store_size) if config.store_size else None
    return AdapterStore(config.store, int(size.number) if size else None)
