from __future__ import annotations

import copy
import pickle
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
from prometheus_client import CollectorRegistry

import turret_client.errors
from support import scripted_server as script
from turret_client import (
    AdapterRef,
    AsyncClient,
    CancelledError,
    Client,
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
from turret_server.observability.metrics_server import MetricsServer

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
    with pytest.raises(
        UnavailableError, match=rf"cannot reach a Turret server at {nowhere}: no server .*turret serve"
    ):
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


@pytest.fixture(scope="module")
def certificates() -> tuple[trustme.CA, trustme.LeafCert]:
    authority = trustme.CA()
    return authority, authority.issue_cert("localhost")


@pytest.fixture
def ports(certificates) -> Iterator[dict[str, int]]:
    """Ports on which something else listens than a client expects."""
    _, leaf = certificates
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    tls = grpc.ssl_server_credentials([(leaf.private_key_pem.bytes(), chain)])
    server = grpc.server(ThreadPoolExecutor(1))
    ports = {
        "plain": server.add_insecure_port("127.0.0.1:0"),
        "tls": server.add_secure_port("127.0.0.1:0", tls),
    }
    server.start()
    with closing(MetricsServer("127.0.0.1", 0, CollectorRegistry())) as metrics:
        yield ports | {"metrics": metrics.server_port}
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("place", "host", "authority", "said"),
    [
        ("plain", "localhost", "own", "what listens there does not use TLS"),
        ("tls", "localhost", None, "it closed the connection; it has ended, or requires TLS"),
        ("tls", "localhost", "other", "its certificate is not trusted"),
        ("tls", "127.0.0.1", "own", "its certificate is for another host"),
        ("metrics", "127.0.0.1", None, "is no gRPC server; check the port: that of the metrics"),
    ],
)
def test_why_there_is_no_connection(ports, certificates, tmp_path, place, host, authority, said):
    file = tmp_path / "authority.pem"
    (certificates[0] if authority == "own" else trustme.CA()).cert_pem.write_to_path(file)
    address = f"{host}:{ports[place]}"
    refused = pytest.raises(UnavailableError, match=f"^cannot reach a Turret server at {address}: .*{said}")
    with Client(address, **({"ca": file} if authority else {})) as client, refused:
        client.list_adapters()


@pytest.mark.parametrize("host", ["nowhere.invalid:50051", "dns:///nowhere.invalid:50051"])
def test_a_host_that_is_unknown(call_at, host):
    with pytest.raises(UnavailableError, match="the host is unknown; check the address"):
        call_at(host, "list_adapters")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nowhere", "is HOST:PORT, such as 127.0.0.1:50051; found 'nowhere'"),
        ("", "is HOST:PORT"),
        ("::1", "is HOST:PORT"),
        ("host:port", "is HOST:PORT"),
        ("a b:1", "is HOST:PORT"),
        ("host:", "is HOST:PORT"),
        ("http://host:50051", "is HOST:PORT, without http://; found 'http://host:50051'; use 'host:50051'"),
        ("https://host:50051/x", "without https://; found .*; use 'host:50051' and TLS options"),
        ("host:0", "from 1 to 65535"),
        ("host:65536", "from 1 to 65535; found 'host:65536'"),
        ("[::1]:99999", "from 1 to 65535"),
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(call_at, address, said):
    with pytest.raises(InvalidArgumentError, match=said) as refused:
        call_at(address, "list_adapters")
    assert (refused.value.reason, refused.value.metadata) == ("INVALID_REQUEST", {"field": "address"})


@pytest.mark.parametrize(
    "address", ["host:1", "[::1]:65535", "ipv4:127.0.0.1:1", "unix:/tmp/socket", "a.b-c:9"]
)
def test_addresses_of_grpc_are_accepted(address):
    Client(address).close()


LONE = "a\udcff"


@pytest.mark.parametrize(
    ("method", "arguments", "options", "field", "said"),
    [
        ("generate", (b"Hello",), {}, "prompt", "text .* or token ids from 0 to 4294967295; found bytes"),
        ("stream", (LONE,), {}, "prompt", "found a lone surrogate, as in text that was not UTF-8"),
        ("generate", (None,), {}, "prompt", "found NoneType"),
        ("generate", ([1, -1],), {}, "prompt", "from 0 to 4294967295; found list"),
        ("generate", ([1.5],), {}, "prompt", "found list"),
        ("generate", ("a",), {"seed": -1}, "seed", "from 0 to 18446744073709551615; found -1"),
        ("generate", ("a",), {"max_tokens": 2**31}, "max_tokens", "to 2147483647; found 2147483648"),
        ("generate", ("a",), {"max_tokens": "5"}, "max_tokens", "an integer .*; found str"),
        ("generate", ("a",), {"temperature": "hot"}, "temperature", "a number; found str"),
        ("generate", ("a",), {"stop": "END"}, "stop", "a sequence; .* stop=\\['END'\\]"),
        (
            "generate",
            ("a",),
            {"stop": [LONE]},
            "stop",
            "stop must be text that UTF-8 .*lone surrogate",
        ),
        ("generate", ("a",), {"stop_token_ids": [-1]}, "stop_token_ids", "from 0 to 4294967295"),
        ("generate", ("a",), {"cache_salt": LONE}, "cache_salt", "a lone surrogate"),
        ("generate", ("a",), {"adapter": 5}, "adapter", "an AdapterRef, or a list of these; found 5"),
        ("generate", ("a",), {"adapter": LONE}, "name", "a lone surrogate"),
        ("generate", ("a",), {"adapter": AdapterRef(name="a", task=2**40)}, "task", "found 1099511627776"),
        ("pin_prompt", (LONE, "a"), {}, "name", "a lone surrogate"),
        ("load_adapter", ("a", LONE), {}, "path", "a lone surrogate"),
        ("load_adapter", ("a", Path("/a")), {}, "path", "found PosixPath"),
        ("set_traffic_split", ("a", "01234567", 2**40), {}, "percent", "found 1099511627776"),
        ("unpin_prompt", (5,), {}, "name", "text that UTF-8 can encode; found 5"),
    ],
)
def test_arguments_that_are_none_are_refused_as_a_server_refuses_them(
    call, server, method, arguments, options, field, said
):
    with pytest.raises(InvalidArgumentError, match=said) as refused:
        call(method, *arguments, **options)
    assert (refused.value.reason, refused.value.metadata) == ("INVALID_REQUEST", {"field": field})
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in str(refused.value)
    assert server.requests == []


def test_a_name_that_is_none_is_refused_for_an_upload(call, server, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InvalidArgumentError, match="name must be text"):
        call("upload_adapter", LONE, tmp_path)
    assert server.requests == []


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_is_closed_says_so(server, method):
    client = Client(server.address)
    client.close()
    with pytest.raises(CancelledError, match=r"^the client is closed; make another$"):
        for _ in getattr(client, method)(*METHODS[method]):
            pass
    assert server.requests == []


@pytest.mark.parametrize("method", METHODS)
async def test_an_async_client_that_is_closed_says_so(server, method):
    client = AsyncClient(server.address)
    await client.close()
    called = getattr(client, method)(*METHODS[method])
    with pytest.raises(CancelledError, match=r"^the client is closed; make another$"):
        await (anext(called) if hasattr(called, "__anext__") else called)
    assert server.requests == []


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
