from __future__ import annotations

from contextlib import ExitStack

import pytest

from turret_server.errors import TooManyCallsError
from turret_server.rpc import calls
from turret_server.rpc.calls import CallInterceptor, _header


def test_streams_without_authentication_are_bounded_and_give_their_places_back(monkeypatch):
    monkeypatch.setattr(calls, "MAX_OPEN_STREAMS", 2)
    interceptor = CallInterceptor(authenticator=None, running=None)
    for _ in range(2):
        with ExitStack() as streams:
            streams.enter_context(interceptor._open_stream())
            streams.enter_context(interceptor._open_stream())
            with pytest.raises(TooManyCallsError) as refused:
                streams.enter_context(interceptor._open_stream())
            assert (refused.value.metadata, refused.value.retry_after) == ({"limit": "2"}, 1.0)


class Context:
    """The part of gRPC's context that says what the transport knows of the client."""

    def __init__(self, names: dict[str, list[bytes]]) -> None:
        self._names = names

    def invocation_metadata(self):
        return (("a", "b"),)

    def auth_context(self):
        return self._names


def test_a_header_has_the_names_in_the_clients_certificate_and_no_other_property_of_the_transport():
    found = _header(
        Context(
            {
                "x509_common_name": [b"bolt"],
                "x509_subject_alternative_name": [b"\xff", b"bolt.example.com"],
                "transport_security_type": [b"ssl"],
            }
        ),
        "request-1",
    )
    assert found.request_id == "request-1"
    assert found.metadata == (("a", "b"),)
    assert found.identities == ("bolt", "\N{REPLACEMENT CHARACTER}", "bolt.example.com")
