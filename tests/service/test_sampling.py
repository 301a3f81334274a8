"""How answers are sampled, over a real server: with transformers' logits and processors as what is right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from support.oracle import Oracle
from support.prompts import LONG, PROMPT, until
from turret_client import FinishReason, InvalidArgumentError

ADAPTERS = ("lora", "prefix")
TOKENS = list(range(30, 75))
END = 1
"""The end-of-sequence token."""


@pytest.fixture(scope="module")
def oracle(base_of, adapter_of) -> Oracle:
    return Oracle(base_of("llama"), {name: adapter_of("llama", name) for name in ADAPTERS})


def check(found, token_ids, logits):
    """Log probabilities of tokens are those of logits, [tokens, vocabulary]."""
    assert [each.token_id for each in found] == list(token_ids)
    for each, row in zip(found, logits.log_softmax(-1), strict=True):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=2e-3)
        assert [one.logprob for one in each.top] == pytest.approx(row.topk(3).values.tolist(), abs=2e-3)
        assert [one.logprob for one in each.top] == pytest.approx(
            [row[one.token_id].item() for one in each.top], abs=2e-3
        )
        assert abs((row > row[each.token_id]).sum() + 1 - each.rank) <= 3


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_log_probabilities_are_those_of_transformers(client, oracle, adapter):
    asked = {"adapter": adapter, "max_tokens": 6, "temperature": 0.8, "seed": 3}
    answer = client.generate(TOKENS, **asked, logprobs=3, prompt_logprobs=3)
    check(answer.logprobs, answer.token_ids, oracle.logits(adapter, [(TOKENS, answer.token_ids)])[0])
    check(answer.prompt_logprobs, TOKENS[1:], oracle.logits(adapter, [(TOKENS[:1], TOKENS[1:])])[0])
    assert client.generate(TOKENS, **asked).token_ids == answer.token_ids
    chunks = list(client.stream(TOKENS, **asked, logprobs=3, prompt_logprobs=3))
    assert tuple(each for chunk in chunks for each in chunk.logprobs) == answer.logprobs
    assert chunks[0].prompt_logprobs == answer.prompt_logprobs
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])


def test_a_prompt_in_the_cache_is_computed_for_its_log_probabilities(client):
    client.generate(LONG, max_tokens=1)
    assert client.generate(LONG, max_tokens=1).usage.cached_tokens > 0
    scored = client.generate(LONG, max_tokens=1, prompt_logprobs=0)
    assert scored.usage.cached_tokens == 0
    assert len(scored.prompt_logprobs) == scored.usage.prompt_tokens - 1
    assert client.generate(LONG, max_tokens=1).usage.cached_tokens > 0


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_greedy_answers_with_penalties_and_biases_are_those_of_transformers(client, oracle, adapter):
    bias = {7: 1.5, 99: -2.0}
    answer = client.generate(
        TOKENS, adapter=adapter, max_tokens=20, repetition_penalty=1.4, logit_bias=bias, ignore_eos=True
    )
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(1.4),
        ]
    )
    logits = oracle.logits(adapter, [(TOKENS, answer.token_ids)])[0]
    num_compared = 0
    for index, (token, row) in enumerate(zip(answer.token_ids, logits, strict=True)):
        scores = processors(torch.tensor([[*TOKENS, *answer.token_ids[:index]]]), row[None])[0]
        best = scores.topk(2).values
        if best[0] - best[1] > 4e-3:
            num_compared += 1
            assert scores.argmax() == token
    assert num_compared > 12


def test_penalties_keep_an_answer_from_repeating_itself(client):
    plain = client.generate(PROMPT, max_tokens=40, ignore_eos=True)
    assert len(set(plain.token_ids)) < 40
    for penalties in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 5}):
        answer = client.generate(PROMPT, max_tokens=40, ignore_eos=True, **penalties)
        assert len(set(answer.token_ids)) > len(set(plain.token_ids))


def test_the_end_of_sequence_comes_no_earlier_than_is_wanted(client):
    asked = {"max_tokens": 6, "logit_bias": {END: 100}}
    soon = client.generate(PROMPT, **asked)
    assert (soon.token_ids, soon.stop_token_id) == ((END,), END)
    later = client.generate(PROMPT, **asked, min_tokens=4)
    assert (len(later.token_ids), later.stop_token_id) == (5, END)
    never = client.generate(PROMPT, **asked, ignore_eos=True)
    assert (never.token_ids, never.finish_reason) == ((END,) * 6, FinishReason.LENGTH)


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_several_answers_compute_their_prompt_once(client, served, adapter):
    asked = {"adapter": adapter, "temperature": 1.2, "max_tokens": 9, "ignore_eos": True}
    prompt = [200 + len(adapter or ""), *TOKENS]
    steps = served.metric("turret_batch_tokens_sum")
    answer = client.generate(prompt, seed=5, n=4, **asked)
    # The last token of the prompt is computed for each answer, and then all of the answer but its last token.
    computed = len(prompt) + 3 + 4 * 8
    until(lambda: served.metric("turret_batch_tokens_sum") == steps + computed)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.generated_tokens == 36
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.token_ids for choice in answer.choices}) == 4
    assert {choice.finish_reason for choice in answer.choices} == {FinishReason.LENGTH}
    assert (answer.text, answer.token_ids) == (answer.choices[0].text, answer.choices[0].token_ids)
    # The first is the answer of a request for one; all come again with the seed, in any company.
    assert client.generate(prompt, seed=5, **asked).token_ids == answer.token_ids
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: client.generate(prompt, seed=5, n=4, **asked), range(4)))
    assert [each.choices for each in again] == [answer.choices] * 4
    assert client.generate(prompt, seed=6, n=4, **asked).choices != answer.choices


def test_a_stream_of_several_answers_adds_up_to_them(client):
    asked = {"temperature": 1.2, "max_tokens": 9, "seed": 5, "n": 3, "stop": ["e", "a"], "logprobs": 1}
    whole = client.generate(PROMPT, **asked)
    chunks = list(client.stream(PROMPT, **asked))
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in own) == choice.text
        assert sum((chunk.token_ids for chunk in own), ()) == choice.token_ids
        assert sum((chunk.logprobs for chunk in own), ()) == choice.logprobs
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert own[-1].stop_string == choice.stop_string
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.generated_tokens == sum(len(choice.token_ids) for choice in whole.choices)


def test_a_client_that_leaves_frees_all_answers(client, served):
    with closing(client.stream(PROMPT, n=8, temperature=1, max_tokens=150, ignore_eos=True)) as chunks:
        assert len({next(chunks).index for _ in range(60)}) > 1
    until(lambda: served.metric("turret_running_requests") == 0)
    until(lambda: served.metric("turret_arena_pages", owner="sequence") == 0)


@pytest.mark.parametrize(
    ("field", "options", "message"),
    [
        ("n", {"n": 2}, "at temperature 0 all answers are the same"),
        ("n", {"n": 129, "temperature": 1}, "n is from 1 to 128; found 129"),
        ("min_tokens", {"min_tokens": 9, "max_tokens": 8}, "min_tokens is at most max_tokens, which is 8"),
        ("logit_bias", {"logit_bias": {10**6: 1}}, "logit_bias has token ids below"),
        ("logprobs", {"logprobs": 21}, "logprobs is from 0 to 20; found 21"),
    ],
)
def test_what_makes_no_sense_is_refused(client, field, options, message):
    with pytest.raises(InvalidArgumentError, match=message) as refused:
        client.generate(PROMPT, **options)
    assert refused.value.metadata["field"] == field
