"""Whom a server lets in where others than this machine reach it, and what is found before its model."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from turret_server.app import build
from turret_server.app.assembly import _check_access, assemble, load_access
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.tenants import Tenant, TenantTable

LIMITS = TenantLimits()
OPEN = TenantTable([], LIMITS)
KEYS = TenantTable([Tenant(name="acme", limits=LIMITS, keys=("sha256:" + "0" * 64,))], LIMITS)
PEM = Path(__file__)


def config(**settings: object) -> ServerConfig:
    return ServerConfig(**{"model": "m", "listen": "0.0.0.0:50051"} | settings)


def test_settings_are_checked_before_the_libraries_of_the_model_are_imported() -> None:
    check = "import sys, turret_server.app.run; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "set()\n"


def test_logs_of_libraries_go_the_servers_way_once_they_are_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "build", lambda *_: None)
    for name in ("transformers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
    with assemble(config(listen="127.0.0.1:1", store=tmp_path)):
        assert all(logging.getLogger(name).propagate for name in ("transformers", "huggingface_hub"))


def test_an_open_server_is_reached_from_elsewhere_only_if_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        _check_access(config(), OPEN)
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        _check_access(config(tls_cert=PEM, tls_key=PEM), OPEN)
    _check_access(config(allow_unauthenticated=True), OPEN)
    _check_access(config(listen="127.0.0.1:50051"), OPEN)


def test_a_client_certificate_authority_is_enough_and_its_permissions_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    certified = config(tls_cert=PEM, tls_key=PEM, tls_client_ca=PEM)
    with caplog.at_level(logging.WARNING, "turret_server.app.assembly"):
        _check_access(certified, OPEN)
    [warning] = caplog.messages
    assert f"every client with a certificate signed by {PEM} has every permission" in warning
    caplog.clear()
    _check_access(certified, KEYS)
    assert not caplog.messages


def test_identities_need_client_certificates() -> None:
    tenant = Tenant(name="acme", limits=LIMITS, identities=("acme.example.com",))
    table = TenantTable([tenant], LIMITS)
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        _check_access(config(listen="127.0.0.1:1"), table)


def test_an_unencrypted_server_that_others_reach_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    _check_access(config(listen="127.0.0.1:1"), KEYS)
    assert not caplog.messages
    _check_access(config(), KEYS)
    assert "unencrypted" in caplog.messages[0]


def test_queue_limits_without_a_tenants_file_are_the_servers() -> None:
    access = load_access(config(max_queue=3, max_queue_tokens=5, allow_unauthenticated=True))
    limits = access.tenants.limits("anybody")
    assert (limits.max_queued_requests, limits.max_queued_tokens) == (3, 5)
    assert (access.auth_hook, access.tls) == (None, None)


def test_the_limits_of_a_tenant_are_by_default_those_of_the_settings() -> None:
    assert load_access(config(allow_unauthenticated=True)).tenants.limits("anybody") == TenantLimits()


def test_an_authentication_hook_closes_the_server() -> None:
    access = load_access(config(auth_hook="os.path:basename"))
    assert access.auth_hook is not None
    assert not access.tenants.table.is_open
