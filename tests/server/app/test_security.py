"""Whom a server lets in where others than this machine reach it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from turret_server.app.security import check_tenants
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.tenants import Tenant, TenantTable

LIMITS = TenantLimits()
OPEN = TenantTable([], LIMITS)
KEYS = TenantTable([Tenant(name="acme", limits=LIMITS, keys=("sha256:" + "0" * 64,))], LIMITS)
PEM = Path("some.pem")


def config(**settings: object) -> ServerConfig:
    return ServerConfig(**{"model": "m", "listen": "0.0.0.0:50051"} | settings)


def test_an_open_server_is_reached_from_elsewhere_only_if_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        check_tenants(config(), OPEN)
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        check_tenants(config(tls_cert=PEM, tls_key=PEM), OPEN)
    check_tenants(config(allow_unauthenticated=True), OPEN)
    check_tenants(config(listen="127.0.0.1:50051"), OPEN)


def test_certificates_of_an_authority_are_enough_and_it_is_told_what_that_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    certified = config(tls_cert=PEM, tls_key=PEM, tls_client_ca=Path("clients.pem"))
    with caplog.at_level(logging.WARNING, "turret_server.app.security"):
        check_tenants(certified, OPEN)
    [told] = caplog.messages
    assert "whoever has a certificate that clients.pem signed may do everything" in told
    caplog.clear()
    check_tenants(certified, KEYS)
    assert not caplog.messages
