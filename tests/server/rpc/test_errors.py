from __future__ import annotations

import asyncio
from contextvars import copy_context

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from turret_adapters.errors import AdapterNotFoundError, StoreBusyError, StoreFullError, UploadsFullError
from turret_server import errors
from turret_server.doors.caller import REQUEST_ID
from turret_server.errors import InvalidRequestError, QueueFullError, TurretError
from turret_server.rpc.calls import _bind_id
from turret_server.rpc.errors import end_with, to_status


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


def test_an_adapters_error_says_when_to_try_again_if_that_can_help():
    for error, seconds in ((StoreBusyError("busy"), 1.0), (UploadsFullError("full"), 5.0)):
        found = details(to_status(error))
        assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == seconds
    assert "RetryInfo" not in details(to_status(StoreFullError("full")))


def test_a_message_too_long_for_a_header_is_cut_between_characters():
    for beginning in ("", "x"):  # the limit is between two characters, and within one
        status = to_status(InvalidRequestError(beginning + "ü" * 5000))
        assert len(status.message.encode()) < 1100
        assert set(status.message) == {*beginning, "ü", " ", "…"}


def test_a_name_that_is_no_utf8_is_escaped():
    assert to_status(InvalidRequestError("/srv/\udcff")).message == "/srv/\\udcff"


def test_the_tree_in_the_docstring_is_the_tree():
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and value is not TurretError
    ]
    rows = [line.split()[1:] for line in (errors.__doc__ or "").splitlines() if "── " in line]
    assert sorted(rows) == sorted(
        [each.__name__, each.code, str(each.http_status), each.reason] for each in classes
    )
    assert all(each.code in code_pb2.Code.keys() for each in classes)  # noqa: SIM118 (an enum's, no dict's)


class Call:
    """The part of gRPC's context with which a call is ended."""

    def __init__(self) -> None:
        self.trailing: dict[str, object] = {}
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self):
        return ((REQUEST_ID, "request-1"),)

    def set_trailing_metadata(self, metadata):
        self.trailing = dict(metadata)

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


def ended(error) -> Call:
    call = Call()

    def run():
        _bind_id(call)
        end_with(call, error)

    copy_context().run(run)
    return call


def test_a_call_ends_with_the_status_and_the_id_in_its_trailing_metadata():
    call = ended(QueueFullError("full", retry_after=1.0, tenant="acme"))
    assert (call.code, call.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert call.trailing[REQUEST_ID] == "request-1"
    found = details(status_pb2.Status.FromString(call.trailing["grpc-status-details-bin"]))
    assert set(found) == {"ErrorInfo", "RetryInfo", "RequestInfo"}
    assert found["RequestInfo"].request_id == "request-1"


def test_an_error_of_ours_is_logged_and_its_words_stay_here(caplog):
    call = ended(ZeroDivisionError("a secret"))
    assert call.code == grpc.StatusCode.INTERNAL
    assert "secret" not in call.details
    [logged] = caplog.records
    assert logged.exc_info
    assert isinstance(logged.exc_info[1], ZeroDivisionError)


def test_what_a_client_caused_is_no_error_of_the_log(caplog):
    ended(InvalidRequestError("top_k", field="top_k"))
    assert caplog.records == []


def test_a_status_that_is_set_already_stays_and_keeps_no_frames():
    with pytest.raises(grpc.aio.AbortError) as raised:
        raise grpc.aio.AbortError("set")
    assert raised.value.__traceback__ is not None
    call = ended(raised.value)
    assert (call.code, call.details) == (None, "")
    assert raised.value.__traceback__ is None


def test_a_message_that_just_fits_is_not_cut():
    for length, cut in ((1024, False), (1025, True)):
        message = to_status(InvalidRequestError("x" * length)).message
        assert message == ("x" * 1024 + (" …" if cut else ""))


def test_a_response_that_its_client_does_not_take_ends_the_call_without_a_status(caplog):
    with caplog.at_level("INFO"), pytest.raises(asyncio.CancelledError):
        ended(grpc.aio.UsageError("ExecuteBatchError"))
    assert caplog.records == []
