"""InferenceService: from a call to the engine and back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from turret.v1 import inference_pb2, inference_pb2_grpc
from turret_server.engine.loop import Engine
from turret_server.engine.request import FinishReason, Request
from turret_server.observability.request_log import RequestRecord, RequestRecords
from turret_server.serving.requests import Prepared, RequestFactory, when_over
from turret_server.serving.text import TextCodec, TextStream
from turret_server.serving.validation import check_stop

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(
        self, *, engine: Engine, requests: RequestFactory, codec: TextCodec, records: RequestRecords
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._codec = codec
        self._records = records

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
        async with self._records.follow(context) as record:
            stop = check_stop(request)
            prepared = await self._requests.prepare(request, context)
            running = prepared.request
            assert isinstance(running, Request)
            self._engine.submit(running)
            record.begin(prepared)
            prepared.charge.begun = True
            when_over(context, partial(self._engine.cancel, running.request_id))
            async for piece in self._pieces(prepared, stop, record):
                yield piece

    async def _pieces(
        self, prepared: Prepared, stop: list[str], record: RequestRecord
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        text = TextStream(self._codec, stop)
        while True:
            output = await prepared.outputs.get()
            if output.error:
                raise output.error
            assert output.token_id is not None, "only an error or a cancellation ends without a token"
            record.token(output.cached_tokens)
            piece = inference_pb2.GenerateStreamResponse(
                text=text.push(output.token_id),
                token_ids=[output.token_id],
                revision=prepared.lease.revision,
            )
            reason = output.finish_reason
            if reason:
                piece.text += text.finish()
            if text.stopped:
                reason = FinishReason.STOP
            if reason:
                piece.finish_reason = _FINISH_REASONS[reason]
                piece.usage.prompt_tokens = record.prompt_tokens
                piece.usage.cached_tokens = record.cached_tokens
                piece.usage.generated_tokens = record.generated_tokens
                await self._records.finish(record, reason.value)
            yield piece
            if reason:
                return
