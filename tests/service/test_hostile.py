"""What goes wrong outside ends in a clear status, leaves nothing behind, and the server goes on.

Every test ends with the engine's integrity check (see `client` in conftest.py).
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import pytest

from support.models import MAX_CONTEXT, VOCAB_SIZE
from support.prompts import PROMPT, until
from support.serving import serving
from turret.v1 import inference_pb2
from turret_client import (
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    TurretError,
)
from turret_server.config import ServerConfig


@pytest.fixture(autouse=True)
def _still_answering(client, served) -> Iterator[None]:
    expected = client.generate(PROMPT, max_tokens=6).token_ids
    yield
    assert client.generate(PROMPT, max_tokens=6).token_ids == expected
    until(lambda: served.metric("turret_running_requests") == 0)
    assert served.metric("turret_arena_pages", owner="sequence") == 0


def raw(served, message: bytes) -> grpc.Future:
    channel = grpc.insecure_channel(served.address)
    return channel.unary_unary("/turret.v1.InferenceService/Generate").future(message)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 1e30}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x" * 300]}, "stop"),
    ],
)
def test_a_parameter_out_of_range_is_named(client, arguments, named):
    with pytest.raises(InvalidArgumentError, match=named) as refused:
        client.generate(PROMPT, **arguments)
    assert refused.value.reason == "INVALID_REQUEST"
    assert refused.value.metadata == {"field": named}


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(client, prompt):
    with pytest.raises(InvalidArgumentError, match="no tokens"):
        client.generate(prompt)


def test_a_request_without_a_prompt_is_refused(served):
    call = raw(served, inference_pb2.GenerateRequest(max_tokens=3).SerializeToString())
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no prompt" in call.details()


def test_token_ids_outside_the_vocabulary_are_refused(client):
    with pytest.raises(InvalidArgumentError, match=f"below {VOCAB_SIZE}, .* found {VOCAB_SIZE}"):
        client.generate([5, VOCAB_SIZE])
    with pytest.raises(InvalidArgumentError, match="found 4294967295"):
        client.generate([2**32 - 1])


def test_a_prompt_longer_than_the_context_is_refused_with_the_arithmetic(client):
    with pytest.raises(InvalidArgumentError, match=f"{MAX_CONTEXT} tokens.*take 300") as refused:
        client.generate([5] * 300)
    assert refused.value.reason == "PROMPT_TOO_LONG"


def test_a_request_may_use_the_whole_context_and_no_more(client):
    room = 6
    assert len(client.generate([5] * (MAX_CONTEXT - room), max_tokens=room).token_ids) == room
    with pytest.raises(InvalidArgumentError):
        client.generate([5] * (MAX_CONTEXT - room), max_tokens=room + 1)
    # The prefix takes 7 of them.
    with pytest.raises(InvalidArgumentError, match="take 257"):
        client.generate([5] * (MAX_CONTEXT - room), adapter="prefix")


def test_a_huge_text_is_refused_and_holds_nobody_up(client):
    with pytest.raises(InvalidArgumentError) as refused:
        client.generate("fox " * 500_000)
    assert refused.value.reason == "PROMPT_TOO_LONG"


def test_a_message_over_grpcs_limit_is_refused(client):
    with pytest.raises(ResourceExhaustedError, match="larger than max"):
        client.generate("fox " * 2_000_000)


def test_invalid_utf8_is_an_invalid_argument(served):
    for field in (b"\x0a", b"\x1a"):  # text, adapter
        call = raw(served, field + b"\x02\xc3\x28")
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "UTF-8" in call.details()


def test_bytes_that_are_no_message_are_an_invalid_argument(served):
    call = raw(served, b"\xff" * 50)
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_adapter_is_not_found(client):
    calls = (
        partial(client.generate, PROMPT, adapter="nobody"),
        partial(client.get_adapter, "nobody"),
        partial(client.unload_adapter, "nobody"),
    )
    for call in calls:
        with pytest.raises(NotFoundError) as refused:
            call()
        assert refused.value.reason == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("name", [".hidden", "../etc", "a/b", "é", "x" * 129, "ü" * 50_000, "a b"])
def test_a_name_that_none_can_have_is_refused(client, name):
    calls = (
        partial(client.load_adapter, name, "/srv"),
        partial(client.unload_adapter, name),
        partial(client.get_adapter, name),
        partial(client.generate, PROMPT, adapter=name),
    )
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="name") as refused:
            call()
        assert refused.value.reason == "INVALID_REQUEST"


def test_a_broken_adapter_is_refused_and_leaves_nothing_behind(client, adapter_of, tmp_path, served):
    before = client.list_adapters()
    pages = served.metric("turret_arena_pages", owner="lora")
    (tmp_path / "adapter_config.json").write_bytes(
        (adapter_of("llama", "lora") / "adapter_config.json").read_bytes()
    )
    whole = (adapter_of("llama", "lora") / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidArgumentError) as refused:
        client.load_adapter("lora", str(tmp_path))
    assert refused.value.reason == "ADAPTER_INVALID"
    with pytest.raises(NotFoundError) as missing:
        client.load_adapter("lora", str(tmp_path / "nowhere"))
    assert missing.value.reason == "ADAPTER_SOURCE_NOT_FOUND"
    assert client.list_adapters() == before
    assert served.metric("turret_arena_pages", owner="lora") == pages


def test_an_adapter_of_another_base_is_refused(client, adapter_of):
    with pytest.raises(FailedPreconditionError) as refused:
        client.load_adapter("foreign", str(adapter_of("qwen3", "lora")))
    assert refused.value.reason == "ADAPTER_BASE_MISMATCH"


def test_a_killed_client_frees_its_pages(client, served):
    code = (
        "import sys; from turret_client import Client\n"
        "for chunk in Client(sys.argv[1]).stream('fox', adapter='lora', max_tokens=240): print(flush=True)"
    )
    with subprocess.Popen(  # noqa: S603 (the command is this test's)
        [sys.executable, "-c", code, served.address], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.kill()
    until(lambda: client.get_adapter("lora").active_requests == 0)
    until(lambda: served.metric("turret_running_requests") == 0)


def test_a_stream_that_is_dropped_frees_its_pages(client, served):
    for _ in range(5):
        stream = client.stream(PROMPT, adapter="prompt", max_tokens=200)
        next(stream)
        stream.close()
    until(lambda: client.get_adapter("prompt").active_requests == 0)
    until(lambda: served.metric("turret_running_requests") == 0)


def test_a_deadline_ends_the_request_and_frees_its_pages(client):
    with pytest.raises(DeadlineExceededError):
        client.generate(PROMPT, adapter="lora", max_tokens=240, timeout=0.15)
    until(lambda: client.get_adapter("lora").active_requests == 0)


@pytest.fixture
def tiny(base_of, quantised_cache):
    """A server with room for one short request at a time, and a queue for one more."""
    config = ServerConfig(
        model=str(base_of("llama")),
        dtype="float32",
        device="cpu",
        memory="60KiB",
        max_batch_requests=1,
        max_queue=1,
        cache=quantised_cache,
    )
    with serving(config) as served, Client(served.address) as client:
        yield client
        served.parts.engine.check_integrity()


def test_a_full_queue_answers_resource_exhausted(tiny):
    stream = tiny.stream(PROMPT, max_tokens=20)
    next(stream)

    def ask(_):
        try:
            return tiny.generate(PROMPT, max_tokens=20)
        except TurretError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    refused = [answer for answer in answers if isinstance(answer, ResourceExhaustedError)]
    assert refused
    assert {answer.reason for answer in refused} == {"QUEUE_FULL"}
    assert len(refused) < 6
    assert not [answer for answer in answers if isinstance(answer, TurretError) and answer not in refused]
    assert len(list(stream)) == 19


def test_what_can_never_fit_is_refused_with_the_arithmetic(tiny, adapter_of):
    with pytest.raises(FailedPreconditionError, match=r"needs \d+ pages .* the arena has \d+") as refused:
        tiny.generate(PROMPT, max_tokens=240)
    assert refused.value.reason == "REQUEST_TOO_LARGE"
    with pytest.raises(FailedPreconditionError, match="the adapter needs") as refused:
        tiny.load_adapter("lora", str(adapter_of("llama", "lora-all-linear")))
    assert refused.value.reason == "ADAPTER_TOO_LARGE"
    assert tiny.list_adapters() == []
