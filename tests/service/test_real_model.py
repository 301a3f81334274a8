"""A real model as a user serves it: real weights, a real tokenizer, text that people read."""

from __future__ import annotations

import subprocess

import pytest
from transformers import AutoTokenizer

from support.oracle import Oracle
from support.serving import TURRET, server_process
from turret_client import Client
from turret_demo.real_model import real_model

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real-model")]

QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris",
    "Name three colours, separated by commas.": ",",
    "Write the word naïve, then 東京, then a smiling emoji.": "",
}


@pytest.fixture(scope="module")
def model():
    return real_model()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with (
        server_process(model, cache, "--memory", "256MiB", "--dtype", "float32") as server,
        Client(server.address) as client,
    ):
        yield client


def test_questions_in_the_chat_template_get_the_answers_of_transformers(model, client):
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = []
    for question, part in QUESTIONS.items():
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        result = client.generate(prompt, max_tokens=24)
        assert part in result.text
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
        sequences.append((tokenizer.encode(prompt), result.token_ids))
    found = Oracle(model, {}).logits(None, sequences)
    for (_, token_ids), logits in zip(sequences, found, strict=True):
        assert logits.argmax(dim=-1).tolist() == list(token_ids)


def test_a_chat_is_the_prompt_of_transformers_over_the_client_and_the_command_line(model, client):
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    token_ids = tuple(tokenizer.encode(prompt))
    assert client.tokenize(messages) == token_ids
    assert client.detokenize(token_ids) == prompt
    answer = client.chat(messages, max_tokens=24)
    assert "Paris" in answer.text
    assert answer.usage.prompt_tokens == len(token_ids)
    assert answer.token_ids == client.generate(prompt, max_tokens=24).token_ids
    chunks = list(client.stream_chat(messages, max_tokens=24))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    asked = [*messages, answer.message, {"role": "user", "content": "And of Italy?"}]
    follow_up = client.chat(asked, max_tokens=24)
    command = [TURRET, "chat", "--server", client.address, "--max-tokens", "24"]
    lines = "What is the capital of France?\nAnd of Italy?\n"
    run = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)  # noqa: S603 (ours)
    assert run.stdout == f"{answer.text}\n{follow_up.text}\n"
    about = client.model()
    assert (about.name, about.has_chat_template, about.calls_tools) == (model.name, True, False)


def test_seeds_repeat_answers_and_several_share_a_prompt(model, client):
    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "Write one sentence about the sea."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked = {"temperature": 1.0, "top_p": 0.95, "min_p": 0.02, "max_tokens": 24, "seed": 11}
    one = client.generate(prompt, **asked)
    several = client.generate(prompt, **asked, n=4)
    assert client.generate(prompt, **asked).token_ids == one.token_ids
    assert client.generate(prompt, **asked, n=4).choices == several.choices
    assert several.choices[0].token_ids == one.token_ids
    assert len({choice.text for choice in several.choices}) == 4
    assert several.usage.prompt_tokens == one.usage.prompt_tokens == len(tokenizer.encode(prompt))
    assert several.usage.generated_tokens == sum(len(choice.token_ids) for choice in several.choices)


def test_log_probabilities_of_text_are_those_of_transformers(model, client):
    """In particular of tokens that are parts of characters."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = "naïve 東京 \N{GRINNING FACE} The capital of France is"
    answer = client.generate(prompt, max_tokens=6, logprobs=5, prompt_logprobs=1)
    token_ids = tokenizer.encode(prompt)
    text = b"".join(each.token for each in answer.prompt_logprobs)
    assert prompt.encode().endswith(text)
    assert text.decode() == prompt.removeprefix(tokenizer.decode(token_ids[:1]))
    assert b"".join(each.token for each in answer.logprobs).decode() == answer.text
    sequences = [(token_ids[:1], token_ids[1:]), (token_ids, answer.token_ids)]
    for found, logits in zip(
        (answer.prompt_logprobs, answer.logprobs), Oracle(model, {}).logits(None, sequences), strict=True
    ):
        rows = logits.log_softmax(-1)
        expected = [row[each.token_id].item() for each, row in zip(found, rows, strict=True)]
        assert [each.logprob for each in found] == pytest.approx(expected, abs=5e-3)
