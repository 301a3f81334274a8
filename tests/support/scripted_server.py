# ruff: noqa: N802 -- the names of the protocol's methods
"""A Turret server without a model that returns scripted responses over a real port."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from turret.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    pooling_pb2,
    pooling_pb2_grpc,
    prompts_pb2,
    prompts_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

USAGE = inference_pb2.Usage(prompt_tokens=3, cached_tokens=2, generated_tokens=4)
CHUNKS = (
    inference_pb2.GenerateStreamResponse(text="Ahoy, ", token_ids=[7, 8], revision="r1"),
    inference_pb2.GenerateStreamResponse(
        text="m\N{LATIN SMALL LETTER A WITH ACUTE}tey", token_ids=[9], revision="r1"
    ),
    inference_pb2.GenerateStreamResponse(
        token_ids=[2], revision="r1", finish_reason=inference_pb2.FINISH_REASON_STOP, usage=USAGE
    ),
)
GENERATION = inference_pb2.GenerateResponse(
    text="".join(chunk.text for chunk in CHUNKS),
    token_ids=[token for chunk in CHUNKS for token in chunk.token_ids],
    finish_reason=inference_pb2.FINISH_REASON_STOP,
    usage=USAGE,
    revision="r1",
)
PIRATE = adapters_pb2.Adapter(
    name="pirate",
    revision="0123456789abcdef0123456789abcdef",
    state=adapters_pb2.ADAPTER_STATE_RESIDENT,
    method=adapters_pb2.ADAPTER_METHOD_LORA,
    num_parameters=4_500_000,
    max_rank=16,
    file_bytes=18_000_000,
    arena_bytes=9 * 1024 * 1024,
    active_requests=2,
    draining_revisions=["fedcba", "abcdef"],
    history=[
        adapters_pb2.AdapterRevision(
            revision="0123",
            source="/srv/pirate",
            published_at=timestamp_pb2.Timestamp(seconds=1, nanos=500000000),
        )
    ],
    traffic_split=adapters_pb2.TrafficSplit(revision="4567", percent=10),
)
BROKEN = adapters_pb2.Adapter(
    name="broken", state=adapters_pb2.ADAPTER_STATE_FAILED, error="adapter_config.json is not JSON"
)

MODEL = model_pb2.Model(
    name="tiny",
    max_context=64,
    vocab_size=320,
    has_chat_template=True,
    calls_tools=True,
    adapter_methods=[adapters_pb2.ADAPTER_METHOD_LORA, adapters_pb2.ADAPTER_METHOD_VERA],
    limits=model_pb2.Limits(
        max_adapters=8, max_messages=9, max_tools=10, max_queued_requests=11, max_queued_tokens=12
    ),
)
EMBEDDINGS = pooling_pb2.EmbedResponse(
    embeddings=[pooling_pb2.Embedding(values=[0.5, -1.0]), pooling_pb2.Embedding(values=[0.0, 2.0])],
    revision="r1",
    usage=USAGE,
)
CLASSES = pooling_pb2.ClassifyResponse(
    classifications=[pooling_pb2.Classification(scores=[0.25, 0.75], logits=[-1.0, 1.5])],
    labels=["bad", "good"],
    problem=pooling_pb2.PROBLEM_SINGLE_LABEL,
    revision="r1",
    usage=USAGE,
)
TAGS = pooling_pb2.TagResponse(
    texts=[
        pooling_pb2.TaggedText(
            tokens=[pooling_pb2.TaggedToken(token_id=7, label="B-PER", score=0.5, start=4, end=7)],
            spans=[pooling_pb2.Span(label="PER", score=0.5, start=4, end=7, text="Ada", in_second=True)],
        )
    ],
    revision="r1",
    usage=USAGE,
)
RULES = prompts_pb2.PinnedPrompt(name="rules", revision="r1", prompt_tokens=40)


def failure(
    code: grpc.StatusCode,
    message: str,
    *,
    domain: str = "turret",
    reason: str = "",
    metadata: Mapping[str, str] | None = None,
    retry_after: float | None = None,
    request_id: str = "",
) -> grpc.Status:
    messages = [error_details_pb2.ErrorInfo(domain=domain, reason=reason, metadata=metadata)]
    if retry_after is not None:
        delay = duration_pb2.Duration(nanos=int(retry_after * 1e9))
        messages.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        messages.append(error_details_pb2.RequestInfo(request_id=request_id))
    details = [any_pb2.Any() for _ in messages]
    for detail, message_ in zip(details, messages, strict=True):
        detail.Pack(message_)
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=details))


class ScriptedServer(
    inference_pb2_grpc.InferenceServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    prompts_pb2_grpc.PromptServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    pooling_pb2_grpc.PoolingServiceServicer,
):
    """Returns the constants above.

    Attributes:
        failure: Status that every call ends with instead; streams after their first response.
        endless: Streams repeat their first chunk for ever.
        hold: Calls do not end by themselves; streams send their first response.
        generation: The response of Generate.
        chunks: The responses of GenerateStream.
        adapters: Adapters of ListAdapters, two per page.
        prompts: Prompts of ListPinnedPrompts.
        downloads: Downloads of ListDownloads.
        uploaded: Tensor bytes received by uploads; an upload continues after them.
        requests: Requests in the order of arrival; of an upload its start.
        chunk_sizes: Sizes of the chunks of uploads.
        tenants: Tenant of each call; None if the call has none.
        authorizations: Authorization of each call; None if the call has none.
        began: Set when a call has arrived.
        ended: Set when a call is over, whichever side ended it.
    """

    def __init__(self) -> None:
        self.failure: grpc.Status | None = None
        self.endless = False
        self.hold = False
        self.generation = GENERATION
        self.chunks: Sequence[inference_pb2.GenerateStreamResponse] = CHUNKS
        self.adapters: Sequence[adapters_pb2.Adapter] = (PIRATE,)
        self.prompts: Sequence[prompts_pb2.PinnedPrompt] = (RULES,)
        self.downloads: Sequence[adapters_pb2.Download] = ()
        self.uploaded = b""
        self.chunk_sizes: list[int] = []
        self.requests: list[Any] = []
        self.tenants: list[str | None] = []
        self.authorizations: list[str | None] = []
        self.began = threading.Event()
        self.ended = threading.Event()
        # Servers of other tests must not share the port.
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._server)
        prompts_pb2_grpc.add_PromptServiceServicer_to_server(self, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        pooling_pb2_grpc.add_PoolingServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Generate(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return self.generation

    def GenerateStream(self, request, context) -> Iterator[inference_pb2.GenerateStreamResponse]:
        self._begin(request, context)
        yield self.chunks[0]
        while self.endless:
            yield self.chunks[0]
        self._hold_or_fail(context)
        yield from self.chunks[1:]

    def GetModel(self, request, context):
        self._begin(request, context)
        return model_pb2.GetModelResponse(model=MODEL)

    def Tokenize(self, request, context):
        self._begin(request, context)
        return model_pb2.TokenizeResponse(token_ids=[5, 6], text="<s>ab")

    def Detokenize(self, request, context):
        self._begin(request, context)
        return model_pb2.DetokenizeResponse(text="<s>ab")

    def Embed(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return EMBEDDINGS

    def Classify(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return CLASSES

    def Tag(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return TAGS

    def Score(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return pooling_pb2.ScoreResponse(scores=[0.25, 0.75], logits=[-1.0, 1.0], revision="r1", usage=USAGE)

    def LoadAdapter(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return adapters_pb2.LoadAdapterResponse(adapter=PIRATE)

    def UploadAdapter(self, request_iterator, context) -> Iterator[adapters_pb2.UploadAdapterResponse]:
        start = next(request_iterator).start
        self._begin(start, context)
        self._hold_or_fail(context)
        received = self.uploaded
        yield adapters_pb2.UploadAdapterResponse(offset=len(received))
        while len(received) < start.size:
            chunk = next(request_iterator).chunk
            assert chunk.offset == len(received)
            received += chunk.data
            self.chunk_sizes.append(len(chunk.data))
        self.uploaded = received
        yield adapters_pb2.UploadAdapterResponse(adapter=PIRATE)

    def UnloadAdapter(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return adapters_pb2.UnloadAdapterResponse(adapter=PIRATE)

    def RollbackAdapter(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return adapters_pb2.RollbackAdapterResponse(adapter=PIRATE)

    def SetTrafficSplit(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return adapters_pb2.SetTrafficSplitResponse(adapter=PIRATE)

    def WatchAdapters(self, request, context) -> Iterator[adapters_pb2.WatchAdaptersResponse]:
        self._begin(request, context)
        yield adapters_pb2.WatchAdaptersResponse(adapter=PIRATE)
        self._hold_or_fail(context)
        yield adapters_pb2.WatchAdaptersResponse(adapter=BROKEN)

    def GetAdapter(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return adapters_pb2.GetAdapterResponse(adapter=PIRATE)

    def ListAdapters(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        start = int(request.page_token or 0)
        end = start + 2
        return adapters_pb2.ListAdaptersResponse(
            adapters=self.adapters[start:end],
            next_page_token=str(end) if end < len(self.adapters) else "",
        )

    def ListDownloads(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return adapters_pb2.ListDownloadsResponse(downloads=self.downloads)

    def PinPrompt(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return prompts_pb2.PinPromptResponse(prompt=RULES)

    def UnpinPrompt(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return prompts_pb2.UnpinPromptResponse()

    def ListPinnedPrompts(self, request, context):
        self._begin(request, context)
        self._hold_or_fail(context)
        return prompts_pb2.ListPinnedPromptsResponse(prompts=self.prompts)

    def _begin(self, request, context) -> None:
        self.requests.append(request)
        metadata = dict(context.invocation_metadata())
        self.tenants.append(metadata.get("turret-tenant"))
        self.authorizations.append(metadata.get("authorization"))
        context.add_callback(self.ended.set)
        self.began.set()

    def _hold_or_fail(self, context) -> None:
        if self.failure is not None:
            context.abort_with_status(self.failure)
        if self.hold:
            self.ended.wait()
