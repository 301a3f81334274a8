from __future__ import annotations

import inspect
import os
import re

import pytest

from support import scripted_server as script
from turret.v1 import adapters_pb2, inference_pb2, pooling_pb2, prompts_pb2
from turret_adapters.formats.files import digest_of_folder
from turret_client import (
    Adapter,
    AdapterMethod,
    AdapterRef,
    AdapterRevision,
    AdapterState,
    AsyncClient,
    Choice,
    Chunk,
    Classification,
    Classifications,
    Client,
    Download,
    Embeddings,
    FinishReason,
    Generation,
    GenerationOptions,
    InvalidArgumentError,
    PinnedPrompt,
    Problem,
    Scores,
    Span,
    TaggedText,
    TaggedToken,
    Tags,
    TokenLogprob,
    TrafficSplit,
    Usage,
)

USAGE = Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
PIRATE = Adapter(
    name="pirate",
    revision="0123456789abcdef0123456789abcdef",
    state=AdapterState.RESIDENT,
    method=AdapterMethod.LORA,
    num_parameters=4_500_000,
    max_rank=16,
    num_virtual_tokens=0,
    file_bytes=18_000_000,
    arena_bytes=9 * 1024 * 1024,
    active_requests=2,
    draining_revisions=("fedcba", "abcdef"),
    error="",
    num_tasks=0,
    vocab_size=0,
    own_tokenizer=False,
    history=(AdapterRevision(revision="0123", source="/srv/pirate", published_at=1.5),),
    traffic_split=TrafficSplit(revision="4567", percent=10),
)


def test_generate(call):
    assert call("generate", "Hello") == Generation(
        text="Ahoy, mátey",
        token_ids=(7, 8, 9, 2),
        finish_reason=FinishReason.STOP,
        usage=USAGE,
        revision="r1",
    )


def test_stream(call):
    assert call("stream", "Hello") == [
        Chunk(text="Ahoy, ", token_ids=(7, 8), revision="r1", finish_reason=None, usage=None),
        Chunk(text="mátey", token_ids=(9,), revision="r1", finish_reason=None, usage=None),
        Chunk(text="", token_ids=(2,), revision="r1", finish_reason=FinishReason.STOP, usage=USAGE),
    ]


BEST = {"token_id": 8, "token": b"\xc3", "logprob": -0.25, "rank": 1}
FOUND = {"token_id": 7, "token": b"A", "logprob": -1.5, "rank": 2}


def test_log_probabilities(call, server):
    message = inference_pb2.TokenLogprob(**FOUND, top=[inference_pb2.TokenLogprob(**BEST)])
    server.generation = inference_pb2.GenerateResponse(
        logprobs=[message], prompt_logprobs=[message, message], usage=script.USAGE
    )
    best = TokenLogprob(**BEST, text="\N{REPLACEMENT CHARACTER}")
    found = TokenLogprob(**FOUND, text="A", top=(best,))
    answer = call("generate", "Hello")
    assert (answer.logprobs, answer.prompt_logprobs) == ((found,), (found, found))
    server.chunks = [
        inference_pb2.GenerateStreamResponse(logprobs=[message], prompt_logprobs=[message, message])
    ]
    [chunk] = call("stream", "Hello")
    assert (chunk.logprobs, chunk.prompt_logprobs) == ((found,), (found, found))


def test_several_answers(call, server):
    server.generation = inference_pb2.GenerateResponse(
        text="a",
        usage=script.USAGE,
        choices=[
            inference_pb2.Choice(index=0, text="a", token_ids=[7]),
            inference_pb2.Choice(
                index=1,
                text="b",
                token_ids=[9],
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                stop_token_id=9,
                logprobs=[inference_pb2.TokenLogprob(**FOUND)],
            ),
        ],
    )
    assert call("generate", "Hello", n=2).choices == (
        Choice(index=0, text="a", token_ids=(7,), finish_reason=FinishReason.UNSPECIFIED),
        Choice(
            index=1,
            text="b",
            token_ids=(9,),
            finish_reason=FinishReason.STOP,
            stop_token_id=9,
            logprobs=(TokenLogprob(**FOUND, text="A"),),
        ),
    )
    server.chunks = [inference_pb2.GenerateStreamResponse(index=index) for index in (1, 0)]
    assert [chunk.index for chunk in call("stream", "Hello")] == [1, 0]


@pytest.mark.parametrize("bias", ["7", 7, [1, 2], {"7": 1}, {-1: 1.0}, {7: "x"}])
def test_a_bias_that_is_no_mapping_of_token_ids_to_numbers_is_refused(call, server, bias):
    with pytest.raises(InvalidArgumentError, match="logit_bias must map integers") as refused:
        call("generate", "Hello", logit_bias=bias)
    assert refused.value.metadata["field"] == "logit_bias"
    assert server.requests == []


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_defaults_leave_the_request_empty(call, server, method):
    call(method, "Hello")
    assert server.requests == [inference_pb2.GenerateRequest(text="Hello")]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_all_fields_reach_the_server(call, server, method):
    call(
        method,
        (1, 2, 3),
        adapter="pirate",
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        seed=0,
        stop=["\n", "END"],
        priority=-10,
        cache_salt="pepper",
        routing_key="user-7",
        logit_bias={7: -1.5, 9: 2},
        ignore_eos=True,
        skip_special_tokens=False,
        logprobs=0,
        timeout=60,
    )
    assert server.requests == [
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
            adapters=[inference_pb2.AdapterRef(name="pirate", weight=1)],
            max_tokens=5,
            temperature=0.5,
            top_p=0.25,
            top_k=40,
            seed=0,
            stop=["\n", "END"],
            priority=-10,
            cache_salt="pepper",
            routing_key="user-7",
            logit_bias={7: -1.5, 9: 2},
            ignore_eos=True,
            skip_special_tokens=False,
            logprobs=0,
        )
    ]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_several_adapters_reach_the_server_in_order(call, server, method):
    call(method, "Hello", adapter=["pirate", AdapterRef(name="many", weight=0.5, task=0)])
    assert list(server.requests[0].adapters) == [
        inference_pb2.AdapterRef(name="pirate", weight=1),
        inference_pb2.AdapterRef(name="many", weight=0.5, task=0),
    ]


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_empty_list_of_tokens_is_not_a_missing_prompt(call, server, method):
    call(method, [])
    assert server.requests[0].WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("option", ["max_token", "text", "token_ids", "adapters"])
def test_an_unknown_option_is_refused(call, server, method, option):
    with pytest.raises(TypeError, match=f"unknown option {option!r}; the options are adapter, max_tokens"):
        call(method, "Hello", **{option: None})
    assert server.requests == []


@pytest.mark.parametrize("method", ["generate", "stream"])
def test_none_leaves_every_option_unset(call, server, method):
    call(method, "Hello", **dict.fromkeys(GenerationOptions.__annotations__))
    assert server.requests == [inference_pb2.GenerateRequest(text="Hello")]


def test_the_options_are_the_fields_of_the_protocol():
    fields = {field.name for field in inference_pb2.GenerateRequest.DESCRIPTOR.fields}
    assert set(GenerationOptions.__annotations__) - {"adapter"} == fields - {
        "text",
        "token_ids",
        "chat",
        "adapters",
    }
    assert list(AdapterRef.__dataclass_fields__) == [
        field.name for field in inference_pb2.AdapterRef.DESCRIPTOR.fields
    ]
    described = set(re.findall(r"^        (\w+): ", GenerationOptions.__doc__, re.MULTILINE))
    assert described == set(GenerationOptions.__annotations__)


@pytest.mark.parametrize("prompt", ["Answer briefly.", [1, 2, 3]])
def test_pin(call, server, prompt):
    pinned = call("pin_prompt", "rules", prompt, adapter=["pirate"], cache_salt="pepper", timeout=60)
    assert pinned == PinnedPrompt(name="rules", revision="r1", prompt_tokens=40)
    expected = prompts_pb2.PinPromptRequest(
        name="rules",
        adapters=[inference_pb2.AdapterRef(name="pirate", weight=1)],
        cache_salt="pepper",
    )
    if isinstance(prompt, str):
        expected.text = prompt
    else:
        expected.token_ids.CopyFrom(inference_pb2.TokenIds(ids=prompt))
    assert server.requests == [expected]


def test_unpin(call, server):
    assert call("unpin_prompt", "rules") is None
    assert server.requests == [prompts_pb2.UnpinPromptRequest(name="rules")]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_list_pinned_prompts(call, server, count):
    server.prompts = [prompts_pb2.PinnedPrompt(name=f"p{index}", prompt_tokens=7) for index in range(count)]
    assert call("list_pinned_prompts") == [
        PinnedPrompt(name=f"p{index}", revision="", prompt_tokens=7) for index in range(count)
    ]


@pytest.mark.parametrize("already", [0, 7])
def test_upload_adapter_sends_what_the_server_has_not(call, server, tmp_path, already):
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors and more")
    server.uploaded = b"tensors and more"[:already]
    told = []
    adapter = call("upload_adapter", "pirate", tmp_path, progress=lambda *each: told.append(each))
    assert adapter == PIRATE
    assert server.uploaded == b"tensors and more"
    assert told == [(already, 16), (16, 16)]
    [start] = server.requests
    assert (start.name, start.config, start.size) == ("pirate", b"{}", 16)
    assert start.digest == digest_of_folder(tmp_path)


def test_an_upload_is_sent_in_chunks_of_a_mebibyte(call, server, tmp_path):
    tensors = bytes(range(256)) * 4096 * 2 + b"and the rest"
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    reports = []
    call("upload_adapter", "pirate", tmp_path, progress=lambda *each: reports.append(each))
    assert server.uploaded == tensors
    assert server.chunk_sizes == [1 << 20, 1 << 20, 12]
    assert reports == [(done, len(tensors)) for done in (0, 1 << 20, 2 << 20, len(tensors))]


def test_a_file_that_changes_while_it_is_sent_is_named(call, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    tensors = tmp_path / "adapter_model.safetensors"
    tensors.write_bytes(bytes(3 << 20))
    with pytest.raises(OSError, match="changed while it was sent") as error:
        call("upload_adapter", "pirate", tmp_path, progress=lambda *_: os.truncate(tensors, 2 << 20))
    assert error.value.filename == str(tensors)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_upload_without_one_of_its_files_makes_no_call(call, server, tmp_path, missing):
    for name in {"adapter_config.json", "adapter_model.safetensors"} - {missing}:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(FileNotFoundError, match=missing):
        call("upload_adapter", "pirate", tmp_path)
    assert server.requests == []


@pytest.mark.parametrize(
    ("arguments", "revision"),
    [(("pirate",), ""), (("pirate", None), ""), (("pirate", "01234567"), "01234567")],
)
def test_rollback(call, server, arguments, revision):
    assert call("rollback_adapter", *arguments) == PIRATE
    assert server.requests == [adapters_pb2.RollbackAdapterRequest(name="pirate", revision=revision)]


def test_set_traffic_split(call, server):
    assert call("set_traffic_split", "pirate", "01234567", 10) == PIRATE
    expected = adapters_pb2.SetTrafficSplitRequest(name="pirate", revision="01234567", percent=10)
    assert server.requests == [expected]


def test_list_downloads(call, server):
    server.downloads = [
        adapters_pb2.Download(name="a", done_bytes=1),
        adapters_pb2.Download(name="b", done_bytes=2, total_bytes=0),
    ]
    assert call("list_downloads") == [
        Download(name="a", done_bytes=1, total_bytes=None),
        Download(name="b", done_bytes=2, total_bytes=0),
    ]


def test_watch_adapters(call):
    watched = call("watch_adapters")
    assert watched[0] == PIRATE
    assert [adapter.state for adapter in watched] == [AdapterState.RESIDENT, AdapterState.FAILED]


@pytest.mark.parametrize("method", ["get_adapter", "unload_adapter"])
def test_get_and_unload(call, server, method):
    assert call(method, "pirate") == PIRATE
    assert [request.name for request in server.requests] == ["pirate"]


def test_load(call, server):
    assert call("load_adapter", "pirate", "/srv/pirate") == PIRATE
    assert server.requests == [adapters_pb2.LoadAdapterRequest(name="pirate", path="/srv/pirate")]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_list_reads_all_pages(call, server, count):
    server.adapters = [adapters_pb2.Adapter(name=f"a{index}") for index in range(count)]
    assert [adapter.name for adapter in call("list_adapters")] == [f"a{index}" for index in range(count)]
    assert len(server.requests) == max(1, (count + 1) // 2)


def test_a_failed_adapter_has_no_method(call, server):
    server.adapters = [script.BROKEN]
    [adapter] = call("list_adapters")
    assert (adapter.state, adapter.method, adapter.error) == (
        AdapterState.FAILED,
        AdapterMethod.UNSPECIFIED,
        "adapter_config.json is not JSON",
    )


@pytest.mark.parametrize(("field", "enum"), [("state", AdapterState), ("method", AdapterMethod)])
def test_every_value_of_the_protocol_has_its_member(call, server, field, enum):
    values = adapters_pb2.Adapter.DESCRIPTOR.fields_by_name[field].enum_type.values
    unknown = len(values)
    numbers = [*range(unknown), unknown]
    server.adapters = [adapters_pb2.Adapter(name="a", **{field: number}) for number in numbers]
    members = [getattr(adapter, field) for adapter in call("list_adapters")]
    assert [member.name for member in members] == [
        *(value.name.removeprefix(f"ADAPTER_{field.upper()}_") for value in values),
        "UNSPECIFIED",
    ]
    assert set(members) == set(enum)


def test_every_finish_reason_of_the_protocol_has_its_member():
    values = inference_pb2.FinishReason.keys()
    assert [value.removeprefix("FINISH_REASON_") for value in values] == [
        member.name for member in FinishReason
    ]


def test_a_finish_reason_of_a_newer_server_is_unspecified(call, server):
    unknown = max(inference_pb2.FinishReason.values()) + 1
    server.generation = inference_pb2.GenerateResponse(finish_reason=unknown)
    server.chunks = (
        inference_pb2.GenerateStreamResponse(),
        inference_pb2.GenerateStreamResponse(finish_reason=unknown),
    )
    assert call("generate", "Hello").finish_reason == FinishReason.UNSPECIFIED
    assert [chunk.finish_reason for chunk in call("stream", "Hello")] == [None, FinishReason.UNSPECIFIED]


@pytest.mark.parametrize(
    ("result", "message"), [(Adapter, adapters_pb2.Adapter), (PinnedPrompt, prompts_pb2.PinnedPrompt)]
)
def test_results_mirror_their_messages(result, message):
    assert list(result.__dataclass_fields__) == [field.name for field in message.DESCRIPTOR.fields]


def test_a_long_answer_arrives(call, server):
    server.adapters = [adapters_pb2.Adapter(name="a", error="x" * (5 << 20))]
    [adapter] = call("list_adapters")
    assert len(adapter.error) == 5 << 20


def test_both_clients_take_the_same_arguments():
    def parameters(client: type, method: str) -> list[inspect.Parameter]:
        return list(inspect.signature(getattr(client, method)).parameters.values())

    methods = [name for name in vars(Client) if not name.startswith("_")]
    assert methods == [name for name in vars(AsyncClient) if not name.startswith("_")]
    for method in methods:
        assert parameters(Client, method) == parameters(AsyncClient, method)


BATCH_OPTIONS = {
    "adapter": "pirate",
    "truncate": True,
    "priority": 2,
    "cache_salt": "salt",
    "routing_key": "user",
    "add_special_tokens": False,
}


def test_inputs_and_options_of_a_batch_are_sent(call, server):
    inputs = ["one", ("one", "two"), [3, 4], (5,)]
    call("embed", inputs, pooling="mean", normalize=False, dimensions=8, **BATCH_OPTIONS)
    call("classify", inputs, **BATCH_OPTIONS)
    embed, classify = server.requests
    batch = pooling_pb2.TextBatch(
        inputs=[
            pooling_pb2.Input(text="one"),
            pooling_pb2.Input(pair=pooling_pb2.TextPair(first="one", second="two")),
            pooling_pb2.Input(token_ids=inference_pb2.TokenIds(ids=[3, 4])),
            pooling_pb2.Input(token_ids=inference_pb2.TokenIds(ids=[5])),
        ],
        adapters=[inference_pb2.AdapterRef(name="pirate", weight=1)],
        **{name: value for name, value in BATCH_OPTIONS.items() if name != "adapter"},
    )
    assert embed == pooling_pb2.EmbedRequest(
        batch=batch, pooling=pooling_pb2.POOLING_MEAN, normalize=False, dimensions=8
    )
    assert classify == pooling_pb2.ClassifyRequest(batch=batch)


def test_what_is_not_given_of_a_batch_is_not_set(call, server):
    call("embed", ["one"])
    [sent] = server.requests
    assert sent == pooling_pb2.EmbedRequest(
        batch=pooling_pb2.TextBatch(inputs=[pooling_pb2.Input(text="one")])
    )


def test_numbers_of_texts_are_read(call):
    usage = Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
    assert call("embed", ["one"]) == Embeddings(((0.5, -1.0), (0.0, 2.0)), usage, "r1")
    classes = call("classify", ["one"])
    assert classes == Classifications(
        (Classification("good", {"bad": 0.25, "good": 0.75}, {"bad": -1.0, "good": 1.5}),),
        Problem.SINGLE_LABEL,
        usage,
        "r1",
    )
    assert classes.results[0].score == 0.75
    token = TaggedToken(7, "B-PER", 0.5, 4, 7)
    span = Span("PER", 0.5, 4, 7, "Ada", in_second=True)
    assert call("tag", ["one"]) == Tags((TaggedText((token,), (span,)),), usage, "r1")
    assert call("score", [("one", "two")]) == Scores((0.25, 0.75), (-1.0, 1.0), usage, "r1")


def test_weights_in_a_mapping_are_refused(call):
    with pytest.raises(InvalidArgumentError, match="a list of these; give weights as AdapterRef"):
        call("embed", ["one"], adapter={"pirate": 0.5})
