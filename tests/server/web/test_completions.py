"""POST /v1/completions over a scripted service: what a request becomes, and what becomes of the chunks."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.web.conftest import USAGE, Generation, chunk, last
from turret_server.errors import QueueFullError
from turret_server.serving.request import AdapterRef, FinishReason, GenerationRequest, TokenLogprob
from turret_server.serving.tokens import Tokens

PATH = "/v1/completions"
USED = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 3},
}


def events(text: str) -> list[object]:
    """The events of a stream, which ends as OpenAI's do."""
    *found, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(each.removeprefix("data: ")) for each in found]


async def asked(door, **fields) -> GenerationRequest:
    answer = await door.post(PATH, {"prompt": "Ahoy", **fields})
    assert answer.status_code == 200, answer.text
    return door.generation.request


async def test_a_request_has_openais_defaults(door):
    assert await asked(door) == GenerationRequest(prompt="Ahoy", temperature=1.0, max_tokens=16)


async def test_fields_that_are_null_are_as_if_they_were_left_out(door):
    names = (
        "model",
        "max_tokens",
        "temperature",
        "n",
        "stop",
        "seed",
        "suffix",
        "echo",
        "logit_bias",
        "user",
    )
    assert await asked(door, **dict.fromkeys(names)) == await asked_anew(door)


async def asked_anew(door) -> GenerationRequest:
    door.generation.requests.clear()
    return await asked(door)


@pytest.mark.parametrize(
    ("sent", "becomes"),
    [
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"n": 2}, {"n": 2}),
        ({"stop": "."}, {"stop": (".",)}),
        ({"stop": [".", "!"]}, {"stop": (".", "!")}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100.0, 7: 1.5}}),
        ({"logprobs": 2}, {"logprobs": 2}),
        ({"user": "me"}, {"routing_key": "me"}),
        ({"user": "me", "routing_key": "we"}, {"routing_key": "we"}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"min_tokens": 2}, {"min_tokens": 2}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"include_stop_str_in_output": True}, {"include_stop": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"prompt_logprobs": 1}, {"prompt_logprobs": 1}),
        ({"add_special_tokens": False}, {"add_special_tokens": False}),
        ({"priority": 3}, {"priority": -3}),
        ({"cache_salt": "s"}, {"cache_salt": "s"}),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}},
            {"json_schema": '{"a": 1}'},
        ),
        ({"structured_outputs": {"json": {"a": 1}}}, {"json_schema": '{"a": 1}'}),
        ({"structured_outputs": {"json": '{"a": 1}'}}, {"json_schema": '{"a": 1}'}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": "start: x"}}, {"grammar": "start: x"}),
        ({"model": "base"}, {}),
        ({"model": "pirate"}, {"adapters": (AdapterRef(name="pirate"),)}),
        ({"model": "base:pirate"}, {"adapters": (AdapterRef(name="pirate"),)}),
        ({"model": "pirate@3f9a1c07"}, {"adapters": (AdapterRef(name="pirate@3f9a1c07"),)}),
        (
            {"adapters": [{"name": "a", "weight": 0.5}, {"name": "b", "task": 2}]},
            {"adapters": (AdapterRef(name="a", weight=0.5), AdapterRef(name="b", task=2))},
        ),
        ({"prompt": [1, 2]}, {"prompt": [1, 2]}),
        ({"best_of": 1, "suffix": None, "response_format": {"type": "text"}}, {}),
    ],
)
async def test_a_field_becomes_the_services(door, sent, becomes):
    expected = {"prompt": "Ahoy", "temperature": 1.0, "max_tokens": 16} | becomes
    assert await asked(door, **sent) == GenerationRequest(**expected)


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
        ({"structured_outputs": {"mood": "a"}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"),
        ({"mood": "good"}, "mood"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"stream": True, "stream_options": {"mood": 1}}, "stream_options"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"0" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 2**31}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"user": "x" * 129}, "user"),
        ({"model": "pirate", "adapters": [{"name": "a"}]}, "adapters"),
        ({"adapters": [{"name": "a", "mood": 1}]}, "adapters"),
    ],
)
async def test_a_field_that_is_not_served_is_refused_by_its_name(door, sent, param):
    refused = await door.post(PATH, {"prompt": "Ahoy", **sent})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert door.generation.requests == []


@pytest.mark.parametrize("model", ["gpt-4o mini", "other/base", "other:pirate", "", "../etc", "x" * 1000])
async def test_a_model_that_nothing_can_be_called_does_not_exist(door, model):
    refused = await door.post(PATH, {"prompt": "Ahoy", "model": model})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"n": NaN}', b"\xff"]
)
async def test_a_body_that_is_no_request_is_refused(door, body):
    async with door.client() as client:
        refused = await client.post(PATH, content=body)
    assert refused.status_code == 400
    assert len(refused.text) < 500


async def test_a_large_body_is_parsed_as_well(door):
    assert (await asked(door, prompt="x" * 100_000)).prompt == "x" * 100_000


async def test_an_answer_has_the_texts_and_the_usage(door):
    answer = (await door.post(PATH, {"prompt": "x", "model": "pirate"}, **{"x-request-id": "mine"})).json()
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "id": "cmpl-mine",
        "object": "text_completion",
        "model": "pirate",
        "choices": [{"index": 0, "text": "Ahoy, matey", "logprobs": None, "finish_reason": "stop"}],
        "system_fingerprint": "r1",
        "usage": USED,
    }


async def test_virtual_tokens_that_were_cached_are_no_tokens_of_the_prompt(open_door):
    usage = type(USAGE)(prompt_tokens=5, cached_tokens=9, generated_tokens=2)
    answer = await open_door(generation=Generation(last(usage=usage))).post(PATH, {"prompt": "x"})
    assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


async def test_a_stream_has_an_event_for_each_text_and_no_empty_ones(open_door):
    door = open_door(generation=Generation(chunk("A"), chunk(""), chunk("hoy"), last("")))
    answer = await door.post(PATH, {"prompt": "x", "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(answer.text)
    assert [each["choices"][0]["text"] for each in found] == ["A", "hoy", ""]
    assert [each["choices"][0]["finish_reason"] for each in found] == [None, None, "stop"]
    assert len({(each["id"], each["created"]) for each in found}) == 1
    assert all("usage" not in each for each in found)


async def test_the_usage_of_a_stream_comes_last_if_it_is_wanted(door):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *texts, usage = events((await door.post(PATH, {"prompt": "x", **options})).text)
    assert all(each["usage"] is None for each in texts)
    assert (usage["choices"], usage["usage"]) == ([], USED)


class ByPrompt(Generation):
    """Answers with the prompt, the later the earlier it is."""

    async def generate(self, request, _):
        self.requests.append(request)
        for _ in range(3 - len(request.prompt)):
            await asyncio.sleep(0)
        for index in range(request.n):
            text = f"<{request.prompt}{index}>"
            yield last(text, index=index, usage=USAGE if index == request.n - 1 else None)


async def test_several_prompts_are_answered_in_their_order(open_door):
    door = open_door(generation=ByPrompt())
    answer = (await door.post(PATH, {"prompt": ["a", "bb"], "n": 2})).json()
    assert [(each["index"], each["text"]) for each in answer["choices"]] == [
        (0, "<a0>"), (1, "<a1>"), (2, "<bb0>"), (3, "<bb1>"),
    ]  # fmt: skip
    assert answer["usage"]["total_tokens"] == 14
    door = open_door(generation=ByPrompt())
    found = events((await door.post(PATH, {"prompt": [[1], [2, 2]], "stream": True})).text)
    assert sorted((each["choices"][0]["index"], each["choices"][0]["text"]) for each in found) == [
        (0, "<[1]0>"), (1, "<[2, 2]0>"),
    ]  # fmt: skip


async def test_answers_that_the_tenants_queue_never_has_room_for_are_refused(open_door):
    door = open_door(generation=ByPrompt())
    refused = await door.post(PATH, {"prompt": ["a"] * 33, "n": 32})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    assert "at most 1024 answers" in refused.json()["error"]["message"]
    assert (await door.post(PATH, {"prompt": ["a"] * 32, "n": 32})).status_code == 200


async def test_if_one_of_several_prompts_fails_all_do(open_door):
    others = asyncio.Event()

    class Failing(Generation):
        async def generate(self, request, _):
            if request.prompt == "bad":
                raise QueueFullError("full", retry_after=1)
            try:
                await asyncio.Event().wait()
                yield
            finally:
                others.set()

    refused = await open_door(generation=Failing()).post(PATH, {"prompt": ["a", "bad", "c"]})
    assert refused.status_code == 429
    assert others.is_set()


def logprob(text: str, value: float, *top: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=ord(text[0]), token=text.encode(), logprob=value, rank=1, top=top)


SCORED = (
    chunk("A", logprobs=(logprob("A", -1.0, logprob("B", -0.5)),)),
    last("ü", logprobs=(TokenLogprob(token_id=9, token=b"\xc3", logprob=-2.0, rank=1), logprob("ü", -3.0))),
)


async def test_log_probabilities_have_the_tokens_and_their_places_in_the_text(open_door):
    door = open_door(generation=Generation(*SCORED))
    answer = (await door.post(PATH, {"prompt": "x", "logprobs": 1})).json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["A", "bytes:\\xc3", "ü"],
        "token_logprobs": [-1.0, -2.0, -3.0],
        "top_logprobs": [{"B": -0.5, "A": -1.0}, {"bytes:\\xc3": -2.0}, {"ü": -3.0}],
        "text_offset": [0, 1, 1],
    }


async def test_the_events_of_a_stream_have_the_log_probabilities_of_their_tokens(open_door):
    door = open_door(generation=Generation(*SCORED))
    found = events((await door.post(PATH, {"prompt": "x", "logprobs": 0, "stream": True})).text)
    assert [each["choices"][0]["logprobs"]["tokens"] for each in found] == [["A"], ["bytes:\\xc3", "ü"]]


class Tokenised:
    """Splits prompts into characters."""

    async def tokens(self, request, _):
        text = request.prompt if isinstance(request.prompt, str) else "".join(map(chr, request.prompt))
        return Tokens(token_ids=tuple(map(ord, text)), parts=tuple(each.encode() for each in text), text=text)


async def test_an_echo_begins_with_the_prompt(open_door):
    for prompt in ("xy", [120, 121]):
        door = open_door(tokens=Tokenised())
        answer = (await door.post(PATH, {"prompt": prompt, "echo": True})).json()
        assert answer["choices"][0]["text"] == "xyAhoy, matey"


async def test_an_echo_has_the_log_probabilities_of_the_prompt(open_door):
    first = chunk("A", logprobs=(logprob("A", -1.0),), prompt_logprobs=(logprob("y", -4.0),))
    second = [last("B", index=index, logprobs=(logprob("B", -2.0),), usage=USAGE) for index in (0, 1)]
    door = open_door(generation=Generation(first, *second), tokens=Tokenised())
    answer = (await door.post(PATH, {"prompt": "xy", "echo": True, "logprobs": 0, "n": 2})).json()
    one, two = (each["logprobs"] for each in answer["choices"])
    assert (one["tokens"], one["token_logprobs"]) == (["x", "y", "A", "B"], [None, -4.0, -1.0, -2.0])
    assert one["text_offset"] == [0, 1, 2, 3]
    assert (two["tokens"], two["token_logprobs"]) == (["x", "y", "B"], [None, -4.0, -2.0])
    assert door.generation.request.prompt_logprobs == 0


async def test_the_log_probabilities_of_the_prompt_are_those_of_vllm(open_door):
    first = last("A", prompt_logprobs=(logprob("y", -4.0, logprob("z", -1.0)),))
    door = open_door(generation=Generation(first))
    answer = (await door.post(PATH, {"prompt": "xy", "prompt_logprobs": 1})).json()
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            str(ord("y")): {"logprob": -4.0, "rank": 1, "decoded_token": "y"},
            str(ord("z")): {"logprob": -1.0, "rank": 1, "decoded_token": "z"},
        },
    ]


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
async def test_an_answer_says_why_it_ended(open_door, reason):
    door = open_door(generation=Generation(last("x", finish_reason=reason)))
    answer = (await door.post(PATH, {"prompt": "x"})).json()
    assert answer["choices"][0]["finish_reason"] == reason.value
