"""A server that asks an authorisation server whose a call is, with the hook in `deploy` as it is."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import grpc
import pytest

from support.prompts import PROMPT
from support.serving import server_process
from turret_client import Client, NotFoundError, UnauthenticatedError, UnavailableError
from turret_server.tenancy.keys import digest_of

HOOKS = Path(__file__).parents[2] / "deploy"


class Introspection(BaseHTTPRequestHandler):
    """Knows two tokens of RFC 7662; breaks over another."""

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        [token] = form["token"]
        if token == "breaks":
            self.send_error(500)
            return
        clients = {"acme-token": "acme", "new-token": "newcomer"}
        answer = {"active": token in clients, "client_id": clients.get(token, "")}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(base_of, adapter_of, quantised_cache, tmp_path_factory):
    file = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    file.write_text(
        f"""
        [tenants.acme]
        use = ["acme-*"]
        load = ["acme-*"]
        sources = ["{adapter_of("llama", "lora")}"]
        [tenants.bolt]
        keys = ["{digest_of("turret_bolt")}"]
        """
    )
    introspection = ThreadingHTTPServer(("127.0.0.1", 0), Introspection)
    thread = threading.Thread(target=introspection.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{introspection.server_port}/introspect"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HOOKS))
        patch.setenv("INTROSPECTION_URL", url)
        hook = ("--auth-hook", "introspection_hook:tenant_of")
        arguments = ("--tenants", str(file), *hook, "--memory", "8MiB")
        with server_process(base_of("llama"), quantised_cache, *arguments) as server:
            yield server.address
    introspection.shutdown()
    thread.join()
    introspection.server_close()


def test_a_token_names_a_tenant_with_the_rights_of_the_file(address, adapter_of):
    with Client(address, api_key="acme-token") as acme, Client(address, api_key="new-token") as newcomer:
        acme.load_adapter("acme-poet", str(adapter_of("llama", "lora")))
        assert acme.generate(PROMPT, adapter="acme-poet", max_tokens=2).token_ids
        assert newcomer.generate(PROMPT, max_tokens=2).token_ids
        with pytest.raises(NotFoundError):
            newcomer.generate(PROMPT, adapter="acme-poet", max_tokens=2)


def test_a_token_that_is_over_is_refused_in_the_hooks_words(address):
    with Client(address, api_key="old") as client, pytest.raises(UnauthenticatedError, match="sign in again"):
        client.list_adapters()


def test_keys_of_the_file_go_on_and_nobody_else_does(address):
    with Client(address, api_key="turret_bolt") as bolt:
        assert bolt.generate(PROMPT, max_tokens=2).token_ids
    for tenant in (None, "acme"):
        with Client(address, tenant=tenant) as nobody, pytest.raises(UnauthenticatedError):
            nobody.list_adapters()


def test_when_the_auth_hook_fails_calls_are_refused_without_its_details(address):
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/turret.v1.AdapterService/ListAdapters").future(
            b"", metadata=(("authorization", "Bearer breaks"),)
        )
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        assert "500" not in call.details()
    with Client(address, api_key="breaks", tenant=None) as client, pytest.raises(UnavailableError) as refused:
        client.list_adapters()
    assert refused.value.reason == "AUTH_UNAVAILABLE"
