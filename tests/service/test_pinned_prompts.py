"""Pinned prompts stay, whatever else wants their pages, until they are unpinned or their adapter goes.

Every test ends with nothing pinned and the engine's integrity check.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.models import MAX_CONTEXT
from support.prompts import until
from support.serving import serving
from turret_client import (
    AdapterRef,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PinnedPrompt,
)
from turret_server.config import ServerConfig

BLOCK = 16
# Of 48 pages, pinned prompts may take 24.
MEMORY = f"{48 * 12}KiB"
NUM_VIRTUAL = 7

_first_tokens = itertools.count()


def prompt_of(num_tokens: int) -> list[int]:
    """A prompt that shares no block with any other."""
    first = next(_first_tokens)
    return [3 + first % 300, 3 + first // 300, *(3 + index % 300 for index in range(num_tokens - 2))]


@pytest.fixture(scope="module")
def served(base_of, adapter_of, quantised_cache, tmp_path_factory, gate):
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory=MEMORY,
        max_batch_tokens=64,
        max_batch_requests=4,
        cache=quantised_cache,
        store=tmp_path_factory.mktemp("store"),
    )
    with serving(config, gate) as served:
        assert served.parts.arena.block_size == BLOCK
        assert served.parts.arena.num_pages == 48
        with Client(served.address) as client:
            client.load_adapter("lora", str(adapter_of("llama", "lora")))
            client.load_adapter("prefix", str(adapter_of("llama", "prefix")))
        yield served


@pytest.fixture
def client(served):
    with Client(served.address) as client:
        yield client
        for prompt in client.list_pinned_prompts():
            client.unpin_prompt(prompt.name)
        until(lambda: num_pinned(served) == 0)
    served.parts.engine.check_integrity()


@pytest.fixture
def mine(client, adapter_of):
    """An adapter of its own, which the test may replace and unload."""
    client.load_adapter("mine", str(adapter_of("llama", "lora-attention", seed=5)))
    yield "mine"
    if any(adapter.name == "mine" for adapter in client.list_adapters()):
        client.unload_adapter("mine")


def num_pinned(served) -> int:
    """Pages of pinned prompts, as the engine's thread has them now."""
    return served.parts.engine._scheduler.allocation.num_pinned


def names(client) -> list[str]:
    return [prompt.name for prompt in client.list_pinned_prompts()]


def press(client) -> None:
    """Let requests have every page, some of them several times."""
    for _ in range(12):
        client.generate(prompt_of(200), max_tokens=1)


def cached(client, prompt, **options) -> int:
    return client.generate([*prompt, 5, 6, 7], max_tokens=1, **options).usage.cached_tokens


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
def test_a_pinned_prompt_outlives_the_pressure_that_another_does_not(client, adapter):
    pinned, other = prompt_of(100), prompt_of(100)
    virtual = NUM_VIRTUAL if adapter == "prefix" else 0
    whole = (virtual + 100) // BLOCK * BLOCK
    client.generate(other, adapter=adapter, max_tokens=1)
    answer = client.pin_prompt("rules", pinned, adapter=adapter)
    assert answer.prompt_tokens == 100
    assert cached(client, pinned, adapter=adapter) == whole
    press(client)
    assert cached(client, pinned, adapter=adapter) == whole
    assert cached(client, other, adapter=adapter) == virtual


def test_a_pinned_prompt_changes_no_answer(client):
    prompt = prompt_of(90)
    before = client.generate([*prompt, 9, 8], adapter="lora", max_tokens=12)
    client.pin_prompt("rules", prompt, adapter="lora")
    after = client.generate([*prompt, 9, 8], adapter="lora", max_tokens=12)
    assert after.usage.cached_tokens == 80
    assert after.token_ids == before.token_ids


def test_after_unpinning_it_goes_like_any_other(client, served):
    prompt = prompt_of(100)
    client.pin_prompt("rules", prompt)
    assert num_pinned(served) == 6
    client.unpin_prompt("rules")
    assert names(client) == []
    assert cached(client, prompt) == 96
    press(client)
    assert cached(client, prompt) == 0


def test_only_the_same_adapters_weights_and_salt_find_it(client):
    prompt = prompt_of(64)
    adapter = AdapterRef(name="lora", weight=0.5)
    client.pin_prompt("rules", prompt, adapter=adapter, cache_salt="pepper")
    assert cached(client, prompt, adapter=adapter, cache_salt="pepper") == 64
    assert cached(client, prompt, adapter=adapter) == 0
    assert cached(client, prompt, adapter=adapter, cache_salt="salt") == 0
    assert cached(client, prompt, adapter="lora", cache_salt="pepper") == 0
    assert cached(client, prompt, cache_salt="pepper") == 0


def test_the_list_is_in_the_order_of_names_and_says_the_revision(client, served):
    text = "the lazy dog and the other fox there then these those other " * 2
    client.pin_prompt("b", text)
    client.pin_prompt("a", prompt_of(33), adapter="lora")
    num_tokens = len(served.parts.loaded.tokenizer.live.encode(text))
    revision = client.get_adapter("lora").revision
    assert client.list_pinned_prompts() == [
        PinnedPrompt("a", revision, 33),
        PinnedPrompt("b", "", num_tokens),
    ]


def test_a_name_that_is_pinned_anew_lets_the_old_prompt_go(client, served):
    old, new = prompt_of(64), prompt_of(48)
    client.pin_prompt("rules", old)
    client.pin_prompt("rules", new)
    assert client.list_pinned_prompts() == [PinnedPrompt("rules", "", 48)]
    until(lambda: num_pinned(served) == 3)
    press(client)
    assert cached(client, old) == 0
    assert cached(client, new) == 48


def test_the_old_prompt_stays_where_the_new_one_is_refused(client):
    old = prompt_of(200)
    client.pin_prompt("rules", old)
    with pytest.raises(FailedPreconditionError, match="unpin a prompt") as refused:
        client.pin_prompt("rules", prompt_of(220))
    assert refused.value.reason == "REQUEST_TOO_LARGE"
    assert client.list_pinned_prompts() == [PinnedPrompt("rules", "", 200)]
    press(client)
    assert cached(client, old) == 192


def test_two_pins_of_one_name_at_once_leave_one(client, served):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.pin_prompt("rules", prompt_of(64)), range(4)))
    assert {answer.name for answer in answers} == {"rules"}
    assert names(client) == ["rules"]
    until(lambda: num_pinned(served) == 4)


def test_a_replaced_adapter_takes_its_prompts_along(client, served, mine, adapter_of):
    prompt = prompt_of(64)
    old = client.pin_prompt("rules", prompt, adapter=mine).revision
    client.pin_prompt("others", prompt, adapter="lora")
    client.load_adapter(mine, str(adapter_of("llama", "lora-attention", seed=1)))
    until(lambda: names(client) == ["others"])
    assert client.get_adapter(mine).draining_revisions == ()
    until(lambda: not served.parts.engine.is_resident(old))
    assert cached(client, prompt, adapter=mine) == 0
    with pytest.raises(NotFoundError, match="gone with its adapter") as missing:
        client.unpin_prompt("rules")
    assert missing.value.reason == "PROMPT_NOT_FOUND"
    assert missing.value.metadata == {"prompt": "rules"}
    assert client.pin_prompt("rules", prompt, adapter=mine).revision != old
    assert cached(client, prompt, adapter=mine) == 64


def test_an_unloaded_adapter_takes_its_prompts_along(client, served, mine):
    revision = client.pin_prompt("rules", prompt_of(64), adapter=mine).revision
    client.unload_adapter(mine)
    until(lambda: names(client) == [])
    until(lambda: not served.parts.engine.is_resident(revision))


def test_an_adapter_that_is_replaced_while_its_prompt_is_computed_takes_it_along(
    client, served, gate, mine, adapter_of
):
    with ThreadPoolExecutor(1) as pool:
        with gate.closed():
            pinning = pool.submit(client.pin_prompt, "rules", prompt_of(64), adapter=mine)
            gate.wait()
            new = client.load_adapter(mine, str(adapter_of("llama", "lora-attention", seed=1)))
            [old] = new.draining_revisions
        assert pinning.result().revision == old
    until(lambda: names(client) == [])
    until(lambda: not served.parts.engine.is_resident(old))
    assert client.get_adapter(mine).draining_revisions == ()


def test_a_call_that_ends_before_its_prompt_is_pinned_pins_nothing(client, served, gate, mine):
    with gate.closed():
        with pytest.raises(DeadlineExceededError):
            client.pin_prompt("rules", prompt_of(64), adapter=mine, timeout=0.3)
        # The step is under way, and the engine pins the prompt before it hears of the end of the call.
        until(lambda: client.get_adapter(mine).active_requests == 0)
    until(lambda: served.metric("turret_running_requests") == 0)
    client.generate(prompt_of(20), max_tokens=1)
    assert num_pinned(served) == 0
    assert names(client) == []


def test_a_name_cannot_be_unpinned_before_its_prompt_is_computed(client, gate):
    prompt = prompt_of(64)
    with ThreadPoolExecutor(1) as pool, gate.closed():
        pinning = pool.submit(client.pin_prompt, "rules", prompt)
        gate.wait()
        assert names(client) == []
        with pytest.raises(NotFoundError):
            client.unpin_prompt("rules")
    pinning.result()
    assert names(client) == ["rules"]


@pytest.mark.parametrize(("adapter", "least"), [(None, BLOCK), ("prefix", BLOCK - NUM_VIRTUAL)])
def test_a_prompt_that_fills_no_block_is_refused(client, served, adapter, least):
    with pytest.raises(
        InvalidArgumentError, match=f"blocks of {BLOCK} tokens.* at least {least}$"
    ) as refused:
        client.pin_prompt("rules", prompt_of(least - 1), adapter=adapter)
    assert refused.value.metadata == {"field": "prompt"}
    client.pin_prompt("rules", prompt_of(least), adapter=adapter)
    assert num_pinned(served) == 1


def test_several_prefixes_cannot_be_pinned_with(client, adapter_of):
    client.load_adapter("prefix-2", str(adapter_of("llama", "prefix", seed=1)))
    with pytest.raises(InvalidArgumentError, match="one prefix"):
        client.pin_prompt("rules", prompt_of(64), adapter=["prefix", "prefix-2"])
    client.unload_adapter("prefix-2")


def test_what_cannot_be_pinned_is_refused_as_a_request_is(client):
    with pytest.raises(InvalidArgumentError, match="a pinned prompt's name"):
        client.pin_prompt("no/name", prompt_of(64))
    with pytest.raises(InvalidArgumentError, match="a pinned prompt's name"):
        client.unpin_prompt("")
    with pytest.raises(NotFoundError, match="nobody"):
        client.pin_prompt("rules", prompt_of(64), adapter="nobody")
    with pytest.raises(InvalidArgumentError, match="cache_salt"):
        client.pin_prompt("rules", prompt_of(64), cache_salt="x" * 129)
    with pytest.raises(InvalidArgumentError) as refused:
        client.pin_prompt("rules", prompt_of(MAX_CONTEXT))
    assert refused.value.reason == "PROMPT_TOO_LONG"
    assert names(client) == []
