from __future__ import annotations

from contextvars import copy_context

import pytest

from turret_server import logs
from turret_server.doors.caller import REQUEST_ID, CallAuthentication, bind_request_id, caller, request_id
from turret_server.engine.admission import TenantLimits
from turret_server.errors import InvalidRequestError, UnauthenticatedError
from turret_server.tenancy.auth import Authenticator, CallHeader
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants_file import TenantsFile


class Call:
    """Header fields, and the id that the answer has."""

    def __init__(self, *sent: str) -> None:
        self.metadata = (("user-agent", "x"), *((REQUEST_ID, value) for value in sent))
        self.returned: str | None = None

    def bind(self):
        def return_it(found):
            self.returned = found

        return bind_request_id(self.metadata, return_it)


def bind(call):
    """As in the task of a call: the id, where it is known, and what is logged."""

    def run():
        found = call.bind()
        return found, request_id(), logs.bound()

    return copy_context().run(run)


@pytest.mark.parametrize("sent", ["a", "A-z0:9/=+@._", "x" * 128])
def test_a_call_has_the_clients_id(sent):
    call = Call(sent)
    found, current, bound = bind(call)
    assert found == current == sent
    assert bound["request_id"] == sent
    assert call.returned == sent


def test_a_call_without_an_id_gets_a_new_one():
    first, second = bind(Call()), bind(Call())
    assert len(first[0]) == 32
    assert first[0] != second[0]


@pytest.mark.parametrize("sent", [("",), ("x" * 129,), ("a b",), ("a\n",), ("ü",), ("a", "b"), ("a", "a")])
def test_an_invalid_id_is_refused_and_replaced(sent):
    call = Call(*sent)

    def run():
        with pytest.raises(InvalidRequestError, match=REQUEST_ID) as refused:
            call.bind()
        return refused.value.metadata, request_id()

    metadata, current = copy_context().run(run)
    assert metadata == {"field": REQUEST_ID}
    assert call.returned == current
    assert current not in sent
    assert len(current) == 32


def header(*metadata: tuple[str, str], identities: tuple[str, ...] = ()) -> CallHeader:
    return CallHeader(request_id="request-1", metadata=metadata, identities=identities)


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
    await CallAuthentication(authenticator, header(*metadata)).renew()
    assert (caller().tenant.name, caller().request_id, caller().metadata) == ("acme", "request-1", metadata)
    assert logs.bound()["tenant"] == "acme"


async def test_a_call_is_its_callers_from_its_certificate(authenticator):
    await CallAuthentication(authenticator, header(identities=("x", "bolt.example.com"))).renew()
    assert caller().tenant.name == "bolt"


async def test_a_long_call_is_authenticated_again_when_the_tenants_file_has_changed(authenticator, tenants):
    authentication = CallAuthentication(authenticator, header(("authorization", "Bearer acme-key")))
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
