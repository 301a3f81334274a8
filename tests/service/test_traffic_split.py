"""Some percent of a name's requests go to another revision."""

from __future__ import annotations

from collections import Counter

import pytest

from support.prompts import PROMPT, until
from support.serving import server_process
from turret_client import Client, InvalidArgumentError, NotFoundError, TrafficSplit

TOKENS = list(range(3, 15))


@pytest.fixture
def poet(client, adapter_of):
    """A name with two revisions; the second is current."""
    revisions = [
        client.load_adapter("poet", str(adapter_of("llama", "lora", seed=seed))).revision for seed in (51, 52)
    ]
    yield revisions
    if any(adapter.name == "poet" for adapter in client.list_adapters()):
        client.unload_adapter("poet")


def routes(client, number: int = 60) -> dict[str, str]:
    """To which revision each of some keys goes."""
    keys = [f"user-{index}" for index in range(number)]
    return {
        key: client.generate(TOKENS, adapter="poet", max_tokens=1, routing_key=key).revision for key in keys
    }


def test_a_part_of_the_keys_goes_to_the_other_revision_and_stays_there(client, poet):
    old, new = poet
    assert client.set_traffic_split("poet", old[:8], 30).traffic_split == TrafficSplit(old, 30)
    assert client.get_adapter("poet").revision == new
    first = routes(client)
    assert routes(client) == first
    # 18 of 60 are expected; the keys and their places are always the same.
    assert 10 <= Counter(first.values())[old] <= 26
    client.set_traffic_split("poet", old, 60)
    more = routes(client)
    assert all(more[key] == old for key, revision in first.items() if revision == old)
    assert Counter(more.values())[old] > Counter(first.values())[old]


def test_requests_without_a_key_are_drawn_each(client, poet):
    client.set_traffic_split("poet", poet[0], 50)
    found = Counter(client.generate(TOKENS, adapter="poet", max_tokens=1).revision for _ in range(60))
    assert found.keys() == set(poet)


def test_a_split_that_ends_lets_its_requests_end(client, poet, served):
    old, new = poet
    client.set_traffic_split("poet", old, 100)
    stream = client.stream(PROMPT, adapter="poet", max_tokens=220, routing_key="me")
    assert next(stream).revision == old
    assert client.get_adapter("poet").draining_revisions == ()
    ended = client.set_traffic_split("poet", "", 0)
    assert (ended.traffic_split, ended.draining_revisions) == (None, (old,))
    assert client.generate(TOKENS, adapter="poet", max_tokens=1, routing_key="me").revision == new
    assert {chunk.revision for chunk in stream} == {old}
    until(lambda: not served.parts.registry.has(old))


def test_a_split_ends_when_its_revision_becomes_current(client, poet):
    client.set_traffic_split("poet", poet[0], 50)
    back = client.rollback_adapter("poet")
    assert (back.revision, back.traffic_split) == (poet[0], None)


def test_a_name_that_is_unloaded_lets_both_go(client, poet, served):
    client.set_traffic_split("poet", poet[0], 50)
    client.unload_adapter("poet")
    until(lambda: not any(served.parts.registry.has(revision) for revision in poet))


def test_a_prompt_is_pinned_for_either_revision_and_by_the_name_for_the_current(client, poet):
    client.set_traffic_split("poet", poet[0], 100)
    prompt = list(range(3, 43))
    assert client.pin_prompt("rules", prompt, adapter="poet").revision == poet[1]
    assert client.pin_prompt("rules", prompt, adapter=f"poet@{poet[0]}").revision == poet[0]
    client.unpin_prompt("rules")


@pytest.mark.parametrize("percent", [-1, 101])
def test_what_is_no_percent_is_refused(client, poet, percent):
    with pytest.raises(InvalidArgumentError, match="percent must be from 0 to 100"):
        client.set_traffic_split("poet", poet[0], percent)


def test_what_cannot_be_split_is_refused(client, poet):
    with pytest.raises(NotFoundError) as refused:
        client.set_traffic_split("poet", poet[1], 10)
    assert refused.value.reason == "REVISION_NOT_FOUND"
    with pytest.raises(NotFoundError):
        client.set_traffic_split("nobody", poet[0], 10)
    with pytest.raises(InvalidArgumentError, match="routing_key has at most"):
        client.generate(TOKENS, adapter="poet", routing_key="x" * 129)
    assert client.get_adapter("poet").traffic_split is None


@pytest.mark.slow
def test_the_same_keys_go_to_the_same_revisions_after_a_kill(base_of, adapter_of, quantised_cache, tmp_path):
    arguments = ("--store", str(tmp_path / "store"), "--memory", "8MiB")
    with (
        server_process(base_of("llama"), quantised_cache, *arguments) as server,
        Client(server.address) as client,
    ):
        old = client.load_adapter("poet", str(adapter_of("llama", "lora", seed=51))).revision
        client.load_adapter("poet", str(adapter_of("llama", "lora", seed=52)))
        client.set_traffic_split("poet", old, 40)
        before = routes(client, 20)
        server.kill()
    with (
        server_process(base_of("llama"), quantised_cache, *arguments) as server,
        Client(server.address) as client,
    ):
        assert client.get_adapter("poet").traffic_split == TrafficSplit(old, 40)
        assert routes(client, 20) == before
