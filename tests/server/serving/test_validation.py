from __future__ import annotations

import pytest

from turret.v1 import inference_pb2
from turret_server.errors import InvalidRequestError
from turret_server.serving.validation import check_cache_salt, check_priority, named_tenant


def test_a_call_is_made_for_the_tenant_that_its_metadata_names():
    metadata = (("user-agent", "grpc-python/1"), ("turret-tenant", "acme.de_1-x"), ("grpc-bin", b"\xff"))
    assert named_tenant(metadata) == "acme.de_1-x"


def test_a_call_may_name_no_tenant():
    assert named_tenant((("user-agent", "grpc-python/1"),)) is named_tenant(()) is None


@pytest.mark.parametrize("name", ["", "a b", ".hidden", "x" * 129, "a/b"])
def test_a_name_that_no_tenant_can_have_is_refused(name):
    with pytest.raises(InvalidRequestError, match="a tenant's name") as refused:
        named_tenant((("turret-tenant", name),))
    assert refused.value.metadata == {"field": "turret-tenant"}


def test_a_call_for_two_tenants_is_refused():
    with pytest.raises(InvalidRequestError, match="one tenant"):
        named_tenant((("turret-tenant", "acme"), ("turret-tenant", "other")))
    assert named_tenant((("turret-tenant", "acme"), ("turret-tenant", "acme"))) == "acme"


@pytest.mark.parametrize("priority", [-10, 0, 10])
def test_priorities_in_their_range_are_handed_on(priority):
    assert check_priority(inference_pb2.GenerateRequest(priority=priority)) == priority


@pytest.mark.parametrize("priority", [-11, 11, 2**31 - 1, -(2**31)])
def test_a_priority_out_of_its_range_is_refused(priority):
    with pytest.raises(InvalidRequestError, match=rf"from -10 to 10; found {priority}") as refused:
        check_priority(inference_pb2.GenerateRequest(priority=priority))
    assert refused.value.metadata == {"field": "priority"}


@pytest.mark.parametrize("salt", ["", "pepper", "ü" * 128])
def test_a_salt_is_counted_in_characters(salt):
    assert check_cache_salt(inference_pb2.GenerateRequest(cache_salt=salt)) == salt


def test_a_salt_that_is_too_long_is_refused():
    with pytest.raises(InvalidRequestError, match="128 characters; found 129") as refused:
        check_cache_salt(inference_pb2.GenerateRequest(cache_salt="x" * 129))
    assert refused.value.metadata == {"field": "cache_salt"}
