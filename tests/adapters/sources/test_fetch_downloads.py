"""What is on its way is counted while it is, and its bytes once."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterator
from ipaddress import ip_network

import pytest

from support.adapter_files import CONFIG, fetch_into
from support.web import Handler, Web, web_server
from turret_adapters.errors import AdapterSourceError
from turret_adapters.formats.files import no_progress
from turret_adapters.sources.fetch import Download, Downloads
from turret_adapters.sources.policy import Policy
from turret_adapters.store.store import AdapterStore

PATIENCE = 60.0
TENSORS = bytes(range(256)) * 4000


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as web:
        yield web


@pytest.fixture
def policy(web: Web) -> Policy:
    return Policy(urls=(web.url,), networks=(ip_network("127.0.0.0/8"),))


def test_a_download_is_there_while_it_runs_and_its_bytes_as_they_come(
    web: Web, policy: Policy, store: AdapterStore
) -> None:
    half, go_on, half_came = len(TENSORS) // 2, threading.Event(), threading.Event()

    def slow(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(TENSORS)))
        handler.end_headers()
        handler.wfile.write(TENSORS[:half])
        assert go_on.wait(PATIENCE)
        handler.wfile.write(TENSORS[half:])

    web.pages["/poet/adapter_config.json"] = CONFIG
    web.pages["/poet/adapter_model.safetensors"] = slow
    downloads = Downloads()

    def seen(done: int, _total: int | None) -> None:
        if done == len(CONFIG) + half:
            half_came.set()

    def run() -> None:
        with downloads.track("poet", seen) as progress:
            store.release(fetch_into(store, f"{web.url}/poet", policy, progress))

    thread = threading.Thread(target=run)
    thread.start()
    assert half_came.wait(PATIENCE)
    come = len(CONFIG) + half
    assert downloads.running == [Download("poet", come, len(CONFIG) + len(TENSORS))]
    assert downloads.num_bytes == come
    go_on.set()
    thread.join()
    assert (downloads.running, downloads.num_bytes) == ([], len(CONFIG) + len(TENSORS))


def test_one_that_fails_runs_no_more(policy: Policy, web: Web, store: AdapterStore) -> None:
    downloads = Downloads()
    web.pages["/poet/adapter_config.json"] = CONFIG
    with pytest.raises(AdapterSourceError), downloads.track("poet", no_progress) as progress:
        fetch_into(store, f"{web.url}/poet", policy, progress)
    assert (downloads.running, downloads.num_bytes) == ([], len(CONFIG))


def test_what_comes_in_an_archive_is_not_counted_twice(web: Web, policy: Policy, store: AdapterStore) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("adapter_config.json", CONFIG)
        archive.writestr("adapter_model.safetensors", TENSORS)
    web.pages["/poet.zip"] = data.getvalue()
    downloads = Downloads()
    with downloads.track("poet", no_progress) as progress:
        store.release(fetch_into(store, f"{web.url}/poet.zip", policy, progress))
    assert downloads.num_bytes == len(data.getvalue())


def test_downloads_that_run_at_once_are_sorted_by_name_and_each_has_its_own_bytes() -> None:
    downloads = Downloads()
    with (
        downloads.track("sailor", no_progress) as sailor,
        downloads.track("poet", no_progress) as poet,
        downloads.track("poet", no_progress),
    ):
        sailor(3, 7)
        poet(2, None)
        assert downloads.running == [Download("poet", 2), Download("poet"), Download("sailor", 3, 7)]
    assert (downloads.running, downloads.num_bytes) == ([], 5)
