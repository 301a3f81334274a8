"""Every field of both endpoints, sent to a real server: it is served, or refused by its name."""

from __future__ import annotations

import httpx
import pytest

from support.prompts import PROMPT
from support.serving import server_process
from turret_server.web.chat import ChatBody
from turret_server.web.completions import CompletionBody

TEMPLATE = (
    "{% for each in messages %}<{{ each.role }}>{{ each.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
COMPLETION = {"prompt": PROMPT, "max_tokens": 4}
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}

# Values that are served, none of them a default; a list has a value and what it needs beside it.
SERVED: dict[str, object] = {
    "model": "lora",
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 2,
    "stream": True,
    "stream_options": [{"include_usage": True}, {"stream": True}],
    "stop": ["x"],
    "seed": 7,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1.0},
    "user": "me",
    "response_format": {"type": "json_object"},
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "ignore_eos": True,
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "prompt_logprobs": 1,
    "priority": 1,
    "cache_salt": "s",
    "routing_key": "me",
    "structured_outputs": {"choice": ["a", "b"]},
    "adapters": [{"name": "lora", "weight": 0.5}],
}
OF_COMPLETIONS = {"prompt": [PROMPT, PROMPT], "echo": True, "logprobs": 2, "add_special_tokens": False}
OF_CHATS: dict[str, object] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
    "max_completion_tokens": [2, {"max_tokens": None}],
    "logprobs": True,
    "top_logprobs": [2, {"logprobs": True}],
    "tools": [TOOL],
    "tool_choice": ["none", {"tools": [TOOL]}],
    "add_generation_prompt": False,
    "continue_final_message": [
        True,
        {"messages": [*CHAT["messages"], {"role": "assistant", "content": "x"}]},
    ],
    "chat_template_kwargs": {"x": 1},
}
# Values that have several parts, for `[value, what it needs]` would be taken for two.
LISTS = {"stop", "stop_token_ids", "adapters", "prompt", "messages", "tools"}


def of(samples: dict[str, object], name: str) -> dict[str, object]:
    value = samples[name]
    if name not in LISTS and isinstance(value, list):
        return {name: value[0], **value[1]}
    return {name: value}


@pytest.fixture(scope="module")
def web(base_of, adapter_of, quantised_cache, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    arguments = ("--chat-template", str(template), "--memory", "8MiB")
    with (
        server_process(base_of("llama"), quantised_cache, *arguments) as server,
        httpx.Client(base_url=server.http, timeout=600) as web,
    ):
        web.put("/v1/adapters/lora", json={"source": str(adapter_of("llama", "lora"))}).raise_for_status()
        yield web


ENDPOINTS = [
    ("/v1/completions", CompletionBody, COMPLETION, SERVED | OF_COMPLETIONS),
    ("/v1/chat/completions", ChatBody, CHAT, SERVED | OF_CHATS),
]


@pytest.mark.parametrize(("path", "body", "request_", "samples"), ENDPOINTS)
def test_every_field_that_is_listed_as_served_is(web, path, body, request_, samples):
    assert set(samples) == set(body.model_fields)
    for name in samples:
        answer = web.post(path, json=request_ | of(samples, name))
        assert answer.status_code == 200, (name, answer.text)


@pytest.mark.parametrize(("path", "body", "request_"), [each[:3] for each in ENDPOINTS])
def test_every_other_field_is_refused_by_its_name(web, path, body, request_):
    for name in (*body.refused, "anything_else"):
        answer = web.post(path, json=request_ | {name: "any"})
        assert answer.status_code == 400, (name, answer.text)
        assert answer.json()["error"]["param"] == name
    nothing = dict.fromkeys(body.refused)
    assert web.post(path, json=request_ | nothing).status_code == 200
    for name, (_, harmless) in body.refused.items():
        for value in harmless:
            answer = web.post(path, json=request_ | {name: value})
            assert answer.status_code == 200, (name, answer.text)


def test_what_is_sent_has_its_effect(web):
    def text(**fields: object) -> str:
        answer = web.post("/v1/completions", json=COMPLETION | {"temperature": 0} | fields).json()
        return answer["choices"][0]["text"]

    plain = text(max_tokens=8)
    assert text(model="lora", max_tokens=8) != plain
    assert text(max_tokens=8, stop=plain[3]) == plain[:3]
    assert text(max_tokens=8, stop=plain[3], include_stop_str_in_output=True) == plain[:4]
    assert text(echo=True, max_tokens=8) == PROMPT + plain
    assert text(temperature=1, seed=1, max_tokens=8) == text(temperature=1, seed=1, max_tokens=8)
    assert text(adapters=[{"name": "lora", "weight": 0.0}], max_tokens=8) == plain
