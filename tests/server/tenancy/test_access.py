from __future__ import annotations

import pytest

from turret_adapters.errors import (
    AdapterNotFoundError,
    NamesCorruptError,
    RevisionCorruptError,
    RevisionNotFoundError,
    SourceForbiddenError,
    StoreBusyError,
    StoreFailedError,
    StoreFullError,
)
from turret_adapters.registry import AdapterRegistry
from turret_server.engine.admission import TenantLimits
from turret_server.errors import PermissionDeniedError
from turret_server.tenancy.access import (
    check_change,
    check_source,
    check_unload,
    check_use,
    errors_visible_to,
)
from turret_server.tenancy.tenants import Tenant

ACME = Tenant(
    name="acme", limits=TenantLimits(), use=("acme-*", "shared"), load=("acme-*", "new"), unload=("acme-*",)
)


def test_what_a_tenant_may_not_use_is_answered_like_what_is_not_there():
    with pytest.raises(AdapterNotFoundError) as hidden:
        check_use(ACME, ["acme-x", "bolt-x"])
    with pytest.raises(AdapterNotFoundError) as missing:
        AdapterRegistry().status("bolt-x")
    assert str(hidden.value) == str(missing.value)


@pytest.mark.parametrize("check", [check_change, check_unload])
def test_what_a_tenant_may_see_but_not_change_is_denied_and_all_else_is_not_there(check):
    check(ACME, "acme-x")
    with pytest.raises(PermissionDeniedError, match="'acme' may use adapter 'shared', but not"):
        check(ACME, "shared")
    with pytest.raises(AdapterNotFoundError):
        check(ACME, "bolt-x")


def test_to_load_a_tenant_need_not_see():
    check_change(ACME, "new")


@pytest.fixture
def folders(tmp_path):
    for name in ("acme/one", "bolt/one"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "acme" / "link").symlink_to(tmp_path / "bolt" / "one")
    return tmp_path


def test_a_tenant_loads_only_from_its_own_places(folders):
    sources = (str(folders / "acme"), "hf://acme", "https://models.example.com/acme/")
    tenant = Tenant(name="acme", limits=TenantLimits(), sources=sources)
    for source in (
        str(folders / "acme" / "one"),
        "acme/one",
        "hf://acme/one@abc",
        "https://models.example.com/acme/one.zip",
    ):
        check_source(tenant, source)
    for source in (
        str(folders / "bolt" / "one"),
        str(folders / "acme" / ".." / "bolt" / "one"),
        str(folders / "acme" / "link"),
        str(folders / "nowhere"),
        "bolt/one",
        "https://models.example.com/acmes/one.zip",
        "https://other.example.com/acme/one.zip",
    ):
        with pytest.raises(SourceForbiddenError):
            check_source(tenant, source)


def test_an_admin_loads_from_wherever_the_server_may():
    check_source(Tenant(name="root", limits=TenantLimits(), admin=True), "/anywhere")


@pytest.mark.parametrize(
    "error", [NamesCorruptError, RevisionCorruptError, StoreBusyError, StoreFailedError, StoreFullError]
)
def test_paths_of_the_store_are_for_administrators(error):
    told = error("store '/srv/turret': no such file")
    with pytest.raises(error, match="ask the server's operator") as hidden, errors_visible_to(ACME):
        raise told
    assert "/srv" not in str(hidden.value)
    admin = Tenant(name="root", limits=TenantLimits(), admin=True)
    with pytest.raises(error, match="/srv/turret"), errors_visible_to(admin):
        raise told


@pytest.mark.parametrize(
    ("name", "why", "said"),
    [
        ("acme-x", "/srv/secret", "not loaded: /srv/secret"),
        ("shared", "/srv/secret", "not loaded"),
        ("shared", "", "not loaded"),
        ("", "", "not loaded"),
    ],
)
def test_why_an_adapter_is_missing_is_for_those_who_may_load_it(name, why, said):
    with pytest.raises(AdapterNotFoundError) as missing, errors_visible_to(ACME):
        raise AdapterNotFoundError("not loaded", name=name, why=why)
    assert str(missing.value) == said


def test_other_errors_stay_as_they_are():
    told = RevisionNotFoundError("there is no such revision")
    with pytest.raises(RevisionNotFoundError) as raised, errors_visible_to(ACME):
        raise told
    assert raised.value is told
