"""Who watches adapters sees every change of them, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.prompts import PROMPT
from turret_client import (
    Adapter,
    AdapterState,
    AsyncClient,
    Client,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from turret_server.lifecycle import watches


class Watcher:
    """What one call was told, as it comes."""

    def __init__(self, address: str) -> None:
        self._told: queue.Queue[Adapter | Exception] = queue.Queue()
        self._client = Client(address)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        try:
            for adapter in self._client.watch_adapters():
                self._told.put(adapter)
        except Exception as error:  # noqa: BLE001 -- the test looks at it
            self._told.put(error)

    def next(self) -> Adapter | Exception:
        return self._told.get(timeout=60)

    def until(self, name: str, state: AdapterState) -> list[tuple[AdapterState, str]]:
        """States and revisions of one name, up to and with this state."""
        seen = []
        while not seen or seen[-1][0] is not state:
            adapter = self.next()
            assert isinstance(adapter, Adapter), adapter
            if adapter.name == name:
                seen.append((adapter.state, adapter.revision))
        return seen

    def close(self) -> None:
        self._client.close()
        self._thread.join()


@contextmanager
def watching(served) -> Iterator[Watcher]:
    watcher = Watcher(served.address)
    try:
        # The present state comes first, so what follows is watched.
        names = [watcher.next().name for _ in served.parts.registry.statuses()]
        assert names == [status.name for status in served.parts.registry.statuses()]
        yield watcher
    finally:
        watcher.close()


def test_a_watch_begins_with_what_is_there(served):
    with watching(served):
        pass


def test_every_change_is_watched_in_order(client, served, adapter_of):
    with watching(served) as watcher, watching(served) as other:
        first = client.load_adapter("mine", str(adapter_of("llama", "lora", seed=21))).revision
        assert watcher.until("mine", AdapterState.RESIDENT)[0] == (AdapterState.STAGED, first)
        second = client.load_adapter("mine", str(adapter_of("llama", "lora", seed=22))).revision
        assert watcher.until("mine", AdapterState.RESIDENT)[0] == (AdapterState.STAGED, second)
        client.rollback_adapter("mine")
        assert watcher.until("mine", AdapterState.RESIDENT)[-1] == (AdapterState.RESIDENT, first)
        client.unload_adapter("mine")
        assert watcher.until("mine", AdapterState.UNLOADED) == [(AdapterState.UNLOADED, first)]
        revisions = [revision for _, revision in other.until("mine", AdapterState.UNLOADED)]
        assert list(dict.fromkeys(revisions)) == [first, second]
        assert revisions[-1] == first


def test_a_watch_shows_when_draining_starts_and_ends(client, served, adapter_of):
    first = client.load_adapter("mine", str(adapter_of("llama", "lora", seed=21))).revision
    with watching(served) as watcher:
        stream = client.stream(PROMPT, adapter="mine", max_tokens=60)
        next(stream)
        client.load_adapter("mine", str(adapter_of("llama", "lora", seed=22)))
        seen = []
        while first not in seen:
            seen += watcher.next().draining_revisions
        list(stream)
        while watcher.next().draining_revisions:
            pass
        stream = client.stream(PROMPT, adapter="mine", max_tokens=60)
        next(stream)
        client.unload_adapter("mine")
        watcher.until("mine", AdapterState.DRAINING)
        list(stream)
        assert watcher.until("mine", AdapterState.UNLOADED)[-1][0] is AdapterState.UNLOADED


def test_a_watch_shows_a_failure(client, served):
    with watching(served) as watcher:
        served.parts.registry.fail("broken", "no such folder")
        told = watcher.next()
        assert (told.name, told.state, told.error) == ("broken", AdapterState.FAILED, "no such folder")
        client.unload_adapter("broken")
        assert watcher.next().state is AdapterState.UNLOADED
    with pytest.raises(NotFoundError):
        client.get_adapter("broken")


def test_a_watcher_that_is_too_slow_fails(served, monkeypatch):
    with watching(served) as watcher:
        monkeypatch.setattr(watches, "MAX_PENDING", 0)
        served.parts.registry.tell("lora")
        told = watcher.next()
        while isinstance(told, Adapter):
            told = watcher.next()
    assert isinstance(told, ResourceExhaustedError)
    assert told.reason == "SLOW_WATCHER"


def test_only_so_many_watch_at_once(served, monkeypatch):
    monkeypatch.setattr(watches, "MAX_WATCHERS", 1)
    with watching(served):
        other = Watcher(served.address)
        told = other.next()
        other.close()
    assert isinstance(told, ResourceExhaustedError)
    assert told.reason == "TOO_MANY_CALLS"
    with watching(served):
        pass


async def test_the_asynchronous_client_watches_too(served):
    async with AsyncClient(served.address) as client:
        names = []
        changes = client.watch_adapters()
        async for adapter in changes:
            names.append(adapter.name)
            if len(names) == len(served.parts.registry.statuses()):
                break
        await changes.aclose()
    assert names == [status.name for status in served.parts.registry.statuses()]


@pytest.mark.slow
def test_a_server_that_stops_ends_its_watches(base_of, quantised_cache):
    from support.serving import server_process  # noqa: PLC0415

    with server_process(base_of("llama"), quantised_cache, "--memory", "8MiB") as server:
        watcher = Watcher(server.address)
        with Client(server.address) as client:
            client.list_adapters()
        assert server.stop() == 0
        told = watcher.next()
        watcher.close()
    assert isinstance(told, UnavailableError)
