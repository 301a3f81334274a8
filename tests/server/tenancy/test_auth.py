from __future__ import annotations

import pytest

from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError, UnauthenticatedError
from turret_server.tenancy.auth import Authenticator, CallHeader, claimed_tenant, tenant_of
from turret_server.tenancy.auth_hook import AuthHook
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants import parse_tenants
from turret_server.tenancy.tenants_file import TenantsFile

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
    tenant = tenant_of(OPEN, metadata)
    assert (tenant.name, tenant.proven) == (name, False)


def test_on_an_open_server_tenants_share_cached_prompts_and_keep_their_limits():
    acme, new = (tenant_of(OPEN, [("turret-tenant", name)]) for name in ("acme", "new"))
    assert acme.share_cache
    assert acme.cache_domain == new.cache_domain
    assert (acme.limits.weight, new.limits) == (2, TenantLimits())


def test_on_an_open_server_a_key_is_of_no_interest():
    assert tenant_of(OPEN, [bearer("anything")]).name == "default"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_key_says_whose_a_call_is(scheme):
    tenant = tenant_of(CLOSED, [("user-agent", "x"), ("authorization", f"{scheme} bolt-key")])
    assert (tenant.name, tenant.proven) == ("bolt", True)


def test_a_certificate_says_whose_a_call_is():
    assert tenant_of(CLOSED, (), ["common name", "acme.example.com"]).name == "acme"


def test_a_certificate_that_is_nobodys_does_not_stand_in_the_way_of_a_key():
    assert tenant_of(CLOSED, [bearer("bolt-key")], ["client.example.com"]).name == "bolt"


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
        tenant_of(CLOSED, metadata, identities)


@pytest.mark.parametrize(
    ("metadata", "identities", "named", "cause"),
    [
        ([], [], None, "no_key"),
        ([("turret-tenant", "acme")], ["other.example.com"], None, "no_key"),
        ([bearer("wrong")], [], None, "unknown_key"),
        ([bearer("wrong")], ["acme.example.com"], None, "unknown_key"),
        ([("authorization", "Basic acme-key")], [], None, "malformed"),
        ([bearer(" ")], [], None, "malformed"),
        ([bearer("acme-key"), bearer("bolt-key")], [], None, "malformed"),
        ([bearer("acme-key"), ("turret-tenant", "bolt")], [], None, "mismatch"),
        ([bearer("bolt-key")], ["acme.example.com"], None, "mismatch"),
        ([("turret-tenant", "bolt")], [], "acme", "mismatch"),
    ],
)
def test_a_refusal_has_its_cause(metadata, identities, named, cause):
    with pytest.raises(UnauthenticatedError) as refused:
        tenant_of(CLOSED, metadata, identities, named)
    assert refused.value.metadata == {"cause": cause}


def test_a_key_may_have_spaces_around_it():
    assert tenant_of(CLOSED, [bearer("  bolt-key ")]).name == "bolt"


def test_the_hooks_answer_overrides_key_and_certificate():
    assert tenant_of(CLOSED, [bearer("bolt-key")], ["acme.example.com"], "new").name == "new"
    assert tenant_of(CLOSED, [bearer("wrong"), ("turret-tenant", "new")], [], "new").proven


def test_refusals_do_not_tell_who_exists():
    def refusal(*metadata: tuple[str, str]) -> str:
        with pytest.raises(UnauthenticatedError) as refused:
            tenant_of(CLOSED, metadata)
        return str(refused.value)

    for key in ("x", "acme-key"):
        there, nowhere = (refusal(bearer(key), ("turret-tenant", name)) for name in ("bolt", "nobody"))
        assert there == nowhere


def test_a_name_that_no_tenant_can_have_is_an_invalid_request():
    with pytest.raises(InvalidRequestError):
        tenant_of(CLOSED, [bearer("acme-key"), ("turret-tenant", "a/b")])


def test_a_call_is_made_for_the_tenant_that_its_metadata_names():
    metadata = (("user-agent", "grpc-python/1"), ("turret-tenant", "acme.de_1-x"), ("grpc-bin", b"\xff"))
    assert claimed_tenant(metadata) == "acme.de_1-x"


def test_a_call_may_name_no_tenant():
    assert claimed_tenant((("user-agent", "grpc-python/1"),)) is claimed_tenant(()) is None


@pytest.mark.parametrize("name", ["", "a b", ".hidden", "x" * 129, "a/b"])
def test_a_name_that_no_tenant_can_have_is_refused(name):
    with pytest.raises(InvalidRequestError, match="a tenant's name") as refused:
        claimed_tenant((("turret-tenant", name),))
    assert refused.value.metadata == {"field": "turret-tenant"}


def test_a_call_for_two_tenants_is_refused():
    with pytest.raises(InvalidRequestError, match="one tenant"):
        claimed_tenant((("turret-tenant", "acme"), ("turret-tenant", "other")))
    assert claimed_tenant((("turret-tenant", "acme"), ("turret-tenant", "acme"))) == "acme"


@pytest.fixture
def tenants(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("acme-key")}"]\nidentities = ["acme.example.com"]')
    return TenantsFile(path, TenantLimits())


async def test_a_caller_has_its_tenant_and_what_the_door_knows_of_the_call(tenants):
    refused = []
    authenticator = Authenticator(tenants, None, refused.append)
    metadata = (bearer("acme-key"), ("traceparent", "00-1"))
    caller = await authenticator.authenticate(CallHeader(request_id="r1", metadata=metadata))
    assert (caller.tenant.name, caller.request_id, caller.metadata) == ("acme", "r1", metadata)
    by_certificate = CallHeader(request_id="r2", identities=("acme.example.com",))
    assert (await authenticator.authenticate(by_certificate)).tenant.name == "acme"
    assert refused == []


async def test_each_refusal_is_reported_once_and_raised(tenants):
    refused = []
    authenticator = Authenticator(tenants, None, refused.append)
    with pytest.raises(UnauthenticatedError) as raised:
        await authenticator.authenticate(CallHeader(request_id="r1"))
    assert refused == [raised.value]


async def test_the_hook_is_asked_with_the_header_and_its_refusals_are_reported(tenants):
    asked, refused = [], []

    async def hook(metadata, identities):
        asked.append((metadata, identities))
        if not metadata:
            raise UnauthenticatedError("sign in again")
        return "bolt"

    authenticator = Authenticator(tenants, AuthHook("x:y", hook), refused.append)
    header = CallHeader(request_id="r1", metadata=(("token", "t"),), identities=("acme.example.com",))
    assert (await authenticator.authenticate(header)).tenant.name == "bolt"
    assert asked == [(header.metadata, header.identities)]
    with pytest.raises(UnauthenticatedError, match="sign in again"):
        await authenticator.authenticate(CallHeader(request_id="r2"))
    assert [str(error) for error in refused] == ["sign in again"]


def test_another_version_of_the_tenants_file_shows(tenants):
    authenticator = Authenticator(tenants, None, lambda _: None)
    before = authenticator.version
    tenants.look()
    assert authenticator.version is before is not None
    tenants._path.write_text(f'[tenants.bolt]\nkeys = ["{digest_of("bolt-key")}"]')
    tenants.look()
    assert authenticator.version is not before
