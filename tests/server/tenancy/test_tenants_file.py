from __future__ import annotations

import logging

import pytest

from support.prompts import until
from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants_file import TenantsFile

DEFAULT = TenantLimits()
ACME = f'[tenants.acme]\nkeys = ["{digest_of("acme")}"]\n'
BOLT = f'[tenants.bolt]\nkeys = ["{digest_of("bolt")}"]\n'


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(ACME)
    return path


def knows(tenants: TenantsFile) -> list[str]:
    return [name for name in ("acme", "bolt") if tenants.table.by_key(name)]


def test_without_a_file_every_tenant_has_the_defaults_and_nothing_is_looked_at():
    with TenantsFile(None, DEFAULT) as tenants:
        assert tenants.limits("anybody") is DEFAULT
        assert tenants.table.is_open


def test_a_changed_file_holds_without_a_restart(path):
    with TenantsFile(path, DEFAULT) as tenants:
        assert knows(tenants) == ["acme"]
        path.write_text(BOLT + "weight = 3")
        until(lambda: knows(tenants) == ["bolt"])
        assert tenants.limits("bolt").weight == 3


def test_a_link_that_comes_to_point_elsewhere_is_a_change(path, tmp_path):
    other, link = tmp_path / "other.toml", tmp_path / "link.toml"
    other.write_text(BOLT)
    link.symlink_to(path)
    tenants = TenantsFile(link, DEFAULT)
    link.unlink()
    link.symlink_to(other)
    tenants.look()
    assert knows(tenants) == ["bolt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[tenants.acme", "expected a TOML file"),
        ("[tenants.acme]\nweight = 0", "weight"),
        # As it is while somebody writes it: a file without keys would let everybody in.
        ("", "would open the server"),
        ("[tenants.acme]\n", "would open the server"),
        (None, "No such file"),
    ],
)
def test_an_invalid_file_changes_nothing_and_is_logged_once(path, caplog, content, said):
    tenants = TenantsFile(path, DEFAULT)
    path.unlink() if content is None else path.write_text(content)
    with caplog.at_level(logging.ERROR):
        tenants.look()
        tenants.look()
    assert knows(tenants) == ["acme"]
    [told] = caplog.messages
    assert said in told
    path.write_text(ACME + BOLT)
    tenants.look()
    assert knows(tenants) == ["acme", "bolt"]


def test_the_same_error_after_a_valid_file_is_logged_again(path, caplog):
    tenants = TenantsFile(path, DEFAULT)
    for content in ("[", BOLT, "["):
        path.write_text(content)
        tenants.look()
    assert sum(record.levelno == logging.ERROR for record in caplog.records) == 2


def test_a_file_that_is_not_there_at_the_start_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml: expected a TOML file"):
        TenantsFile(tmp_path / "missing.toml", DEFAULT)


def test_with_a_hook_the_last_key_may_go_and_the_server_stays_closed(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("k")}"]\nuse = ["*"]\nmax_device_bytes = 7')
    with TenantsFile(path, DEFAULT, hooked=True) as tenants:
        assert tenants.max_device_bytes("acme") == 7
        path.write_text('[tenants.acme]\nuse = ["acme-*"]')
        tenants.look()
        assert tenants.table.by_key("k") is None
        assert not tenants.table.is_open
        assert tenants.max_device_bytes("acme") is None


def test_a_program_that_ends_does_not_wait_for_the_next_look(path):
    with TenantsFile(path, DEFAULT) as tenants:
        assert tenants._thread.daemon
