from __future__ import annotations

from contextvars import copy_context

import pytest

from turret_server import logs
from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError, UnauthenticatedError
from turret_server.rpc.caller import REQUEST_ID, CallAuthentication, bind_request_id, caller, request_id
from turret_server.tenancy.auth import Authenticator
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants_file import TenantsFile


class Call:
    """The part of gRPC's context that is used: metadata in both directions."""

    def __init__(self, *sent: str) -> None:
        self._metadata = (("user-agent", "x"), *((REQUEST_ID, value) for value in sent))
        self.trailing: tuple[tuple[str, str], ...] = ()

    def invocation_metadata(self):
        return self._metadata

    def set_trailing_metadata(self, metadata):
        self.trailing = metadata


def bind(call):
    """As in the task of a call: the id, where it is known, and what is logged."""

    def run():
        found = bind_request_id(call)
        return found, request_id(), logs.bound()

    return copy_context().run(run)


@pytest.mark.parametrize("sent", ["a", "A-z0:9/=+@._", "x" * 128])
def test_a_call_has_the_clients_id(sent):
    call = Call(sent)
    found, current, bound = bind(call)
    assert found == current == sent
    assert bound["request_id"] == sent
    assert call.trailing == ((REQUEST_ID, sent),)


def test_a_call_without_an_id_gets_a_new_one():
    first, second = bind(Call()), bind(Call())
    assert len(first[0]) == 32
    assert first[0] != second[0]


@pytest.mark.parametrize("sent", [("",), ("x" * 129,), ("a b",), ("a\n",), ("ü",), ("a", "b"), ("a", "a")])
def test_an_invalid_id_is_refused_and_replaced(sent):
    call = Call(*sent)

    def run():
        with pytest.raises(InvalidRequestError, match=REQUEST_ID) as refused:
            bind_request_id(call)
        return refused.value.metadata, request_id()

    metadata, current = copy_context().run(run)
    assert metadata == {"field": REQUEST_ID}
    assert call.trailing == ((REQUEST_ID, current),)
    assert current not in sent
    assert len(current) == 32


class AuthenticatedCall(Call):
    """A call whose transport verified a certificate."""

    def __init__(self, *metadata: tuple[str, str], names: dict[str, list[bytes]] | None = None) -> None:
        super().__init__()
        self._metadata = metadata
        self._names = names or {}

    def auth_context(self):
        return self._names


@pytest.fixture
def tenants(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(
        f"""
        [tenants.acme]
        keys = ["{digest_of("acme-key")}"]
        [tenants.bolt]
        identities = ["bolt", "bolt.example.com"]
        """
    )
    return TenantsFile(path, TenantLimits())


@pytest.fixture
def authenticator(tenants):
    return Authenticator(tenants, None, lambda _: None)


async def test_a_call_is_its_callers_from_its_metadata(authenticator):
    metadata = (("authorization", "Bearer acme-key"), ("traceparent", "00-1"))
    await CallAuthentication(authenticator, AuthenticatedCall(*metadata), "request-1").renew()
    assert (caller().tenant.name, caller().request_id, caller().metadata) == ("acme", "request-1", metadata)
    assert logs.bound()["tenant"] == "acme"


@pytest.mark.parametrize(
    "names",
    [
        {"x509_common_name": [b"bolt"]},
        {"x509_subject_alternative_name": [b"\xff", b"bolt.example.com"]},
    ],
)
async def test_a_call_is_its_callers_from_its_certificate(authenticator, names):
    await CallAuthentication(authenticator, AuthenticatedCall(names=names), "request-1").renew()
    assert caller().tenant.name == "bolt"


async def test_other_properties_of_the_transport_authenticate_nobody(authenticator):
    call = AuthenticatedCall(names={"transport_security_type": [b"bolt"]})
    with pytest.raises(UnauthenticatedError):
        await CallAuthentication(authenticator, call, "request-1").renew()


async def test_a_long_call_is_authenticated_again_when_the_tenants_file_has_changed(authenticator, tenants):
    call = AuthenticatedCall(("authorization", "Bearer acme-key"))
    authentication = CallAuthentication(authenticator, call, "request-1")
    await authentication.renew()
    first = caller()
    await authentication.renew()
    assert caller() is first
    tenants._path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("acme-key")}"]\nuse = ["*"]')
    tenants.look()
    await authentication.renew()
    assert caller().tenant.may_use("pirate")
    assert not first.tenant.may_use("pirate")
    tenants._path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("another")}"]')
    tenants.look()
    for _ in range(2):
        with pytest.raises(UnauthenticatedError):
            await authentication.renew()
