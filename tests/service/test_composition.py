"""Several adapters in one request, tasks and weights, over the wire. What they compute is in tests/parity."""

from __future__ import annotations

import pytest

from support.prompts import PROMPT
from turret_client import AdapterMethod, AdapterRef, InvalidArgumentError


@pytest.fixture(scope="module")
def served(served, adapter_of):
    for name in ("lora-attention", "ia3", "multitask", "p-tuning-v2"):
        served.parts.lifecycle.load(name, str(adapter_of("llama", name)))
    return served


def test_a_request_may_name_several_adapters_with_weights(client):
    def ask(*named):
        return client.generate(PROMPT, adapter=named, max_tokens=12)

    both = ask("lora", "lora-attention")
    alone = ask("lora")
    assert both.revision == f"{alone.revision}+{ask('lora-attention').revision}"
    assert ask(AdapterRef(name="lora"), AdapterRef(name="lora-attention", weight=0.0)).text == alone.text
    assert ask(AdapterRef(name="lora", weight=0.0)).text == client.generate(PROMPT, max_tokens=12).text
    assert both.token_ids != alone.token_ids
    chunks = list(client.stream(PROMPT, adapter=["lora", "lora-attention"], max_tokens=12))
    assert "".join(chunk.text for chunk in chunks) == both.text


def test_a_prefix_and_a_lora_and_another_prefix(client):
    together = client.generate(PROMPT, adapter=["prefix", "lora", "p-tuning-v2"], max_tokens=4)
    assert together.usage.cached_tokens >= 27
    assert client.generate(PROMPT, adapter=["p-tuning-v2", "lora", "prefix"], max_tokens=4) != together


def test_prefixes_of_keys_and_values_and_of_embeddings(client):
    named = ["prefix", "prompt", "p-tuning-v2"]
    together = client.generate(PROMPT, adapter=named, max_tokens=12)
    assert together.usage.cached_tokens >= 7 + 16 + 20
    assert together.revision == "+".join(client.get_adapter(name).revision for name in named)
    assert client.generate(PROMPT, adapter=named[::-1], max_tokens=12).token_ids != together.token_ids


def test_a_task_is_chosen_by_its_number(client):
    adapter = client.get_adapter("multitask")
    assert (adapter.method, adapter.num_tasks) == (AdapterMethod.MULTITASK_PROMPT_TUNING, 3)
    answers = [
        client.generate(PROMPT, adapter=AdapterRef(name="multitask", task=task), max_tokens=12)
        for task in range(3)
    ]
    assert [answer.revision for answer in answers] == [f"{adapter.revision}#{task}" for task in range(3)]
    assert len({answer.token_ids for answer in answers}) == 3


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (["multitask"], "ADAPTER_TASK"),
        ([AdapterRef(name="multitask", task=3)], "ADAPTER_TASK"),
        ([AdapterRef(name="lora", task=0)], "ADAPTER_TASK"),
        (["lora", "ia3"], "ADAPTER_COMPOSITION"),
        ([AdapterRef(name="prefix", weight=2.0)], "ADAPTER_COMPOSITION"),
        (["lora", "lora"], "INVALID_REQUEST"),
        ([AdapterRef(name="lora", weight=float("nan"))], "INVALID_REQUEST"),
        ([AdapterRef(name="lora", weight=1e9)], "INVALID_REQUEST"),
        (["lora"] * 9, "INVALID_REQUEST"),
    ],
)
def test_an_invalid_composition_is_refused_and_pins_nothing(client, named, reason):
    with pytest.raises(InvalidArgumentError) as refused:
        client.generate(PROMPT, adapter=named)
    assert refused.value.reason == reason
    assert all(adapter.active_requests == 0 for adapter in client.list_adapters())
