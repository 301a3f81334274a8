from __future__ import annotations

import pytest

from turret_server.engine.admission import TenantLimits
from turret_server.errors import ConfigError
from turret_server.tenants import read_tenants

DEFAULT = TenantLimits(weight=1.0, max_queued_requests=7, max_queued_tokens=700)


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes):
        path = tmp_path / "tenants.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_without_a_file_every_tenant_has_the_defaults():
    assert read_tenants(None, DEFAULT)("anybody") is DEFAULT


def test_a_table_says_what_is_different_for_its_tenant(write):
    limits = read_tenants(
        write(
            """
            [tenants.acme]
            weight = 2.5
            max_queued_requests = 100
            max_queued_tokens = 200_000
            [tenants."small.one"]
            max_queued_requests = 1
            """
        ),
        DEFAULT,
    )
    assert limits("acme") == TenantLimits(weight=2.5, max_queued_requests=100, max_queued_tokens=200_000)
    assert limits("small.one") == TenantLimits(max_queued_requests=1, max_queued_tokens=700)
    assert limits("nobody") is DEFAULT


def test_a_whole_number_is_a_weight(write):
    assert read_tenants(write("[tenants.acme]\nweight = 3"), DEFAULT)("acme").weight == 3


def test_an_empty_file_changes_nothing(write):
    assert read_tenants(write(""), DEFAULT)("acme") is DEFAULT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[tenants.acme", "expected a TOML file"),
        (b"\xff\xfe", "expected a TOML file"),
        ("[acme]\nweight = 1", r"expected tables named \[tenants.NAME\]"),
        ("tenants = 3", r"expected tables named \[tenants.NAME\]"),
        ("[tenants]\nacme = 3", r"acme: expected a table \[tenants.NAME\], found 3"),
        ("[tenants.acme]\nwait = 1", "acme: 'wait' is not known; there are max_queued_requests, "),
        ("[tenants.acme]\nweight = 0", "acme: weight is a number above 0; found 0"),
        ("[tenants.acme]\nweight = -1.0", "weight is a number above 0"),
        ("[tenants.acme]\nweight = nan", "weight is a number above 0"),
        ("[tenants.acme]\nweight = inf", "weight is a number above 0"),
        ('[tenants.acme]\nweight = "2"', "weight is a number above 0; found '2'"),
        ("[tenants.acme]\nweight = true", "weight is a number above 0; found True"),
        ("[tenants.acme]\nmax_queued_requests = 0", "max_queued_requests is a whole number above 0"),
        ("[tenants.acme]\nmax_queued_requests = 1.5", "max_queued_requests is a whole number above 0; found 1.5"),
        ("[tenants.acme]\nmax_queued_tokens = true", "max_queued_tokens is a whole number above 0"),
    ],
)
def test_what_a_tenants_file_cannot_say_is_named(write, content, said):
    path = write(content)
    with pytest.raises(ConfigError, match=said) as refused:
        read_tenants(path, DEFAULT)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml: expected a TOML file"):
        read_tenants(tmp_path / "missing.toml", DEFAULT)
