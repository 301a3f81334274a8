"""What each tenant may have at once, on a running server: adapters, their bytes, loads, pins and watches."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from support.prompts import PROMPT, until
from support.serving import serving
from turret_client import AdapterState, Client, ResourceExhaustedError
from turret_server.config import ServerConfig
from turret_server.tenancy.keys import digest_of

RIGHTS = 'use = ["{name}-*"]\nload = ["{name}-*"]\nunload = ["{name}-*"]\nsources = ["{sources}"]\n'
HANG_S = 60


@pytest.fixture(scope="module")
def sources(adapter_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed in range(6):
        shutil.copytree(adapter_of("llama", "lora", seed=seed), folder / f"{seed}")
    return folder


def size_of(folder) -> int:
    return sum(place.stat().st_size for place in folder.iterdir())


@pytest.fixture(scope="module")
def file(sources, tmp_path_factory):
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    limits = {
        "few": "max_adapters = 2",
        "bytes": f"max_adapter_bytes = {size_of(sources / '0') * 5 // 2}",
        "tiny": "max_adapter_bytes = 1000",
        "device": "max_device_bytes = 1",
        "loads": "max_concurrent_loads = 1",
        "pins": "max_pinned_tokens = 100",
        "watches": "max_watches = 1",
    }
    path.write_text(
        "".join(
            f'[tenants.{name}]\nkeys = ["{digest_of(name)}"]\n{limit}\n'
            + RIGHTS.format(name=name, sources=sources)
            for name, limit in limits.items()
        )
    )
    return path


@pytest.fixture(scope="module")
def served(base_of, quantised_cache, file):
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="8MiB",
        tenants=file,
        cache=quantised_cache,
    )
    with serving(config) as served:
        yield served
        served.parts.engine.check_integrity()


@pytest.fixture
def client_of(served):
    with ExitStack() as clients:
        yield lambda name: clients.enter_context(Client(served.address, api_key=name))


@contextmanager
def refused(tenant: str, quota: str, *, retry: bool = False):
    with pytest.raises(ResourceExhaustedError) as refusal:
        yield refusal
    assert refusal.value.reason == "QUOTA_EXCEEDED"
    assert refusal.value.metadata == {"tenant": tenant, "quota": quota}
    assert bool(refusal.value.retry_after) == retry


def test_a_tenant_has_so_many_adapters(client_of, sources):
    client = client_of("few")
    for number in range(2):
        client.load_adapter(f"few-{number}", str(sources / "0"))
    with refused("few", "max_adapters"):
        client.load_adapter("few-2", str(sources / "0"))
    assert [adapter.name for adapter in client.list_adapters()] == ["few-0", "few-1"]
    client.load_adapter("few-1", str(sources / "1"))
    client.unload_adapter("few-0")
    client.load_adapter("few-2", str(sources / "0"))


def test_a_tenants_adapters_take_so_many_bytes_and_earlier_revisions_go_first(client_of, sources, served):
    client = client_of("bytes")
    store = served.parts.lifecycle._library.store
    revisions = [client.load_adapter("bytes-a", str(sources / f"{number}")).revision for number in range(3)]
    assert [one.revision for one in client.get_adapter("bytes-a").history] == revisions[:0:-1]
    until(lambda: revisions[0] not in store.revisions() or revisions[0] in served_by_others(served))
    client.load_adapter("bytes-b", str(sources / "0"))
    assert [one.revision for one in client.get_adapter("bytes-a").history] == revisions[2:]
    with refused("bytes", "max_adapter_bytes") as refusal:
        client.load_adapter("bytes-c", str(sources / "1"))
    assert "adapter 'bytes-c'" in refusal.value.message
    assert client.generate(PROMPT, adapter="bytes-b", max_tokens=2).token_ids


def served_by_others(served) -> set[str]:
    return {status.spec.revision for status in served.parts.registry.statuses() if status.spec}


def test_an_upload_that_could_never_be_is_refused_before_it_comes(client_of, sources):
    with refused("tiny", "max_adapter_bytes"):
        client_of("tiny").upload_adapter("tiny-a", sources / "0")


def test_an_adapter_that_takes_more_pages_than_its_tenants_may_is_not_loaded(client_of, sources):
    with refused("device", "max_device_bytes") as refusal:
        client_of("device").load_adapter("device-a", str(sources / "0"))
    assert "may take 0 pages" in refusal.value.message


def test_a_tenants_requests_hold_so_much_of_the_arena(client_of, sources, served, file):
    client = client_of("device")
    before = file.read_text()
    try:
        file.write_text(before.replace("max_device_bytes = 1\n", ""))
        served.parts.access.tenants.look()
        # Others have none of these.
        size = client.load_adapter("device-a", str(sources / "4")).arena_bytes
        file.write_text(before.replace("max_device_bytes = 1\n", f"max_device_bytes = {size * 3 // 2}\n"))
        served.parts.access.tenants.look()
        client.load_adapter("device-b", str(sources / "5"))
        for name in ("device-a", "device-b", "device-a"):
            assert client.generate(PROMPT, adapter=name, max_tokens=2).token_ids
            states = {adapter.name: adapter.state for adapter in client.list_adapters()}
            assert [name for name, state in states.items() if state is AdapterState.RESIDENT] == [name]
        # Less than it was when they were loaded: its requests are told, and wait for nothing.
        file.write_text(before)
        served.parts.access.tenants.look()
        with refused("device", "max_device_bytes"):
            client.generate(PROMPT, adapter="device-a", max_tokens=2, timeout=HANG_S)
        assert client.generate(PROMPT, max_tokens=2).token_ids
    finally:
        file.write_text(before)
        served.parts.access.tenants.look()


def test_concurrent_loads_of_a_tenant_are_limited_with_retry_after(client_of, sources, served, monkeypatch):
    client = client_of("loads")
    fetch, begun, gate = served.parts.lifecycle._library.fetch, threading.Event(), threading.Event()

    def fetch_at_last(*arguments, **options):
        begun.set()
        assert gate.wait(HANG_S)
        return fetch(*arguments, **options)

    monkeypatch.setattr(served.parts.lifecycle._library, "fetch", fetch_at_last)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(client.load_adapter, "loads-a", str(sources / "0"))
        assert begun.wait(HANG_S)
        with refused("loads", "max_concurrent_loads", retry=True):
            client.load_adapter("loads-b", str(sources / "1"))
        with refused("loads", "max_concurrent_loads", retry=True):
            client.upload_adapter("loads-b", sources / "1")
        gate.set()
        loading.result(HANG_S)
    client.upload_adapter("loads-b", sources / "1")


def test_a_tenant_pins_so_many_tokens(client_of):
    client = client_of("pins")
    client.pin_prompt("a", list(range(3, 63)))
    with refused("pins", "max_pinned_tokens") as refusal:
        client.pin_prompt("b", list(range(3, 63)))
    assert "60 are pinned" in refusal.value.message
    client.pin_prompt("a", list(range(3, 103)))
    assert [(prompt.name, prompt.prompt_tokens) for prompt in client.list_pinned_prompts()] == [("a", 100)]
    client.unpin_prompt("a")
    client.pin_prompt("b", list(range(3, 63)))
    client.unpin_prompt("b")


def test_a_tenant_has_so_many_watches(client_of, sources):
    client, other = client_of("watches"), client_of("loads")
    # A watch yields what is there, and waits if nothing is.
    client.load_adapter("watches-a", str(sources / "0"))
    other.load_adapter("loads-watched", str(sources / "0"))
    watch = client.watch_adapters()
    next(watch)
    with refused("watches", "max_watches"):
        next(client.watch_adapters())
    watches = [other.watch_adapters() for _ in range(2)]
    for each in watches:
        next(each)
        each.close()
    other.unload_adapter("loads-watched")
    watch.close()

    def again() -> bool:
        try:
            next(client.watch_adapters())
        except ResourceExhaustedError:
            return False
        return True

    until(again)
