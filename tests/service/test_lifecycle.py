"""Adapters come and go while requests run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest

from support.prompts import PROMPT, until
from turret_client import AdapterMethod, AdapterState, Generation, NotFoundError, TurretError


@pytest.fixture
def loaded(client, adapter_of):
    """An adapter of its own, which the test may replace and unload."""
    client.load_adapter("mine", str(adapter_of("llama", "lora", seed=5)))
    yield "mine"
    if any(adapter.name == "mine" for adapter in client.list_adapters()):
        client.unload_adapter("mine")


@pytest.fixture
def running(client, loaded, gate):
    """Requests on the adapter that do not get on until the block ends."""

    @contextmanager
    def run(count: int) -> Iterator[list[Future[Generation]]]:
        with ThreadPoolExecutor(count) as pool, gate.closed():
            ask = partial(client.generate, PROMPT, adapter=loaded, max_tokens=60)
            requests = [pool.submit(ask) for _ in range(count)]
            until(lambda: client.get_adapter(loaded).active_requests == count)
            yield requests

    return run


def test_an_adapter_says_what_it_is(client, loaded, served):
    adapter = client.get_adapter(loaded)
    assert adapter.method is AdapterMethod.LORA
    assert adapter.max_rank == 5
    assert adapter.num_virtual_tokens == 0
    assert adapter.arena_bytes % served.parts.arena.page_bytes == 0
    assert adapter.arena_bytes >= 4 * adapter.num_parameters
    assert [adapter.name for adapter in client.list_adapters()] == [
        "lora", "mine", "p-tuning", "prefix", "prompt"
    ]  # fmt: skip
    assert client.get_adapter("prefix").num_virtual_tokens == 7


def test_a_loaded_adapter_becomes_resident_before_a_request_asks_for_it(client, loaded):
    until(lambda: client.get_adapter(loaded).state is AdapterState.RESIDENT)


def test_a_swap_leaves_running_requests_on_their_revision(client, loaded, adapter_of, running):
    old = client.generate(PROMPT, adapter=loaded, max_tokens=60)
    with running(3) as requests:
        swapped = client.load_adapter(loaded, str(adapter_of("llama", "lora", seed=1)))
        assert swapped.revision != old.revision
        assert swapped.draining_revisions == (old.revision,)

    new = client.generate(PROMPT, adapter=loaded, max_tokens=60)
    assert new.revision == swapped.revision
    assert new.token_ids != old.token_ids
    assert [request.result() for request in requests] == [
        replace(old, usage=request.result().usage) for request in requests
    ]
    until(lambda: client.get_adapter(loaded).draining_revisions == ())


def test_loading_the_same_content_again_changes_nothing(client, loaded, adapter_of):
    before = client.get_adapter(loaded)
    assert client.load_adapter(loaded, str(adapter_of("llama", "lora", seed=5))).revision == before.revision
    assert client.get_adapter(loaded).draining_revisions == ()


def test_unloading_in_use_lets_running_requests_end_and_refuses_new_ones(client, loaded, served, running):
    whole = client.generate(PROMPT, adapter=loaded, max_tokens=60)
    with running(1) as requests:
        assert client.unload_adapter(loaded).state is AdapterState.DRAINING
        assert client.get_adapter(loaded).state is AdapterState.DRAINING
        with pytest.raises(NotFoundError) as refused:
            client.generate(PROMPT, adapter=loaded)
        assert refused.value.reason == "ADAPTER_NOT_FOUND"
    assert [request.result().text for request in requests] == [whole.text]

    until(lambda: all(adapter.name != loaded for adapter in client.list_adapters()))
    with pytest.raises(NotFoundError):
        client.get_adapter(loaded)
    until(lambda: not served.parts.engine.is_resident(whole.revision))


def test_an_unloaded_adapter_gives_its_pages_back(client, adapter_of, served):
    until(lambda: served.metric("turret_running_requests") == 0)
    before = served.metric("turret_arena_pages", owner="lora")
    client.load_adapter("another", str(adapter_of("llama", "lora-attention")))
    until(lambda: served.metric("turret_arena_pages", owner="lora") > before)
    assert client.unload_adapter("another").state is AdapterState.UNLOADED
    until(lambda: served.metric("turret_arena_pages", owner="lora") == before)


def test_a_folder_that_changes_after_loading_changes_no_answer(client, adapter_of, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_of("llama", "lora"), folder)
    client.load_adapter("copied", str(folder))
    before = client.generate(PROMPT, adapter="copied", max_tokens=10)
    shutil.rmtree(folder)
    assert client.generate(PROMPT, adapter="copied", max_tokens=10).token_ids == before.token_ids
    client.unload_adapter("copied")


def test_a_load_that_fails_leaves_the_name_as_it_was(client, loaded, adapter_of, tmp_path):
    before = client.generate(PROMPT, adapter=loaded, max_tokens=10)
    broken = tmp_path / "adapter"
    shutil.copytree(adapter_of("llama", "lora", seed=1), broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    for path, reason in ((broken, "ADAPTER_INVALID"), (tmp_path, "ADAPTER_SOURCE_NOT_FOUND")):
        with pytest.raises(TurretError) as refused:
            client.load_adapter(loaded, str(path))
        assert refused.value.reason == reason
    assert [each.revision for each in client.get_adapter(loaded).history] == [before.revision]
    assert client.generate(PROMPT, adapter=loaded, max_tokens=10).token_ids == before.token_ids
