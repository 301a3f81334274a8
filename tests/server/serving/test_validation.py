from __future__ import annotations

import pytest

from turret.v1 import inference_pb2
from turret_server.errors import InvalidRequestError
from turret_server.serving.validation import check_cache_salt, check_priority


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
