from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
import trustme

from turret_client import AsyncClient, Client, InvalidArgumentError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

HELLO = [{"role": "user", "content": "Hello"}]
CALLS = {
    "generate": ("Hello",),
    "chat": (HELLO,),
    "tokenize": ("Hello",),
    "detokenize": ((1, 2),),
    "embed": (["Hello"],),
    "classify": (["Hello"],),
    "tag": (["Hello"],),
    "score": ([("Hello", "Goodbye")],),
    "model": (),
    "load_adapter": ("pirate", "/srv/pirate"),
    "unload_adapter": ("pirate",),
    "get_adapter": ("pirate",),
    "rollback_adapter": ("pirate",),
    "set_traffic_split": ("pirate", "01234567", 10),
    "list_adapters": (),
    "pin_prompt": ("rules", "Answer briefly."),
    "unpin_prompt": ("rules",),
    "list_pinned_prompts": (),
    "list_downloads": (),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter to upload."""
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    return tmp_path


def call_all(address: str, folder: Path, **options: str | None) -> None:
    with Client(address, **options) as client:
        for method, arguments in CALLS.items():
            getattr(client, method)(*arguments)
        client.upload_adapter("pirate", folder)
        list(client.stream("Hello"))
        list(client.stream_chat(HELLO))
        list(client.watch_adapters())


def call_all_async(address: str, folder: Path, **options: str | None) -> None:
    async def run() -> None:
        async with AsyncClient(address, **options) as client:
            for method, arguments in CALLS.items():
                await getattr(client, method)(*arguments)
            await client.upload_adapter("pirate", folder)
            for stream in (client.stream("Hello"), client.stream_chat(HELLO)):
                async with aclosing(stream) as chunks:
                    assert [chunk async for chunk in chunks]
            async with aclosing(client.watch_adapters()) as adapters:
                assert [adapter async for adapter in adapters]

    asyncio.run(run())


NUM_CALLS = len(CALLS) + 4
EVERY_CALL = pytest.mark.parametrize("call_every", [call_all, call_all_async], ids=["Client", "AsyncClient"])


def test_every_method_is_called(server, folder):
    call_all(server.address, folder)
    methods = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    assert methods == {*CALLS, "upload_adapter", "stream", "stream_chat", "watch_adapters"}


@EVERY_CALL
@pytest.mark.parametrize("tenant", ["acme", None])
def test_every_call_names_the_tenant(server, folder, call_every, tenant):
    call_every(server.address, folder, tenant=tenant)
    assert server.tenants == [tenant] * NUM_CALLS


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("tenant", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "a\nb", "\x00"])
def test_a_tenant_that_grpc_cannot_send_is_refused(client, tenant):
    with pytest.raises(InvalidArgumentError, match="tenant") as refused:
        client("127.0.0.1:1", tenant=tenant)
    assert refused.value.metadata == {"field": "turret-tenant"}


@pytest.fixture(autouse=True)
def _no_key_around(monkeypatch):
    monkeypatch.delenv("TURRET_API_KEY", raising=False)


@EVERY_CALL
@pytest.mark.parametrize("api_key", ["turret_secret", None])
def test_every_call_sends_the_api_key(server, folder, call_every, api_key):
    call_every(server.address, folder, api_key=api_key)
    assert server.authorizations == [api_key and f"Bearer {api_key}"] * NUM_CALLS


def test_the_environments_api_key_is_the_default(server, monkeypatch):
    monkeypatch.setenv("TURRET_API_KEY", "around")
    for options in ({}, {"api_key": "given"}, {"api_key": ""}):
        with Client(server.address, **options) as client:
            client.generate("Hello")
    assert server.authorizations == ["Bearer around", "Bearer given", None]


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_an_api_key_that_grpc_cannot_send_is_refused_and_not_shown(client):
    with pytest.raises(InvalidArgumentError, match="API key") as refused:
        client("127.0.0.1:1", api_key="secret\n")
    assert refused.value.metadata == {"field": "authorization"}
    assert "secret" not in refused.value.message


@pytest.fixture(scope="module")
def pems(tmp_path_factory) -> dict[str, Path]:
    """A certificate authority, a client's certificate and its key, as options of a client."""
    folder, authority = tmp_path_factory.mktemp("pems"), trustme.CA()
    issued = authority.issue_cert("client")
    contents = {
        "ca": authority.cert_pem,
        "cert": issued.cert_chain_pems[0],
        "key": issued.private_key_pem,
    }
    for name, content in contents.items():
        content.write_to_path(str(folder / name))
    return {name: folder / name for name in contents}


@pytest.mark.parametrize("given", [("tls",), ("ca",), ("cert", "key"), ("ca", "cert", "key")], ids="+".join)
def test_every_tls_option_encrypts_the_connection(server, pems, given):
    """A server without TLS is not understood."""
    options = {"tls": True, **pems}
    encrypted = Client(server.address, **{name: options[name] for name in given})
    with encrypted as client, pytest.raises(UnavailableError):
        client.generate("Hello")
    assert server.requests == []
    with Client(server.address, tls=False, ca=None, cert=None, key=None) as client:
        assert client.generate("Hello").text


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(("given", "missing"), [("cert", "key"), ("key", "cert")])
def test_a_certificate_needs_its_key(client, pems, given, missing):
    with pytest.raises(InvalidArgumentError, match=f"{missing} is missing") as refused:
        client("127.0.0.1:1", **{given: pems[given]})
    assert refused.value.metadata == {"field": missing}


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_an_unknown_connection_option_is_refused(client):
    with pytest.raises(TypeError, match="apikey"):
        client("127.0.0.1:1", apikey="x")
