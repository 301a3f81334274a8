"""Chats over HTTP with a real model, by the clients that people use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from support.serving import server_process
from turret_demo.real_model import real_model

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CURL = shutil.which("curl")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with server_process(real_model(), cache, "--memory", "256MiB") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def asked(client):
    """A greedy question to the base."""
    base = client.models.list().data[0].id
    return {"model": base, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 12}


def test_the_capital_of_france_is_paris(client, asked):
    answer = client.chat.completions.create(**asked)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 12


async def test_the_asynchronous_client_streams_it(server, client, asked):
    whole = client.chat.completions.create(**asked).choices[0].message.content
    async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none") as asynchronous:
        stream = await asynchronous.chat.completions.create(stream=True, **asked)
        deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(deltas) == whole
    assert len(deltas) > 3


def test_curl_asks_it(server, asked):
    assert CURL
    command = [CURL, "--silent", f"{server.http}/v1/chat/completions", "--json", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_several_answers_share_the_prompt(client, asked):
    answer = client.chat.completions.create(n=3, seed=1, **asked | {"temperature": 1.0})
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    alone = client.chat.completions.create(**asked)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens


def test_log_probabilities_belong_to_the_tokens(client, asked):
    choice = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked).choices[0]
    found = choice.logprobs.content
    assert b"".join(bytes(each.bytes) for each in found).decode() == choice.message.content
    assert all(each.top_logprobs[0].token == each.token for each in found)  # greedy


def test_an_answer_keeps_to_a_schema(client, asked):
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}},
        "required": ["capital"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": schema, "strict": True}}
    options = asked | {"max_completion_tokens": 60}
    choice = client.chat.completions.create(response_format=form, **options).choices[0]
    assert choice.finish_reason == "stop"
    assert set(json.loads(choice.message.content)) == {"capital"}


def test_the_last_message_can_be_continued(client, asked):
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    extra = {"continue_final_message": True}
    answer = client.chat.completions.create(extra_body=extra, **asked | {"messages": begun})
    assert answer.choices[0].message.content.lstrip().startswith("Paris")


def test_the_tokens_of_a_chat_are_those_that_it_costs(server, client, asked):
    assert CURL
    body = json.dumps({"messages": QUESTION, "return_token_strs": True})
    command = [CURL, "--silent", f"{server.http}/tokenize", "--json", body]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # noqa: S603
    assert found["count"] == client.chat.completions.create(**asked).usage.prompt_tokens
    assert found["token_strs"][0] == "<|im_start|>"


class Capital(BaseModel):
    capital: str


def test_langchain_asks_streams_and_gets_objects(server, asked):
    options = {"base_url": f"{server.http}/v1", "api_key": "none", "model": asked["model"], "max_retries": 0}
    model = ChatOpenAI(temperature=0, max_tokens=60, **options)
    question = QUESTION[0]["content"]
    whole = model.invoke(question)
    assert "Paris" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream(question)) == whole.content
    structured = model.with_structured_output(Capital, method="json_schema")
    assert structured.invoke(question) == Capital(capital="Paris")
    assert OpenAI(temperature=0, max_tokens=8, **options).invoke("The capital of France is")


LITELLM = """
import sys
from litellm import completion, text_completion
from pydantic import BaseModel

class Capital(BaseModel):
    capital: str

question = {
    "base_url": sys.argv[1],
    "api_key": "none",
    "messages": [{"role": "user", "content": sys.argv[3]}],
    "model": f"hosted_vllm/{sys.argv[2]}",
    "temperature": 0,
    "max_tokens": 60,
}
whole = completion(**question)
assert "Paris" in whole.choices[0].message.content
assert whole.usage.completion_tokens > 0
parts = [chunk.choices[0].delta.content or "" for chunk in completion(stream=True, **question)]
assert len(parts) > 2
assert "".join(parts) == whole.choices[0].message.content
answer = completion(response_format=Capital, **question).choices[0].message.content
assert Capital.model_validate_json(answer) == Capital(capital="Paris")
del question["messages"]
assert text_completion(prompt="The capital of France is", **question).choices[0].text
"""


def test_litellm_asks_streams_and_gets_objects(server, asked):
    """In a process of its own: it warns of what it calls itself, and reads a list of prices from the web."""
    arguments = (f"{server.http}/v1", asked["model"], QUESTION[0]["content"])
    subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", LITELLM, *arguments],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        check=True,
    )


def test_what_the_template_has_no_place_for_is_refused(client, asked):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(tools=[tool], **asked)
