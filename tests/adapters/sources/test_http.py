"""Adapters on the web: which hosts and redirects are followed, and what becomes of answers that fail."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_network
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from support.adapter_files import fetch_into, revision
from support.web import LOOPBACK, Handler, Web
from turret_adapters.errors import (
    AdapterSourceError,
    SourceForbiddenError,
    SourceUnavailableError,
)
from turret_adapters.sources import http as http_source
from turret_adapters.sources.policy import Policy
from turret_adapters.store.store import AdapterStore


def test_by_default_nothing_is_fetched(web: Web, store: AdapterStore, tmp_path: Path) -> None:
    for source in (f"{web.url}/poet", "hf://owner/name", "owner/name", "s3://bucket/poet", str(tmp_path)):
        with pytest.raises(SourceForbiddenError, match="no source of this kind is allowed"):
            fetch_into(store, source, Policy())
    assert web.asked == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"]
)
def test_an_allowed_url_of_an_address_within_is_refused(host: str, web: Web, store: AdapterStore) -> None:
    url = f"http://{host}:{web.server_port}"
    with pytest.raises(SourceForbiddenError, match="expected a public address"):
        fetch_into(store, f"{url}/poet", Policy(urls=("http://", "https://", url)))
    assert web.asked == []


def test_the_address_that_is_checked_is_the_one_that_is_connected_to(
    web: Web, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, *rest: int, **more: int) -> object:
        """Answers with another address each time, as a hostile name server does."""
        if host != "rebinding.example":
            return real(host, *rest, **more)
        looked_up.append(host)
        return real("127.0.0.1" if len(looked_up) > 1 else "127.9.9.9", *rest, **more)

    monkeypatch.setattr(http_source.socket, "getaddrinfo", rebinding)
    url = f"http://rebinding.example:{web.server_port}"
    allowed = Policy(urls=(url,), networks=(ip_network("127.9.9.9/32"),))
    with pytest.raises(SourceUnavailableError):
        fetch_into(store, f"{url}/poet", allowed)
    assert web.asked == []
    with pytest.raises(SourceForbiddenError, match=r"found 127\.0\.0\.1"):
        fetch_into(store, f"{url}/poet", allowed)
    assert looked_up == ["rebinding.example"] * 2


def test_redirects_are_followed_within_what_is_allowed(web: Web, policy: Policy, store: AdapterStore) -> None:
    web.pages["/moved/adapter_config.json"] = lambda it: it.answer(302, Location="/poet/adapter_config.json")
    web.pages["/moved/adapter_model.safetensors"] = lambda it: it.answer(
        308, Location=f"{web.url}/poet/adapter_model.safetensors"
    )
    assert fetch_into(store, f"{web.url}/moved", policy) == revision()


@pytest.mark.parametrize(
    "target",
    [
        "http://localhost:{port}/poet/x",
        "file:///etc/passwd",
        "/poet/../x",
        "//evil.example/x",
        "https://127.0.0.1/x",
    ],
)
def test_redirects_elsewhere_are_refused(target: str, web: Web, policy: Policy, store: AdapterStore) -> None:
    location = target.format(port=web.server_port)
    web.pages["/moved/adapter_config.json"] = lambda it: it.answer(302, Location=location)
    with pytest.raises(
        (SourceForbiddenError, AdapterSourceError), match=r"expected a URL|found HTTP status 404"
    ):
        fetch_into(store, f"{web.url}/moved", policy)
    assert web.asked[0] == "/moved/adapter_config.json"
    assert all(".." not in path for path in web.asked)


def test_a_redirect_to_an_address_within_is_refused(web: Web, store: AdapterStore) -> None:
    web.pages["/moved/adapter_config.json"] = lambda it: it.answer(
        302, Location=f"http://127.0.0.2:{web.server_port}/poet/adapter_config.json"
    )
    policy = Policy(urls=("http://",), networks=(ip_network("127.0.0.1/32"),))
    with pytest.raises(SourceForbiddenError, match=r"found 127\.0\.0\.2"):
        fetch_into(store, f"{web.url}/moved", policy)


def test_redirects_without_end_end(web: Web, policy: Policy, store: AdapterStore) -> None:
    web.pages["/moved/adapter_config.json"] = lambda it: it.answer(302, Location=it.path)
    with pytest.raises(AdapterSourceError, match="HTTP status 302"):
        fetch_into(store, f"{web.url}/moved", policy)
    assert len(web.asked) == http_source.MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, AdapterSourceError),
        (403, AdapterSourceError),
        (206, AdapterSourceError),
        (429, SourceUnavailableError),
        (503, SourceUnavailableError),
    ],
)
def test_answers_without_a_file(
    status: int, error: type[Exception], web: Web, policy: Policy, store: AdapterStore
) -> None:
    web.pages["/poet/adapter_model.safetensors"] = lambda it: it.answer(status, b"tensors")
    with pytest.raises(error, match=f"found HTTP status {status}") as refusal:
        fetch_into(store, f"{web.url}/poet?token=secret", policy)
    assert "secret" not in str(refusal.value)
    assert store.revisions() == {}


def test_an_encoded_answer_is_refused(web: Web, policy: Policy, store: AdapterStore) -> None:
    web.pages["/poet/adapter_model.safetensors"] = lambda it: it.answer(200, b"x", Content_Encoding="gzip")
    with pytest.raises(AdapterSourceError, match="without content encoding, found 'gzip'"):
        fetch_into(store, f"{web.url}/poet", policy)


def test_an_answer_that_breaks_off_is_not_stored(web: Web, policy: Policy, store: AdapterStore) -> None:
    def break_off(it: Handler) -> None:
        it.close_connection = True
        it.answer(200, b"ten", Content_Length="7")

    web.pages["/poet/adapter_model.safetensors"] = break_off
    with pytest.raises(SourceUnavailableError, match="try again later"):
        fetch_into(store, f"{web.url}/poet", policy)
    assert store.revisions() == {}


@pytest.mark.parametrize("where", ["headers", "body", "silence"])
def test_a_host_that_drips_is_cut_off(where: str, web: Web, store: AdapterStore) -> None:
    given_up, outlasted = threading.Event(), threading.Event()

    def drip(it: Handler) -> None:
        it.close_connection = True
        if where == "body":
            it.send_response(200)
            it.end_headers()
        with contextlib.suppress(OSError):  # until we hang up
            for _ in range(500):
                if given_up.wait(0.02):
                    return
                if where != "silence":
                    it.wfile.write(b"x")
            outlasted.set()

    web.pages["/poet/adapter_model.safetensors"] = drip
    policy = Policy(urls=(web.url,), networks=LOOPBACK, timeout=0.3)
    with pytest.raises(SourceUnavailableError):
        fetch_into(store, f"{web.url}/poet", policy)
    given_up.set()
    assert not outlasted.is_set()


def test_nobody_at_home(store: AdapterStore) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(SourceUnavailableError):
            fetch_into(store, f"{url}/poet", Policy(urls=(url,), networks=LOOPBACK))


def test_a_host_without_address(store: AdapterStore) -> None:
    with pytest.raises(SourceUnavailableError, match="does not resolve"):
        fetch_into(store, "https://absent.invalid/poet", Policy(urls=("https://",)))


def several(*addresses: str) -> Callable[..., object]:
    """A name server on which `several.example` has these addresses."""
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> object:
        if host != "several.example":
            return real(host, *rest, **more)
        return [found for address in addresses for found in real(address, *rest, **more)]

    return look_up


def test_of_several_addresses_the_first_that_answers_is_used(
    web: Web, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_source.socket, "getaddrinfo", several("127.9.9.9", "127.0.0.1", "127.8.8.8"))
    url = f"http://several.example:{web.server_port}"
    assert fetch_into(store, f"{url}/poet", Policy(urls=(url,), networks=LOOPBACK)) == revision()
    monkeypatch.setattr(http_source.socket, "getaddrinfo", several("127.9.9.9", "127.8.8.8"))
    with pytest.raises(SourceUnavailableError) as refused:
        fetch_into(store, f"{url}/poet", Policy(urls=(url,), networks=LOOPBACK))
    assert "does not resolve" not in str(refused.value)
    monkeypatch.setattr(http_source.socket, "getaddrinfo", several())
    with pytest.raises(SourceUnavailableError, match="does not resolve"):
        fetch_into(store, f"{url}/poet", Policy(urls=(url,), networks=LOOPBACK))


def test_a_host_is_refused_if_any_of_its_addresses_is_within(
    web: Web, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_source.socket, "getaddrinfo", several("127.0.0.1", "10.0.0.1"))
    url = f"http://several.example:{web.server_port}"
    with pytest.raises(SourceForbiddenError, match=r"'several\.example': .*found 10\.0\.0\.1"):
        fetch_into(store, f"{url}/poet", Policy(urls=(url,), networks=LOOPBACK))
    assert web.asked == []


def test_a_host_that_is_silent_has_failed_although_time_is_left(
    web: Web, policy: Policy, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up, outlasted = threading.Event(), threading.Event()

    def be_silent(it: Handler) -> None:
        it.close_connection = True
        if not given_up.wait(20):
            outlasted.set()

    web.pages["/poet/adapter_model.safetensors"] = be_silent
    monkeypatch.setattr(http_source, "SILENCE_SECONDS", 0.05)
    with pytest.raises(SourceUnavailableError):
        fetch_into(store, f"{web.url}/poet", policy)
    given_up.set()
    assert not outlasted.is_set()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_followed_as_often_as_allowed(
    status: int, web: Web, policy: Policy, store: AdapterStore
) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    hops = [*(f"hop{number}" for number in range(http_source.MAX_REDIRECTS)), "poet"]
    for hop, following in pairwise(hops):
        for name in names:
            web.pages[f"/{hop}/{name}"] = lambda it, to=f"/{following}/{name}": it.answer(status, Location=to)
    assert fetch_into(store, f"{web.url}/hop0", policy) == revision()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (408, SourceUnavailableError),
        (425, SourceUnavailableError),
        (500, SourceUnavailableError),
        (599, SourceUnavailableError),
        (201, AdapterSourceError),
        (410, AdapterSourceError),
        (499, AdapterSourceError),
    ],
)
def test_a_retry_is_advised_where_it_may_help(
    status: int, error: type[Exception], web: Web, policy: Policy, store: AdapterStore
) -> None:
    web.pages["/poet/adapter_config.json"] = lambda it: it.answer(status)
    with pytest.raises(error) as refusal:
        fetch_into(store, f"{web.url}/poet", policy)
    assert ("try again later" in str(refusal.value)) == (error is SourceUnavailableError)
