from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from support.oracle import Oracle
from support.prompts import LONG, PROMPT, until
from turret_client import FinishReason

ADAPTERS = ("lora", "prefix", "prompt", "p-tuning")


@pytest.fixture(scope="module")
def oracle(base_of, adapter_of) -> Oracle:
    return Oracle(base_of("llama"), {name: adapter_of("llama", name) for name in ADAPTERS})


def test_a_concurrent_mix_of_adapters_answers_what_peft_answers_one_by_one(client, oracle):
    asked = [(name, list(range(3 + n, 40 + n, 1 + n % 3))) for n in range(3) for name in (None, *ADAPTERS)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda ask: client.generate(ask[1], adapter=ask[0], max_tokens=10), asked))
    num_compared = 0
    for (name, prompt), answer in zip(asked, answers, strict=True):
        logits = oracle.logits(name, [(prompt, answer.token_ids)])[0]
        best = logits.topk(2).values
        certain = best[:, 0] - best[:, 1] > 2e-3
        num_compared += int(certain.sum())
        assert torch.equal(torch.tensor(answer.token_ids)[certain], logits.argmax(dim=-1)[certain])
    assert num_compared > 0.9 * sum(len(answer.token_ids) for answer in answers)


def test_an_answer_is_the_same_alone_and_in_company(client):
    alone = {name: client.generate(PROMPT, adapter=name, max_tokens=12) for name in (None, *ADAPTERS)}
    asked = [name for _ in range(3) for name in (None, *ADAPTERS)]
    with ThreadPoolExecutor(len(asked)) as pool:
        crowd = list(pool.map(lambda name: client.generate(PROMPT, adapter=name, max_tokens=12), asked))
    for name, answer in zip(asked, crowd, strict=True):
        assert answer.token_ids == alone[name].token_ids
        assert answer.text == alone[name].text


def test_a_stream_adds_up_to_the_whole_answer(client):
    for name in (None, *ADAPTERS):
        whole = client.generate(PROMPT, adapter=name, max_tokens=15)
        chunks = list(client.stream(PROMPT, adapter=name, max_tokens=15))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert sum((chunk.token_ids for chunk in chunks), ()) == whole.token_ids
        assert chunks[-1].finish_reason == whole.finish_reason
        assert chunks[-1].usage.generated_tokens == whole.usage.generated_tokens == len(whole.token_ids)
        assert all(chunk.finish_reason is None and chunk.usage is None for chunk in chunks[:-1])
        assert {chunk.revision for chunk in chunks} == {whole.revision}


def test_text_and_its_token_ids_are_the_same_prompt(client, served):
    token_ids = served.parts.loaded.tokenizer.live.encode(PROMPT)
    assert client.generate(PROMPT, max_tokens=8) == client.generate(token_ids, max_tokens=8)


def test_the_length_ends_an_answer(client):
    answer = client.generate(PROMPT, max_tokens=5)
    assert len(answer.token_ids) == 5
    assert answer.finish_reason is FinishReason.LENGTH


def test_an_answer_ends_before_a_stop_string_and_frees_its_pages(client, served):
    whole = client.generate(PROMPT, max_tokens=40)
    stop = whole.text[4:7]
    stopped = client.generate(PROMPT, max_tokens=40, stop=["never to be seen", stop])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP
    assert len(stopped.token_ids) < len(whole.token_ids)
    assert "".join(chunk.text for chunk in client.stream(PROMPT, max_tokens=40, stop=[stop])) == stopped.text
    until(lambda: served.metric("turret_running_requests") == 0)


def test_a_seed_makes_sampling_repeatable_and_another_changes_it(client):
    def sampled(seed, **kwargs):
        return client.generate(PROMPT, max_tokens=20, temperature=1.5, seed=seed, **kwargs).token_ids

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(6)}) > 1
    assert sampled(3, top_k=1) == client.generate(PROMPT, max_tokens=20).token_ids
    assert sampled(3, top_p=1e-6) == client.generate(PROMPT, max_tokens=20).token_ids


def test_virtual_tokens_and_repeated_prompts_count_as_cached(client):
    token_ids = list(range(100, 150))
    first = client.generate(token_ids, adapter="prefix", max_tokens=2).usage
    assert (first.prompt_tokens, first.cached_tokens) == (50, 7)
    again = client.generate(token_ids, adapter="prefix", max_tokens=2).usage
    assert again.cached_tokens == 48
    assert client.generate(token_ids, adapter="prompt", max_tokens=2).usage.cached_tokens == 16
    assert client.generate(token_ids, max_tokens=2).usage.cached_tokens == 0


def test_a_cached_prompt_changes_no_answer(client):
    for name in (None, *ADAPTERS):
        first = client.generate(LONG, adapter=name, max_tokens=10)
        again = client.generate(LONG, adapter=name, max_tokens=10)
        assert again.usage.cached_tokens > first.usage.cached_tokens
        assert again.token_ids == first.token_ids
