"""A web server with an adapter, and a check that fetches leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.adapter_files import CONFIG
from support.web import LOOPBACK, Web, web_server
from turret_adapters.sources.policy import Policy
from turret_adapters.store.store import AdapterStore


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as web:
        web.pages["/poet/adapter_config.json"] = CONFIG
        web.pages["/poet/adapter_model.safetensors"] = b"tensors"
        yield web


@pytest.fixture
def policy(web: Web) -> Policy:
    return Policy(urls=(web.url,), networks=LOOPBACK)


@pytest.fixture(autouse=True)
def _nothing_is_left_over(store: AdapterStore) -> Iterator[None]:
    yield
    assert list((store.root / "staging").iterdir()) == []
