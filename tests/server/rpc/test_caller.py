from __future__ import annotations

from contextvars import copy_context

import pytest

from turret_server import logs
from turret_server.errors import InvalidRequestError
from turret_server.rpc.caller import REQUEST_ID, bind_request_id, request_id


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
