from __future__ import annotations

import logging
from pathlib import Path

import pytest

from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.keys import digest_of
from turret_server.security import check_tenants, tls_files
from turret_server.tenants import parse_tenants

PEM = Path("server.pem")
OPEN = parse_tenants("FILE", b"[tenants.acme]\nweight = 2", TenantLimits())
CLOSED = parse_tenants("FILE", f'[tenants.acme]\nkeys = ["{digest_of("k")}"]'.encode(), TenantLimits())
BY_CERTIFICATE = parse_tenants("FILE", b'[tenants.acme]\nidentities = ["acme"]', TenantLimits())


def config(listen: str = "127.0.0.1:1", **settings: object) -> ServerConfig:
    return ServerConfig(model="", listen=listen, **settings)


@pytest.mark.parametrize("listen", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"])
def test_an_open_server_may_listen_to_its_own_machine(listen):
    check_tenants(config(listen), OPEN)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.168.0.1:1", "example.com:1"])
def test_an_open_server_does_not_listen_to_others_unless_told_to(listen):
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        check_tenants(config(listen), OPEN)
    check_tenants(config(listen, allow_unauthenticated=True), OPEN)
    check_tenants(config(listen), CLOSED)


def test_keys_that_go_over_a_network_in_the_clear_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        check_tenants(config("0.0.0.0:1", tls_cert=PEM, tls_key=PEM), CLOSED)
        check_tenants(config(), CLOSED)
        assert not caplog.messages
        check_tenants(config("0.0.0.0:1"), CLOSED)
    assert "--tls-cert" in caplog.text


def test_identities_need_an_authority():
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        check_tenants(config(tls_cert=PEM, tls_key=PEM), BY_CERTIFICATE)
    check_tenants(config(tls_cert=PEM, tls_key=PEM, tls_client_ca=PEM), BY_CERTIFICATE)


@pytest.mark.parametrize(
    "settings",
    [{"tls_cert": PEM}, {"tls_key": PEM}, {"tls_client_ca": PEM}, {"tls_key": PEM, "tls_client_ca": PEM}],
)
def test_half_of_the_files_are_not_enough(settings):
    assert tls_files(config()) is None
    with pytest.raises(ConfigError, match="belong together"):
        tls_files(config(**settings))
