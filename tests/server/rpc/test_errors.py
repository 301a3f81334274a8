from __future__ import annotations

import pytest
from google.rpc import code_pb2, error_details_pb2

from turret_adapters.errors import AdapterNotFoundError
from turret_server import errors
from turret_server.errors import InvalidRequestError, QueueFullError, TurretError
from turret_server.rpc.errors import to_status


def details(status) -> dict[str, object]:
    """The details by the names of their types."""
    found = {}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2])()
        assert detail.Unpack(message)
        found[type(message).__name__] = message
    return found


def test_an_error_says_its_code_its_reason_and_what_it_is_about():
    status = to_status(InvalidRequestError("top_k is 0 or more", field="top_k"))
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert status.message == "top_k is 0 or more"
    assert details(status) == {
        "ErrorInfo": error_details_pb2.ErrorInfo(
            reason="INVALID_REQUEST", domain="turret", metadata={"field": "top_k"}
        )
    }


def test_an_adapters_error_has_no_metadata():
    info = details(to_status(AdapterNotFoundError("no adapter is loaded under the name 'pirate'")))
    assert info == {"ErrorInfo": error_details_pb2.ErrorInfo(reason="ADAPTER_NOT_FOUND", domain="turret")}


@pytest.mark.parametrize("seconds", [0.1, 1.25, 60.0])
def test_a_full_queue_says_when_to_try_again(seconds):
    status = to_status(QueueFullError("full", retry_after=seconds, tenant="acme"))
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    found = details(status)
    assert found["ErrorInfo"].metadata == {"tenant": "acme"}
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == seconds


def test_a_message_too_long_for_a_header_is_cut_between_characters():
    status = to_status(InvalidRequestError("ü" * 5000))
    assert len(status.message.encode()) < 1100
    assert set(status.message) == {"ü", " ", "…"}


def test_the_tree_in_the_docstring_is_the_tree():
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and value is not TurretError
    ]
    rows = [line.split()[1:] for line in (errors.__doc__ or "").splitlines() if "── " in line]
    assert sorted(rows) == sorted([each.__name__, each.code, each.reason] for each in classes)
    assert all(each.code in code_pb2.Code.keys() for each in classes)  # noqa: SIM118 (an enum's, no dict's)
