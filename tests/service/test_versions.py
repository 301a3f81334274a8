"""Revisions of a name: each can be named, and gone back to."""

from __future__ import annotations

import asyncio

import pytest

from support.prompts import PROMPT, until
from turret_client import AdapterRef, AsyncClient, InvalidArgumentError, NotFoundError
from turret_server.lifecycle import revisions


@pytest.fixture
def poet(client, adapter_of):
    """A name with three revisions; the last is current."""
    revisions = [
        client.load_adapter("poet", str(adapter_of("llama", "lora", seed=seed))).revision
        for seed in (11, 12, 13)
    ]
    yield revisions
    if any(adapter.name == "poet" for adapter in client.list_adapters()):
        client.unload_adapter("poet")


def answer(client, adapter):
    found = client.generate(PROMPT, adapter=adapter, max_tokens=12)
    return found.revision, found.token_ids


def test_the_history_says_what_a_name_served(client, poet, adapter_of):
    shown = client.get_adapter("poet")
    assert [each.revision for each in shown.history] == poet[::-1]
    assert shown.history[0].source == str(adapter_of("llama", "lora", seed=13))
    times = [each.published_at for each in shown.history]
    assert times == sorted(times, reverse=True)
    assert next(each for each in client.list_adapters() if each.name == "poet").history == shown.history


def test_a_revision_answers_as_it_did_when_it_was_current(client, adapter_of):
    said = {}
    for seed in (11, 12):
        revision = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=seed))).revision
        said[revision] = answer(client, "poet")
    first, second = said
    assert said[first] != said[second]
    assert answer(client, f"poet@{first}") == said[first]
    assert answer(client, f"poet@{first[:8]}") == said[first]
    assert answer(client, AdapterRef(name=f"poet@{second}")) == said[second] == answer(client, "poet")
    client.unload_adapter("poet")


@pytest.fixture
def none_kept(monkeypatch):
    monkeypatch.setattr(revisions, "MAX_RECENT", 0)


def test_a_named_revision_is_kept_for_the_next_request_until_others_were_named(
    client, poet, served, monkeypatch
):
    monkeypatch.setattr(revisions, "MAX_RECENT", 1)
    registry = served.parts.registry
    answer(client, f"poet@{poet[0]}")
    answer(client, f"poet@{poet[0]}")
    assert registry.has(poet[0])
    answer(client, f"poet@{poet[2]}")
    assert registry.has(poet[0])
    answer(client, f"poet@{poet[1]}")
    until(lambda: not registry.has(poet[0]))
    assert registry.has(poet[1])


@pytest.mark.parametrize("end", ["load", "roll back", "unload"])
def test_a_named_revision_goes_when_the_name_serves_something_else(client, poet, served, adapter_of, end):
    answer(client, f"poet@{poet[0]}")
    assert served.parts.registry.has(poet[0])
    if end == "load":
        client.load_adapter("poet", str(adapter_of("llama", "lora", seed=14)))
    elif end == "roll back":
        client.rollback_adapter("poet")
    else:
        client.unload_adapter("poet")
    until(lambda: not served.parts.registry.has(poet[0]))


@pytest.mark.usefixtures("none_kept")
def test_a_named_revision_stays_with_its_requests(client, poet, served):
    first = poet[0]
    streams = [client.stream(PROMPT, adapter=f"poet@{first}", max_tokens=60) for _ in range(2)]
    for stream in streams:
        assert next(stream).revision == first
    assert client.get_adapter("poet").draining_revisions == (first,)
    assert client.get_adapter("poet").revision == poet[-1]
    streams[0].close()
    assert served.parts.registry.has(first)
    list(streams[1])
    until(lambda: not served.parts.registry.has(first))
    until(lambda: not served.parts.engine.is_resident(first))
    assert client.get_adapter("poet").draining_revisions == ()


@pytest.mark.usefixtures("none_kept")
async def test_many_requests_for_revisions_that_are_not_in_memory(served, poet):
    async with AsyncClient(served.address) as client:
        found = await asyncio.gather(
            *(
                client.generate(PROMPT, adapter=f"poet@{poet[number % 3]}", max_tokens=4)
                for number in range(24)
            )
        )
    assert [each.revision for each in found] == [poet[number % 3] for number in range(24)]
    until(lambda: not served.parts.registry.has(poet[0]))
    served.parts.engine.check_integrity()


@pytest.mark.parametrize("revision", ["", "1234567", "G" * 8, "0" * 33, "a@b"])
@pytest.mark.usefixtures("poet")
def test_what_is_no_revision_is_refused(client, revision):
    with pytest.raises(InvalidArgumentError, match="first 8 to 32 digits"):
        client.generate(PROMPT, adapter=f"poet@{revision}")


def test_a_revision_that_the_name_never_had_is_not_found(client, poet):
    other = client.get_adapter("lora").revision
    with pytest.raises(NotFoundError, match=poet[0]) as refused:
        client.generate(PROMPT, adapter=f"poet@{other}")
    assert refused.value.reason == "REVISION_NOT_FOUND"
    with pytest.raises(NotFoundError) as refused:
        client.generate(PROMPT, adapter=f"nobody@{other}")
    assert refused.value.reason == "ADAPTER_NOT_FOUND"


def test_a_prompt_is_pinned_only_for_a_revision_that_its_name_serves(client, poet):
    with pytest.raises(InvalidArgumentError, match="roll back"):
        client.pin_prompt("rules", list(range(3, 43)), adapter=f"poet@{poet[0]}")
    pinned = client.pin_prompt("rules", list(range(3, 43)), adapter=f"poet@{poet[-1]}")
    assert pinned.revision == poet[-1]
    client.unpin_prompt("rules")


def test_going_back_flips_the_name_and_lets_running_streams_end(client, poet):
    before = answer(client, f"poet@{poet[1]}")
    stream = client.stream(PROMPT, adapter="poet", max_tokens=60)
    assert next(stream).revision == poet[2]
    back = client.rollback_adapter("poet")
    assert back.revision == poet[1]
    assert back.draining_revisions == (poet[2],)
    assert [each.revision for each in back.history] == [poet[1], poet[0]]
    assert answer(client, "poet") == before
    assert {chunk.revision for chunk in stream} == {poet[2]}
    with pytest.raises(NotFoundError):
        client.generate(PROMPT, adapter=f"poet@{poet[2]}")


def test_going_back_to_a_revision_that_is_named(client, poet):
    assert client.rollback_adapter("poet", poet[0][:8]).revision == poet[0]
    assert [each.revision for each in client.get_adapter("poet").history] == [poet[0]]
    with pytest.raises(NotFoundError) as refused:
        client.rollback_adapter("poet")
    assert refused.value.reason == "REVISION_NOT_FOUND"
    assert client.get_adapter("poet").revision == poet[0]


def test_what_the_store_has_lost_is_not_gone_back_to(client, poet, served):
    store = served.parts.lifecycle._library.store
    until(lambda: not served.parts.registry.has(poet[1]))
    store.remove(poet[1])
    with pytest.raises(NotFoundError) as refused:
        client.rollback_adapter("poet")
    assert refused.value.reason == "REVISION_NOT_FOUND"
    assert client.get_adapter("poet").revision == poet[2]
    assert [each.revision for each in client.get_adapter("poet").history] == poet[::-1]
