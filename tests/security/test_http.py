"""What comes over HTTP from who has no key, the wrong one, or one and bad intentions."""

from __future__ import annotations

import json
import random
import socket
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import httpx
import pytest

from support.prompts import until

CLEAN = {200, 400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 503}
MEBIBYTE = 1 << 20
COMPLETIONS = "/v1/completions"
EVIL = {"authorization": "Bearer evil"}
REQUEST = {"model": "evil-own", "prompt": "x", "max_tokens": 1}


@pytest.fixture
def web(place):
    with httpx.Client(base_url=place.server.http, headers=EVIL, timeout=600) as client:
        yield client


@pytest.fixture
def connect(place):
    """Opens connections, which are closed at the end of the test."""
    url = urlsplit(place.server.http)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection((url.hostname, url.port), timeout=600))


def head(path: str = COMPLETIONS, *lines: str, key: str = "evil") -> bytes:
    found = [f"POST {path} HTTP/1.1", "host: turret", f"authorization: Bearer {key}", *lines]
    return "\r\n".join(found).encode() + b"\r\n"


def send(connection: socket.socket, data: bytes) -> bool:
    """Whether the server took all of it."""
    with suppress(ConnectionError):
        connection.sendall(data)
        return True
    return False


def status_of(answer: httpx.Response) -> int:
    assert answer.status_code in CLEAN, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.text) < 4000
    return answer.status_code


def test_bodies_that_never_end(place, connect, web):
    before = place.memory()
    for _ in range(200):
        connection = connect()
        send(connection, head(COMPLETIONS, "content-length: 4000000") + b"\r\n{")
    assert status_of(web.get("/v1/models")) == 200
    assert place.memory() - before < 100 * MEBIBYTE


def test_bodies_of_strangers_are_not_read(place, connect, web):
    before = place.memory()
    for _ in range(20):
        connection = connect()
        send(connection, head(COMPLETIONS, "content-length: 4000000", key="nobody") + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        for _ in range(40):
            send(connection, b"x" * 100_000)
    assert status_of(web.get("/v1/models")) == 200
    assert place.memory() - before < 100 * MEBIBYTE


def test_headers_that_never_end(place, connect, web):
    before = place.memory()
    for line in (b"x: " + b"y" * 1000 + b"\r\n", b"x" * 1000):
        for _ in range(20):
            connection = connect()
            send(connection, head())
            for _ in range(200):
                if not send(connection, line):
                    break
    assert status_of(web.get("/v1/models")) == 200
    assert place.memory() - before < 100 * MEBIBYTE


def test_a_thousand_idle_connections(place, connect, web):
    idle = [connect() for _ in range(1000)]
    for connection in idle[::2]:
        send(connection, b"GET /v1/mod")
    assert status_of(web.post(COMPLETIONS, json=REQUEST | {"model": "shared"})) == 200
    assert place.num_open() >= 1000


def test_requests_one_behind_the_other_without_reading(connect, web):
    body = json.dumps(REQUEST).encode()
    request = head(COMPLETIONS, f"content-length: {len(body)}") + b"\r\n" + body
    for _ in range(5):
        send(connect(), request * 200)
    assert status_of(web.get("/v1/models")) == 200


def test_streams_that_are_left_at_any_time(place, connect):
    chosen = random.Random(1)
    body = json.dumps(REQUEST | {"model": "shared", "max_tokens": 100, "stream": True}).encode()
    request = head(COMPLETIONS, f"content-length: {len(body)}") + b"\r\n" + body
    for _ in range(100):
        connection = connect()
        send(connection, request[: chosen.choice((20, len(request) - 3, len(request)))])
        if chosen.random() < 0.3:
            connection.settimeout(0.05)
            with suppress(TimeoutError):
                connection.recv(100)
        connection.close()
    until(lambda: place.metrics()["turret_running_requests"] == 0)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * MEBIBYTE, b'{"a":' * 500_000, b'{"prompt": ' + b"9" * MEBIBYTE + b"}",
        b'{"prompt": [' + b"1," * MEBIBYTE + b"1]}", b'{"prompt": "' + b"\\u0041" * 600_000 + b'"}',
        json.dumps({"prompt": "x", "logit_bias": {str(each): 1 for each in range(200_000)}}).encode(),
        json.dumps({"prompt": "x", "stop": ["x"] * 500_000}).encode(),
        json.dumps({"prompt": ["x"] * 500_000}).encode(),
        json.dumps({"prompt": "x", **{f"f{each}": 1 for each in range(200_000)}}).encode(),
        json.dumps({"prompt": "x", "stop": [{}] * 500_000}).encode(),
        json.dumps({"prompt": "x", "adapters": [{"name": "a"}] * 200_000}).encode(),
        b'{"prompt": "x", "n": 1e999}', b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "\xff"}',
        b'{"prompt": "x", "prompt": 1}', b"\0" * 1000, b"",
    ],
    ids=range(17),
)  # fmt: skip
def test_bodies_that_are_hard_to_read(place, web, body):
    before = place.memory()
    assert status_of(web.post(COMPLETIONS, content=body)) == 400
    assert place.memory() - before < 300 * MEBIBYTE


_FIELDS = (
    "prompt", "model", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "stop", "seed",
    "presence_penalty", "logit_bias", "user", "top_k", "min_p", "stop_token_ids", "adapters", "echo",
    "logprobs", "response_format", "structured_outputs", "cache_salt", "priority", "messages", "tokens",
    "source", "lora_name", "lora_path", "revision", "percent",
)  # fmt: skip
_PATHS = (
    COMPLETIONS, "/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
    "/v1/adapters/evil-x/rollback", "/v1/chat/completions",
)  # fmt: skip


def any_value(chosen: random.Random, depth: int = 3) -> object:
    plain = (
        None, True, False, 0, 1, -1, 2**31, 2**64, -0.5, 1e308, "", "x", "../..", "good-lora", "evil-own",
        "base", "\N{REPLACEMENT CHARACTER}", "\0", "json_object", "a" * 200,
    )  # fmt: skip
    kind = chosen.randrange(8)
    if depth and kind == 0:
        return [any_value(chosen, depth - 1) for _ in range(chosen.randrange(4))]
    if depth and kind == 1:
        names = (*_FIELDS, "name", "json", "regex", "type", "role", "content")
        return {chosen.choice(names): any_value(chosen, depth - 1) for _ in range(chosen.randrange(4))}
    return chosen.choice(plain)


@pytest.mark.parametrize("seed", range(3))
def test_any_bodies(web, seed):
    chosen = random.Random(seed)
    for _ in range(300):
        body = {chosen.choice(_FIELDS): any_value(chosen) for _ in range(chosen.randrange(6))}
        if chosen.random() < 0.5:
            body = REQUEST | body
        body["max_tokens"] = min(body["max_tokens"], 3) if isinstance(body.get("max_tokens"), int) else 3
        status_of(web.post(chosen.choice(_PATHS), json=body))


def test_any_requests(connect, web):
    chosen = random.Random(5)
    for _ in range(200):
        parts = [
            chosen.choice((b"GET", b"POST", b"\0", b"OPTIONS", b"TRACE")), b" ",
            chosen.choice((b"/", b"*", b"http://x/", b"/%00", b"/v1/models/%2e%2e%2f", b"//" * 100)),
            chosen.choice((b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"\r\n", b" HTTP/2\r\n")),
            *(chosen.choice((b"host: x\r\n", b"content-length: -1\r\n", b"transfer-encoding: chunked\r\n",
                             b"content-length: 5\r\n", b": x\r\n", b"upgrade: websocket\r\n",
                             b"connection: upgrade\r\n", b"expect: 100-continue\r\n",
                             b"x-request-id: \xff\r\n"))
              for _ in range(chosen.randrange(6))),
            b"\r\n", chosen.randbytes(chosen.choice((0, 5, 100))),
        ]  # fmt: skip
        connection = connect()
        send(connection, b"".join(parts))
        connection.close()
    assert status_of(web.get("/v1/models")) == 200


def test_what_belongs_to_others_does_not_exist(web):
    for model in ("good-lora", "good-lora@00000000", "nobody"):
        refused = web.post(COMPLETIONS, json=REQUEST | {"model": model})
        name = model.partition("@")[0]
        unknown = f"no adapter is loaded under the name {name!r}; load it, or list those that are"
        assert refused.status_code == 404
        assert refused.json()["error"]["message"] == unknown
        for answer in (web.get(f"/v1/models/{name}"), web.delete(f"/v1/adapters/{name}")):
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == unknown
    listed = [each["id"] for each in web.get("/v1/models").json()["data"]]
    assert "good-lora" not in listed
    assert "good-lora" not in [each["name"] for each in web.get("/v1/adapters").json()["adapters"]]


def test_nothing_is_loaded_from_where_it_may_not_be(place, web):
    for source in (
        str(place.secret),
        "/etc",
        "file:///etc",
        f"{place.folder}/../good/secret",
        "hf://a/b",
        "\0",
    ):
        assert status_of(web.put("/v1/adapters/evil-x", json={"source": source})) in {400, 403, 404}
    assert status_of(web.put("/v1/adapters/good-lora", json={"source": f"{place.folder}/own"})) == 404
    assert status_of(web.put("/v1/adapters/shared", json={"source": f"{place.folder}/own"})) == 403
    for name in ("..", "%2e%2e", "a%2fb", "a" * 1000, "%00", "evil x"):
        assert status_of(web.put(f"/v1/adapters/{name}", json={"source": "/x"})) in {400, 404, 405}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer"}, {"authorization": "Basic ZXZpbA=="}, {},
        {"authorization": "Bearer nobody"}, {"authorization": "Bearer evil", "turret-tenant": "good"},
        {"turret-tenant": "good"}, {"x-api-key": "evil"},
    ],
)  # fmt: skip
def test_keys_that_open_nothing(place, headers):
    answer = httpx.get(f"{place.server.http}/v1/models", headers=headers)
    assert status_of(answer) == 401


def test_two_keys_open_nothing(connect):
    connection = connect()
    send(connection, head("/tokenize", "authorization: Bearer good", "content-length: 0") + b"\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 401")
