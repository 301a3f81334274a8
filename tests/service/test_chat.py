"""Chats of a whole server: its template, an adapter's own, and templates that do not end."""

from __future__ import annotations

import shutil
import threading

import pytest
from transformers import AutoTokenizer

from support.serving import serving
from turret_client import Client, FailedPreconditionError, InvalidArgumentError
from turret_server.config import ServerConfig

HELLO = [{"role": "user", "content": "the quick brown fox"}]
MODEL = "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
OWN = "own: {{ messages[-1].content }}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def folders(base_of, adapter_of, tmp_path_factory):
    """Adapters with chat templates of their own, beside the base's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama"))
    found = {}
    for seed, (name, template) in enumerate({"own": OWN, "endless": ENDLESS}.items(), 90):
        found[name] = tmp_path_factory.mktemp(name) / name
        shutil.copytree(adapter_of("llama", "lora", seed=seed), found[name])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(found[name])
    return found


def config_of(base, cache, **settings) -> ServerConfig:
    return ServerConfig(
        model=str(base), dtype="float32", device="cpu", memory="8MiB", cache=cache, http=None, **settings
    )


@pytest.fixture(scope="module")
def client(base_of, folders, quantised_cache, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(MODEL)
    config = config_of(base_of("llama"), quantised_cache, chat_template=template)
    with serving(config) as served, Client(served.address) as client:
        for name, folder in folders.items():
            client.load_adapter(name, str(folder))
        yield client
        served.parts.engine.check_integrity()


def prompt_of(client, messages, **options) -> str:
    return client.detokenize(client.tokenize(messages, **options))


def test_the_template_of_the_setting_makes_the_prompt(client):
    assert prompt_of(client, HELLO) == "<s>[user] the quick brown fox"
    answer = client.chat(HELLO, max_tokens=4)
    assert answer.token_ids == client.generate("<s>[user] the quick brown fox", max_tokens=4).token_ids
    assert client.model().has_chat_template


def test_an_adapters_own_template_makes_the_prompt(client):
    assert prompt_of(client, HELLO, adapter="own") == "own: the quick brown fox"
    assert client.chat(HELLO, adapter="own", max_tokens=4).token_ids == (
        client.generate(
            "own: the quick brown fox", adapter="own", max_tokens=4, add_special_tokens=False
        ).token_ids
    )


def test_a_template_that_does_not_end_disturbs_nobody(client):
    refused = []

    def ask() -> None:
        with pytest.raises(InvalidArgumentError, match=r"takes more than 1 s|refused for 10 s") as error:
            client.chat(HELLO, adapter="endless", max_tokens=1)
        refused.append(error.value.reason)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert len(client.chat(HELLO, max_tokens=8).token_ids) == 8
    for thread in threads:
        thread.join()
    assert refused == ["CHAT_TEMPLATE"] * 8
    assert prompt_of(client, HELLO, adapter="own").startswith("own: ")


def test_a_model_without_a_template_serves_chats_of_adapters_that_have_one(base_of, folders, quantised_cache):
    config = config_of(base_of("llama"), quantised_cache)
    with serving(config) as served, Client(served.address) as client:
        client.load_adapter("own", str(folders["own"]))
        with pytest.raises(FailedPreconditionError, match="--chat-template FILE") as refused:
            client.chat(HELLO)
        assert refused.value.reason == "NO_CHAT_TEMPLATE"
        assert not client.model().has_chat_template
        assert prompt_of(client, HELLO, adapter="own") == "own: the quick brown fox"
