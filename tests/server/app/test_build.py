"""Whom a server lets in where others than this machine reach it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from turret_server.app.build import _check_access
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
        _check_access(config(), OPEN)
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        _check_access(config(tls_cert=PEM, tls_key=PEM), OPEN)
    _check_access(config(allow_unauthenticated=True), OPEN)
    _check_access(config(listen="127.0.0.1:50051"), OPEN)


def test_certificates_of_an_authority_are_enough_and_it_is_told_what_that_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    certified = config(tls_cert=PEM, tls_key=PEM, tls_client_ca=Path("clients.pem"))
    with caplog.at_level(logging.WARNING, "turret_server.app.build"):
        _check_access(certified, OPEN)
    [warning] = caplog.messages
    assert "every client with a certificate signed by clients.pem has every permission" in warning
    caplog.clear()
    _check_access(certified, KEYS)
    assert not caplog.messages
