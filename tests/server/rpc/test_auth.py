from __future__ import annotations

import pytest

from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError, UnauthenticatedError
from turret_server.rpc.auth import authenticate
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants import parse_tenants

OPEN = parse_tenants("FILE", b"[tenants.acme]\nweight = 2", TenantLimits())
CLOSED = parse_tenants(
    "FILE",
    f"""
    [tenants.acme]
    keys = ["{digest_of("acme-key")}"]
    identities = ["acme.example.com"]
    [tenants.bolt]
    keys = ["{digest_of("bolt-key")}"]
    """.encode(),
    TenantLimits(),
)


def bearer(key: str) -> tuple[str, str]:
    return ("authorization", f"Bearer {key}")


@pytest.mark.parametrize(
    ("metadata", "name"),
    [((), "default"), ((("turret-tenant", "acme"),), "acme"), ((("turret-tenant", "new"),), "new")],
)
def test_on_an_open_server_a_call_says_whose_it_is(metadata, name):
    tenant = authenticate(OPEN, metadata)
    assert (tenant.name, tenant.proven) == (name, False)


def test_on_an_open_server_a_key_is_of_no_interest():
    assert authenticate(OPEN, [bearer("anything")]).name == "default"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_says_whose_a_call_is(scheme):
    tenant = authenticate(CLOSED, [("user-agent", "x"), ("authorization", f"{scheme} bolt-key")])
    assert (tenant.name, tenant.proven) == ("bolt", True)


def test_a_certificate_says_whose_a_call_is():
    assert authenticate(CLOSED, (), ["common name", "acme.example.com"]).name == "acme"


def test_a_certificate_that_is_nobodys_does_not_stand_in_the_way_of_a_key():
    assert authenticate(CLOSED, [bearer("bolt-key")], ["client.example.com"]).name == "bolt"


@pytest.mark.parametrize(
    ("metadata", "identities"),
    [
        ([], []),
        ([], ["other.example.com"]),
        ([("turret-tenant", "acme")], []),
        ([bearer("wrong")], []),
        ([bearer("wrong")], ["acme.example.com"]),
        ([bearer(digest_of("acme-key"))], []),
        ([bearer("")], []),
        ([bearer(" ")], []),
        ([("authorization", "acme-key")], []),
        ([("authorization", "Basic acme-key")], []),
        ([bearer("acme-key"), bearer("bolt-key")], []),
        ([bearer("acme-key"), ("turret-tenant", "bolt")], []),
        ([bearer("bolt-key")], ["acme.example.com"]),
        ([("turret-tenant", "bolt")], ["acme.example.com"]),
    ],
)
def test_whoever_is_nobody_or_says_to_be_another_is_refused(metadata, identities):
    with pytest.raises(UnauthenticatedError):
        authenticate(CLOSED, metadata, identities)


def test_refusals_do_not_tell_who_exists():
    def refusal(*metadata: tuple[str, str]) -> str:
        with pytest.raises(UnauthenticatedError) as refused:
            authenticate(CLOSED, metadata)
        return str(refused.value)

    for key in ("x", "acme-key"):
        there, nowhere = (refusal(bearer(key), ("turret-tenant", name)) for name in ("bolt", "nobody"))
        assert there == nowhere


def test_a_name_that_no_tenant_can_have_is_an_invalid_request():
    with pytest.raises(InvalidRequestError):
        authenticate(CLOSED, [bearer("acme-key"), ("turret-tenant", "a/b")])
