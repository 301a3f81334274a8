"""The way of every call through the HTTP door, without a port."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from server.web.conftest import Generation, chunk, last
from turret_server.engine.admission import TenantLimits
from turret_server.errors import GenerationFailedError
from turret_server.lifecycle.adapter_info import AdapterInfo, AdapterState
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants_file import TenantsFile
from turret_server.web import gate

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Ahoy"}
PUBLIC = ("/health", "/ping", "/version", "/docs", "/openapi.json")


@pytest.fixture
def tenants(tmp_path):
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("key")}"]')
    return TenantsFile(path, TenantLimits())


class Connection:
    """A call whose client a test plays, message by message."""

    def __init__(self, app, path=COMPLETIONS, headers=(), method="POST"):
        self.sent = []
        self.incoming = asyncio.Queue()
        self.has_sent = asyncio.Event()
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": list(headers), "state": {}, "root_path": "",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self.incoming.get, self._send))

    async def _send(self, message):
        self.sent.append(message)
        self.has_sent.set()

    def give(self, body: bytes, *, more: bool = False) -> None:
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.sent[1:])


async def test_every_call_has_an_id_which_the_client_may_choose(door):
    for path in (*PUBLIC, "/v1/nothing"):
        assert (await door.get(path, **{"x-request-id": "mine"})).headers["x-request-id"] == "mine"
        refused = await door.get(path, **{"x-request-id": "two words"})
        assert refused.status_code == 400
        assert len(refused.headers["x-request-id"]) == 32
    await door.post(COMPLETIONS, BODY, **{"x-request-id": "mine"})
    assert door.generation.callers[0].request_id == "mine"


async def test_a_caller_is_authenticated_before_the_body_is_read(open_door, tenants):
    door = open_door(tenants=tenants)
    connection = Connection(door.app)
    await connection.task  # no body ever comes
    assert connection.status == 401
    assert door.generation.requests == []


async def test_a_key_and_a_tenant_are_headers(open_door, tenants):
    door = open_door(tenants=tenants)
    assert (await door.post(COMPLETIONS, BODY, authorization="Bearer key")).status_code == 200
    assert door.generation.callers[0].tenant.name == "acme"
    other = {"authorization": "Bearer key", "turret-tenant": "bolt"}
    for headers in ({"authorization": "Bearer other"}, other, {}):
        refused = await door.post(COMPLETIONS, BODY, **headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    door = open_door()
    await door.post(COMPLETIONS, BODY, **{"turret-tenant": "bolt"})
    assert door.generation.callers[0].tenant.name == "bolt"


async def test_what_anybody_may_know_needs_no_key_and_nothing_else_goes_without(open_door, tenants):
    door = open_door(tenants=tenants)
    for path in PUBLIC:
        assert (await door.get(path)).status_code == 200
    for path in ("/v1/models", "/v1/adapters", "/v1/nothing", "/health/"):
        assert (await door.get(path)).status_code == 401


async def test_calls_are_counted_and_new_ones_refused_while_the_server_drains(door):
    counts = []

    class Counting(Generation):
        async def generate(self, *_):
            counts.append(door.calls.num_running)
            yield last()

    door.generation.generate = Counting().generate
    await door.post(COMPLETIONS, BODY)
    assert (counts, door.calls.num_running) == ([1], 0)
    door.calls.refuse()
    refused = await door.post(COMPLETIONS, BODY)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (await door.get("/ping")).status_code == 200


async def test_a_server_that_is_not_ready_says_so(door):
    assert (await door.get("/health")).status_code == 200
    door.health.is_ready = False
    assert (await door.get("/health")).status_code == 503
    assert (await door.get("/ping")).status_code == 200
    door.health.is_alive = False
    assert (await door.get("/ping")).status_code == 503


class Held(Generation):
    """Holds its request after the first chunk until it is cancelled."""

    def __init__(self, *, before_first: bool = False) -> None:
        super().__init__()
        self.before_first = before_first
        self.closed = asyncio.Event()
        self.begun = asyncio.Event()

    async def generate(self, *_):
        try:
            self.begun.set()
            if not self.before_first:
                yield chunk("Ahoy")
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ['"a"', '["a", "b"]'])
async def test_a_client_that_leaves_ends_its_call(open_door, stream, prompt):
    door = open_door(generation=Held())
    connection = Connection(door.app)
    connection.give(f'{{"prompt": {prompt}, "stream": {str(stream).lower()}}}'.encode())
    await door.generation.begun.wait()
    if stream:
        await connection.has_sent.wait()
    connection.leave()
    await connection.task
    assert door.generation.closed.is_set()
    assert door.calls.num_running == 0
    assert not any(b"error" in each.get("body", b"") for each in connection.sent)


async def test_a_client_that_leaves_within_its_body_ends_its_call(door):
    connection = Connection(door.app)
    connection.give(b'{"prompt":', more=True)
    connection.leave()
    await connection.task
    assert (connection.sent, door.generation.requests) == ([], [])


async def test_the_disconnect_that_follows_an_answer_is_none(door):
    """uvicorn reports one to whoever waits when the answer is complete."""
    connection = Connection(door.app)
    connection.give(b'{"prompt": "a"}')
    await connection.has_sent.wait()
    connection.leave()
    await connection.task
    assert connection.status == 200
    assert not connection.task.cancelled()


@pytest.mark.parametrize("before_first", [True, False])
async def test_calls_that_the_server_ends_are_told_so(open_door, before_first):
    door = open_door(generation=Held(before_first=before_first))
    connection = Connection(door.app)
    connection.give(b'{"prompt": "a", "stream": true}')
    await door.generation.begun.wait()
    if not before_first:
        await connection.has_sent.wait()
    door.calls.end()
    await connection.task
    assert b"shutting_down" in connection.body
    assert connection.status == (503 if before_first else 200)
    assert not connection.sent[-1].get("more_body", False)


async def test_an_error_within_a_stream_is_its_last_event(open_door):
    door = open_door(generation=Generation(chunk("Ahoy"), error=GenerationFailedError("lost")))
    answer = await door.post(COMPLETIONS, BODY | {"stream": True})
    events = answer.text.strip().split("\n\n")
    assert '"text":"Ahoy"' in events[0]
    assert '"message": "lost"' in events[1]
    assert events[2] == "data: [DONE]"


async def test_an_error_before_the_first_event_has_a_status(open_door):
    class Failing(Generation):
        async def generate(self, *_):
            raise GenerationFailedError("lost")
            yield

    answer = await open_door(generation=Failing()).post(COMPLETIONS, BODY | {"stream": True})
    assert answer.status_code == 500


async def test_a_stream_ends_when_its_key_is_taken_away(open_door, tenants):
    go_on = asyncio.Event()

    class Later(Generation):
        async def generate(self, *_):
            yield chunk("Ahoy")
            await go_on.wait()
            yield last("never")

    door = open_door(tenants=tenants, generation=Later())
    connection = Connection(door.app, headers=[(b"authorization", b"Bearer key")])
    connection.give(b'{"prompt": "a", "stream": true}')
    await connection.has_sent.wait()
    tenants._path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("another")}"]')
    tenants.look()
    go_on.set()
    await connection.task
    assert b"invalid_api_key" in connection.body
    assert b"never" not in connection.body


async def test_bodies_have_a_size(door, monkeypatch):
    monkeypatch.setattr(gate, "MAX_MESSAGE_BYTES", 100)
    async with door.client() as client:
        for method, path in (("POST", COMPLETIONS), ("PUT", "/v1/adapters/pirate")):
            refused = await client.request(method, path, json={"prompt": "x" * 100})
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    connection = Connection(door.app)  # which does not say how large its body will be
    for _ in range(2):
        connection.give(b" " * 60, more=True)
    await connection.task
    assert connection.status == 413
    connection = Connection(door.app, headers=[(b"content-length", b"101")])
    await connection.task  # nothing of it has come
    assert connection.status == 413


async def test_an_archive_is_read_by_its_handler_and_may_be_larger(open_door, monkeypatch):
    monkeypatch.setattr(gate, "MAX_MESSAGE_BYTES", 10)
    received = []

    async def upload_archive(name, chunks, caller):
        received.extend([name, caller.tenant.name, b"".join([chunk async for chunk in chunks])])
        return AdapterInfo(name=name, state=AdapterState.STAGED)

    door = open_door(administration=SimpleNamespace(upload_archive=upload_archive))
    async with door.client(**{"turret-tenant": "acme"}) as client:
        answer = await client.put("/v1/adapters/pirate/archive", content=b"x" * 1000)
    assert answer.json()["name"] == "pirate"
    assert received == ["pirate", "acme", b"x" * 1000]


async def test_a_client_that_leaves_within_an_archive_ends_its_call(open_door):
    received = []

    async def upload_archive(_name, chunks, _caller):
        received.extend([chunk async for chunk in chunks])

    door = open_door(administration=SimpleNamespace(upload_archive=upload_archive))
    connection = Connection(door.app, "/v1/adapters/pirate/archive", method="PUT")
    connection.give(b"half", more=True)
    connection.leave()
    await connection.task
    assert (connection.sent, received) == ([], [])


async def test_a_body_comes_in_time(door, monkeypatch):
    monkeypatch.setattr(gate, "READ_SECONDS", 0.01)
    connection = Connection(door.app)
    connection.give(b'{"prompt":', more=True)
    await connection.task
    assert connection.status == 408


async def test_web_pages_call_only_where_their_origin_is_allowed(open_door):
    """A browser names the page, also where a request needs no permission of the server beforehand."""
    page = {"origin": "https://evil.example.com"}
    for origins, status in (
        ((), 403),
        (("https://a.example.com",), 403),
        ((page["origin"],), 200),
        (("*",), 200),
    ):
        door = open_door(origins=origins)
        answer = await door.post(COMPLETIONS, BODY, **page)
        assert answer.status_code == status
        assert ("access-control-allow-origin" in answer.headers) is (status == 200)
        assert bool(door.generation.requests) is (status == 200)


async def test_a_browser_is_told_what_a_page_may_do(open_door):
    preflight = {"origin": "https://a.example.com", "access-control-request-method": "POST"}
    async with open_door(origins=("https://a.example.com",)).client(**preflight) as client:
        answer = await client.options(COMPLETIONS)
    assert answer.headers["access-control-allow-origin"] == "https://a.example.com"
    async with open_door().client(**preflight) as client:
        answer = await client.options(COMPLETIONS)
    assert answer.status_code == 403


async def test_paths_that_do_not_exist_name_those_that_do(door):
    for path in ("/v1/responses", "/v1/images/edits", "/v1/audio/speech", "/nothing", "/v1/completions/"):
        refused = await door.post(path, {})
        assert refused.status_code == 404
        assert path in refused.json()["error"]["message"]
        assert "/v1/completions" in refused.json()["error"]["message"]
    refused = await door.get(COMPLETIONS)
    assert (refused.status_code, refused.json()["error"]["message"]) == (405, "this path is served with POST")
