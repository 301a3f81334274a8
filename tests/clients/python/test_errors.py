from __future__ import annotations

import copy
import pickle
import re
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING

import grpc
import pytest

import turret_client.errors
from support import scripted_server as script
from turret_client import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    TurretError,
    UnauthenticatedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.INTERNAL: InternalError,
}
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
METHODS = {
    "generate": ("Hello",),
    "stream": ("Hello",),
    "load_adapter": ("pirate", "/srv/pirate"),
    "unload_adapter": ("pirate",),
    "get_adapter": ("pirate",),
    "rollback_adapter": ("pirate",),
    "set_traffic_split": ("pirate", "01234567", 10),
    "watch_adapters": (),
    "list_adapters": (),
    "pin_prompt": ("rules", "Answer briefly."),
    "unpin_prompt": ("rules",),
    "list_pinned_prompts": (),
    "list_downloads": (),
}


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        yield "{}:{}".format(*unheard.getsockname())


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_every_code_has_its_class_and_keeps_what_the_server_said(call, server, code):
    server.failure = script.failure(
        code, "no adapter pirate", reason="ADAPTER_NOT_FOUND", metadata={"adapter": "pirate"}
    )
    with pytest.raises(TurretError) as caught:
        call("generate", "Hello")
    error = caught.value
    assert type(error) is CLASSES.get(code, TurretError)
    assert str(error) == error.message == "no adapter pirate"
    assert (error.reason, error.metadata, error.code) == ("ADAPTER_NOT_FOUND", {"adapter": "pirate"}, code)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_raises_turret_errors(call, server, method):
    server.failure = script.failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL")
    with pytest.raises(ResourceExhaustedError, match="full") as caught:
        call(method, *METHODS[method])
    assert caught.value.reason == "QUEUE_FULL"


@pytest.mark.parametrize("method", METHODS)
def test_no_server(call_at, nowhere, method):
    with pytest.raises(UnavailableError, match=rf"cannot reach a Turret server at {nowhere} .*turret serve"):
        call_at(nowhere, method, *METHODS[method])


def test_a_server_that_is_stopping_is_not_taken_for_none(call, server):
    server.failure = script.failure(grpc.StatusCode.UNAVAILABLE, "stopping", reason="SHUTTING_DOWN")
    with pytest.raises(UnavailableError, match=r"^stopping$"):
        call("generate", "Hello")


def test_the_server_says_when_to_try_again(call, server):
    server.failure = script.failure(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.75, request_id="r-7"
    )
    with pytest.raises(ResourceExhaustedError) as caught:
        call("generate", "Hello")
    assert (caught.value.reason, caught.value.retry_after, caught.value.request_id) == (
        "QUEUE_FULL",
        0.75,
        "r-7",
    )


def test_where_the_server_does_not_say_when_to_try_again_nobody_guesses(call, server):
    server.failure = script.failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL")
    with pytest.raises(ResourceExhaustedError) as caught:
        call("generate", "Hello")
    assert (caught.value.retry_after, caught.value.request_id) == (None, "")


def test_details_of_a_status_that_grpc_replaced_are_not_used(call, server):
    details = script.failure(grpc.StatusCode.NOT_FOUND, "no adapter", reason="ADAPTER_NOT_FOUND")
    server.failure = SimpleNamespace(
        code=grpc.StatusCode.UNAVAILABLE, details="reset", trailing_metadata=details.trailing_metadata
    )
    with pytest.raises(UnavailableError, match=r"cannot reach .* \(reset\)") as caught:
        call("generate", "Hello")
    assert caught.value.reason == ""


@pytest.mark.parametrize("method", ["generate", "stream", "pin_prompt"])
def test_timeout_is_the_deadline(call, server, method):
    server.hold = True
    with pytest.raises(DeadlineExceededError, match="within the timeout") as caught:
        call(method, *METHODS[method], timeout=0.05)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_details_of_another_domain_are_not_ours(call, server):
    server.failure = script.failure(grpc.StatusCode.INTERNAL, "oops", domain="else.where", reason="HUH")
    with pytest.raises(InternalError, match="oops") as caught:
        call("generate", "Hello")
    assert (caught.value.reason, caught.value.metadata) == ("", {})


def test_an_empty_message_is_never_shown(call, server):
    server.failure = script.failure(grpc.StatusCode.ABORTED, "")
    with pytest.raises(TurretError, match="ABORTED"):
        call("generate", "Hello")


def test_another_service_at_the_address(call_at):
    stranger = grpc.server(None)
    port = stranger.add_insecure_port("127.0.0.1:0")
    stranger.start()
    try:
        with pytest.raises(TurretError, match=r"does not implement the call"):
            call_at(f"127.0.0.1:{port}", "list_adapters")
    finally:
        stranger.stop(None).wait()


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])  # noqa: S301 -- our own
def test_errors_travel_between_processes(copied):
    error = NotFoundError("gone", reason="R", metadata={"k": "v"}, code=grpc.StatusCode.NOT_FOUND)
    twin = copied(error)
    assert (type(twin), str(twin), vars(twin)) == (NotFoundError, "gone", vars(error))


def test_the_tree_in_the_docstring_is_the_tree():
    rows = re.findall(r"[├└]── (\w+) +(\w+) ", turret_client.errors.__doc__)
    assert {
        getattr(grpc.StatusCode, code): getattr(turret_client.errors, name) for name, code in rows
    } == CLASSES
    assert all(issubclass(error, TurretError) for error in CLASSES.values())
