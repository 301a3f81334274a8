"""A real model as a user serves it: real weights, a real tokenizer, text that people read."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from support.oracle import Oracle
from support.real_model import real_model
from support.serving import server_process
from turret_client import Client

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
