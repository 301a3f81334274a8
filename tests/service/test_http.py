"""The HTTP door of `turret serve`, called by the clients that people use: openai, and curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess

import openai
import pytest

from support.prompts import PROMPT, until
from support.serving import server_process
from turret_client import Client

CURL = shutil.which("curl")


@pytest.fixture(scope="module")
def folder(adapter_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("lora", "prefix"):
        shutil.copytree(adapter_of("llama", name), folder / name)
    return folder


@pytest.fixture(scope="module")
def server(base_of, folder, quantised_cache):
    with server_process(
        base_of("llama"), quantised_cache, "--adapters", str(folder), "--memory", "8MiB", "--vllm-metrics"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def base(server):
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none") as client:
        return client.models.list().data[0].id


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def curl(server, path: str, *arguments: str) -> str:
    assert CURL
    command = [CURL, "--silent", "--show-error", f"{server.http}{path}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model", ["base", "lora", "prefix"])
def test_answers_are_those_of_grpc(server, client, base, model):
    named = base if model == "base" else model
    answer = client.completions.create(model=named, prompt=PROMPT, max_tokens=8, temperature=0)
    with Client(server.address) as ours:
        expected = ours.generate(
            PROMPT, adapter=None if model == "base" else model, max_tokens=8, temperature=0
        )
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == expected.usage.generated_tokens == 8
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert (answer.system_fingerprint or "") == expected.revision
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_adds_up_to_the_answer_and_has_its_usage(client):
    options = {"model": "lora", "prompt": PROMPT, "max_tokens": 12, "seed": 7}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]


async def test_the_asynchronous_client_streams_many_at_once(async_client):
    async def text(model: str) -> str:
        stream = await async_client.completions.create(
            model=model, prompt=PROMPT, max_tokens=8, temperature=0, stream=True
        )
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    first = await asyncio.gather(*(text(model) for model in ("lora", "prefix") * 4))
    assert first == [await text("lora"), await text("prefix")] * 4


def test_several_prompts_and_answers_come_in_their_order(client):
    answer = client.completions.create(
        model="lora", prompt=[PROMPT, "Ahoy"], n=2, max_tokens=3, seed=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith(PROMPT) for choice in answer.choices] == [True, True, False, False]


def test_token_ids_are_a_prompt(server, client):
    tokens = json.loads(curl(server, "/tokenize", "--json", json.dumps({"prompt": PROMPT})))["tokens"]
    options = {"model": "lora", "max_tokens": 4, "temperature": 0}
    by_ids = client.completions.create(prompt=tokens, **options)
    assert by_ids.choices[0].text == client.completions.create(prompt=PROMPT, **options).choices[0].text
    text = json.loads(curl(server, "/detokenize", "--json", json.dumps({"tokens": tokens})))["prompt"]
    assert text == PROMPT


def test_log_probabilities_are_those_of_the_tokens(client):
    answer = client.completions.create(
        model="lora", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    found = answer.choices[0].logprobs
    num_tokens = answer.usage.prompt_tokens + 4
    assert [len(each) for each in (found.tokens, found.token_logprobs, found.text_offset)] == [num_tokens] * 3
    assert found.token_logprobs[0] is None
    # Greedy: each generated token is the likeliest in its place.
    for value, top in zip(found.token_logprobs[-4:], found.top_logprobs[-4:], strict=True):
        assert value == max(top.values())


def test_extensions_go_into_extra_body(client):
    alone = client.completions.create(model="lora", prompt=PROMPT, max_tokens=4, temperature=0)
    listed = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=PROMPT,
        max_tokens=4,
        temperature=0,
        extra_body={"adapters": [{"name": "lora", "weight": 1.0}], "top_k": -1, "min_p": 0.0},
    )
    assert listed.choices[0].text == alone.choices[0].text


def test_models_are_the_base_and_its_adapters(client, base):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == [base, "lora", "prefix"]
    assert models["lora"].parent == base
    revision = models["lora"].revision
    assert client.models.retrieve(f"lora@{revision[:8]}").id == "lora"
    answer = client.completions.create(model=f"{base}:lora@{revision[:8]}", prompt=PROMPT, max_tokens=1)
    assert answer.system_fingerprint == revision
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="lora", prompt=PROMPT, top_p=2.0)
    assert refused.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="suffix is not served") as refused:
        client.completions.create(model="lora", prompt=PROMPT, suffix="x")
    assert refused.value.request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="lora", prompt=PROMPT, max_tokens=100_000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="/v1/moderations is not served; /v1/"):
        client.moderations.create(input="x")
    with pytest.raises(openai.NotFoundError, match="/v1/responses is not served; /v1/"):
        client.responses.create(model="lora", input="x")


def test_a_client_that_leaves_frees_its_pages(server, client):
    stream = client.completions.create(
        model="lora", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.metrics()["turret_running_requests"] >= 1
    stream.close()
    until(lambda: server.metrics()["turret_running_requests"] == 0)
    assert server.metrics()['turret_requests_total{outcome="cancelled"}'] >= 1


def test_curl_needs_no_more_than_json(server):
    body = json.dumps({"model": "lora", "prompt": PROMPT, "max_tokens": 3, "stream": True})
    text = curl(server, "/v1/completions", "--no-buffer", "--json", body)
    assert text.endswith("data: [DONE]\n\n")
    assert json.loads(text.split("\n\n")[0].removeprefix("data: "))["object"] == "text_completion"
    assert curl(server, "/health", "--fail") == ""
    assert json.loads(curl(server, "/version"))["version"]
    assert "<h1>Turret" in curl(server, "/docs")
    assert json.loads(curl(server, "/openapi.json"))["openapi"] == "3.1.0"


def test_adapters_are_administered_as_resources_and_as_vllm_does(server, client, adapter_of):
    first, second = (str(adapter_of("llama", "lora", seed)) for seed in (1, 2))

    def call(method: str, path: str, body: object = None) -> dict:
        data = [] if body is None else ["--json", json.dumps(body)]
        return json.loads(curl(server, path, "--request", method, *data))

    one = call("PUT", "/v1/adapters/mine", {"source": first})
    assert (one["name"], one["method"]) == ("mine", "lora")
    two = call("PUT", "/v1/adapters/mine", {"source": second})
    assert one["revision"] != two["revision"]
    listed = call("GET", "/v1/adapters/mine/revisions")["revisions"]
    assert [each["revision"] for each in listed] == [two["revision"], one["revision"]]
    split = call("PUT", "/v1/adapters/mine/split", {"revision": one["revision"][:8], "percent": 10})
    assert split["split"] == {"revision": one["revision"], "percent": 10}
    assert call("DELETE", "/v1/adapters/mine/split")["split"] is None
    assert call("POST", "/v1/adapters/mine/rollback")["revision"] == one["revision"]
    assert call("GET", "/v1/adapters/mine")["revision"] == one["revision"]
    assert "mine" in [each["name"] for each in call("GET", "/v1/adapters?page_size=10")["adapters"]]
    assert call("GET", "/v1/downloads") == {"downloads": []}
    assert call("DELETE", "/v1/adapters/mine")["state"] == "unloaded"
    assert call("GET", "/v1/adapters/mine")["error"]["code"] == "model_not_found"

    vllms = {"lora_name": "theirs", "lora_path": first}
    assert "Success" in curl(server, "/v1/load_lora_adapter", "--json", json.dumps(vllms))
    assert client.completions.create(model="theirs", prompt=PROMPT, max_tokens=1).choices
    again = call("POST", "/v1/load_lora_adapter", vllms)
    assert "load_inplace" in again["error"]["message"]
    vllms = {"lora_name": "theirs", "lora_path": second, "load_inplace": True}
    assert "Success" in curl(server, "/v1/load_lora_adapter", "--json", json.dumps(vllms))
    assert "Success" in curl(server, "/v1/unload_lora_adapter", "--json", '{"lora_name": "theirs"}')
    assert call("POST", "/v1/unload_lora_adapter", {"lora_name": "theirs"})["error"]["param"] == "model"


def test_routers_learn_which_adapters_are_resident(server, client, base):
    client.completions.create(model="lora", prompt=PROMPT, max_tokens=1)

    def labels() -> str:
        [found] = [key for key in server.metrics() if key.startswith("vllm:lora_requests_info")]
        return found

    # Idle, and listed all the same.
    until(lambda: "lora" in labels())
    assert f'model_name="{base}"' in labels()
    assert 'waiting_lora_adapters=""' in labels()
    assert server.metrics()[f'vllm:num_requests_waiting{{model_name="{base}"}}'] == 0


def test_an_answer_can_have_a_form(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    options = {"model": "lora", "prompt": PROMPT, "max_tokens": 100}
    chosen = client.completions.create(
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **options
    ).choices[0]
    assert chosen.text in ("yes", "no")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = client.completions.create(extra_body={"response_format": form}, **options).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text)["n"], int)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(extra_body={"structured_outputs": {"regex": "("}}, **options)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_adapter_is_uploaded_as_an_archive(server, client, adapter_of, tmp_path, kind):
    folder = adapter_of("llama", "lora", 3)
    archive = shutil.make_archive(str(tmp_path / "mine"), kind, folder)
    found = json.loads(curl(server, "/v1/adapters/uploaded/archive", "--upload-file", archive))
    with Client(server.address) as ours:
        ours.load_adapter("same", str(folder))
        assert ours.get_adapter("same").revision == found["revision"]
    assert client.completions.create(model="uploaded", prompt=PROMPT, max_tokens=1).choices
    for name in ("uploaded", "same"):
        curl(server, f"/v1/adapters/{name}", "--request", "DELETE")


def test_what_is_no_archive_of_an_adapter_is_refused(server, tmp_path):
    for content in (b"", b"hello", b"PK\x03\x04 and nothing else", b"\x1f\x8b"):
        (tmp_path / "file").write_bytes(content)
        answer = curl(server, "/v1/adapters/none/archive", "--upload-file", str(tmp_path / "file"))
        assert json.loads(answer)["error"]["code"] == "adapter_source_not_found"


def test_a_base_without_a_template_says_how_to_give_one(client, base):
    with pytest.raises(openai.UnprocessableEntityError, match="--chat-template") as refused:
        client.chat.completions.create(model=base, messages=[{"role": "user", "content": "Ahoy"}])
    assert refused.value.code == "no_chat_template"
