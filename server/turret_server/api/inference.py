"""InferenceService: from a call to the engine and back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from turret.v1 import inference_pb2, inference_pb2_grpc
from turret_adapters.registry import AdapterRegistry
from turret_server.api.metrics import RequestMetrics
from turret_server.api.text import TextCodec, TextStream
from turret_server.api.validation import check_adapters, check_stop, check_token_ids, sampling_params
from turret_server.engine.loop import Engine
from turret_server.engine.request import AdapterUse, FinishReason, Output, Request
from turret_server.errors import InvalidRequestError

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


def _when_over(context: Any, call: Callable[[], None]) -> None:
    """Call back when the call has ended in whatever way: answered, failed, cancelled, disconnected."""

    def over(_: object) -> None:
        call()

    context.add_done_callback(over)


def _hand_over(loop: asyncio.AbstractEventLoop, outputs: asyncio.Queue[Output], output: Output) -> None:
    """From the engine's thread to the call's; a loop that has closed has nobody waiting."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(outputs.put_nowait, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What of the base model a request is checked against."""

    vocab_size: int
    max_context: int
    stop_token_ids: frozenset[int]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(
        self,
        *,
        engine: Engine,
        registry: AdapterRegistry,
        codec: TextCodec,
        model: ModelInfo,
        metrics: RequestMetrics,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._codec = codec
        self._model = model
        self._metrics = metrics
        self._request_ids = itertools.count(1)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.GenerateResponse:
        response = inference_pb2.GenerateResponse()
        async with aclosing(self._generate(request, context)) as pieces:
            async for piece in pieces:
                response.text += piece.text
                response.token_ids.extend(piece.token_ids)
                last = piece
        response.finish_reason = last.finish_reason
        response.usage.CopyFrom(last.usage)
        response.revision = last.revision
        return response

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        async with aclosing(self._generate(request, context)) as pieces:
            async for piece in pieces:
                yield piece

    async def _generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        """Every answer ends here in one of three ways: finished, failed, or cancelled from outside."""
        with self._metrics.request() as record:
            stop = check_stop(request)
            token_ids = await self._token_ids(request)
            uses, revision = self._acquire(request, context)
            outputs: asyncio.Queue[Output] = asyncio.Queue()
            running = self._request(request, token_ids, uses, context, outputs)
            self._engine.submit(running)
            _when_over(context, partial(self._engine.cancel, running.request_id))
            record.submitted(len(token_ids))
            async for piece in self._pieces(running, revision, stop, outputs):
                record.tokens(len(piece.token_ids), piece.usage.cached_tokens)
                yield piece

    def _acquire(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> tuple[tuple[AdapterUse, ...], str]:
        """What the request runs on, kept until the call is over however it ends, and its revision."""
        lease = self._registry.acquire(check_adapters(request))
        _when_over(context, partial(self._registry.release, lease))
        return tuple(AdapterUse(spec, weight) for spec, weight in lease.uses), lease.revision

    async def _token_ids(self, request: inference_pb2.GenerateRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                # A long text takes a while, and other streams go on meanwhile.
                token_ids = await asyncio.to_thread(self._codec.encode, request.text)
            case "token_ids":
                token_ids = list(request.token_ids.ids)
            case _:
                raise InvalidRequestError("the request has no prompt; set text or token_ids", field="prompt")
        return check_token_ids(token_ids, self._model.vocab_size)

    def _request(
        self,
        request: inference_pb2.GenerateRequest,
        token_ids: list[int],
        uses: tuple[AdapterUse, ...],
        context: grpc.aio.ServicerContext[Any, Any],
        outputs: asyncio.Queue[Output],
    ) -> Request:
        num_virtual = sum(use.spec.num_virtual_tokens for use in uses)
        remaining = context.time_remaining()
        return Request(
            request_id=next(self._request_ids),
            prompt_token_ids=tuple(token_ids),
            adapters=uses,
            sampling=sampling_params(
                request,
                num_context=len(token_ids) + num_virtual,
                max_context=self._model.max_context,
            ),
            stop_token_ids=self._model.stop_token_ids,
            deadline=None if remaining is None else time.monotonic() + remaining,
            sink=partial(_hand_over, asyncio.get_running_loop(), outputs),
        )

    async def _pieces(
        self, running: Request, revision: str, stop: list[str], outputs: asyncio.Queue[Output]
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        text = TextStream(self._codec, stop)
        num_generated = 0
        while True:
            output = await outputs.get()
            if output.error:
                raise output.error
            assert output.token_id is not None, "only an error or a cancellation ends without a token"
            num_generated += 1
            piece = inference_pb2.GenerateStreamResponse(
                text=text.push(output.token_id),
                token_ids=[output.token_id],
                revision=revision,
            )
            reason = output.finish_reason
            if reason:
                piece.text += text.finish()
            if text.stopped:
                reason = FinishReason.STOP
            if reason:
                piece.finish_reason = _FINISH_REASONS[reason]
                piece.usage.prompt_tokens = len(running.prompt_token_ids)
                piece.usage.cached_tokens = output.cached_tokens
                piece.usage.generated_tokens = num_generated
            yield piece
            if reason:
                return
