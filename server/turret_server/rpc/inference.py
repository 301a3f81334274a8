"""InferenceService over gRPC."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, MutableMapping
from contextlib import aclosing
from dataclasses import fields
from typing import Any

import grpc
from google.protobuf.message import Message

from turret.v1 import inference_pb2, inference_pb2_grpc
from turret_server.doors.caller import caller
from turret_server.rpc.chat import add_deltas, chat_of, delta_messages
from turret_server.serving.chat import Chat
from turret_server.serving.generation import GenerationService
from turret_server.serving.request import (
    AdapterRef,
    Chunk,
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    Usage,
)
from turret_server.serving.request_fields import RequestFields

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: inference_pb2.FINISH_REASON_TOOL_CALLS,
}


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, service: GenerationService) -> None:
        self._service = service

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.GenerateResponse:
        choices: dict[int, inference_pb2.Choice] = {}
        response = inference_pb2.GenerateResponse()
        async with aclosing(self._service.generate(_request_of(request, context), caller())) as chunks:
            async for chunk in chunks:
                choice = choices.setdefault(chunk.index, inference_pb2.Choice(index=chunk.index))
                _add(chunk, choice)
                response.prompt_logprobs.extend(map(_logprob, chunk.prompt_logprobs))
                last = chunk
        assert last.usage
        response.usage.CopyFrom(usage_message(last.usage))
        response.revision = last.revision
        first = choices[0]
        response.MergeFrom(
            inference_pb2.GenerateResponse(
                text=first.text,
                token_ids=first.token_ids,
                finish_reason=first.finish_reason,
                stop_string=first.stop_string,
                stop_token_id=first.stop_token_id if first.HasField("stop_token_id") else None,
                logprobs=first.logprobs,
                reasoning=first.reasoning,
                tool_calls=first.tool_calls,
                choices=[choice for _, choice in sorted(choices.items())] if len(choices) > 1 else (),
            )
        )
        return response

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse]:
        async with aclosing(self._service.generate(_request_of(request, context), caller())) as chunks:
            async for chunk in chunks:
                yield _message_of(chunk)


def deadline_of(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """The deadline of a call, as a time of `time.monotonic`."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def prompt_of(message: Any) -> str | list[int] | Chat | None:
    """The prompt of a message with the oneof `prompt`.

    Raises:
        InvalidRequestError: a chat has invalid JSON.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return str(message.text)
        case "token_ids":
            return list(message.token_ids.ids)
        case "chat":
            return chat_of(message.chat)
        case _:
            return None


def adapters_of(refs: Iterable[inference_pb2.AdapterRef]) -> tuple[AdapterRef, ...]:
    return tuple(
        AdapterRef(
            name=ref.name,
            weight=ref.weight if ref.HasField("weight") else 1.0,
            task=ref.task if ref.HasField("task") else None,
        )
        for ref in refs
    )


def scalars_of(message: Message, names: Iterable[str]) -> dict[str, Any]:
    """The fields of a message that are set. One that is not keeps its default; all others have the same name
    on both sides.
    """
    return {name: _value(message, name) for name in names if _is_set(message, name)}


def _request_of(
    message: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
) -> GenerationRequest:
    return GenerationRequest(
        **scalars_of(message, [field.name for field in fields(RequestFields)]),
        prompt=prompt_of(message),
        adapters=adapters_of(message.adapters),
        deadline=deadline_of(context),
    )


def _is_set(message: Message, name: str) -> bool:
    return not message.DESCRIPTOR.fields_by_name[name].has_presence or message.HasField(name)


def _value(message: Message, name: str) -> Any:
    value = getattr(message, name)
    if isinstance(value, MutableMapping):
        return dict(value)
    return tuple(value) if message.DESCRIPTOR.fields_by_name[name].is_repeated else value


def _add(chunk: Chunk, choice: inference_pb2.Choice) -> None:
    """Add what is new to an answer."""
    choice.text += chunk.text
    choice.reasoning += chunk.reasoning
    add_deltas(chunk.tool_calls, choice.tool_calls)
    choice.token_ids.extend(chunk.token_ids)
    choice.logprobs.extend(map(_logprob, chunk.logprobs))
    if chunk.finish_reason:
        end = inference_pb2.Choice(finish_reason=_FINISH_REASONS[chunk.finish_reason], **_stop(chunk))
        choice.MergeFrom(end)


def _message_of(chunk: Chunk) -> inference_pb2.GenerateStreamResponse:
    return inference_pb2.GenerateStreamResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        revision=chunk.revision,
        reasoning=chunk.reasoning,
        tool_calls=delta_messages(chunk.tool_calls),
        index=chunk.index,
        logprobs=map(_logprob, chunk.logprobs),
        prompt_logprobs=map(_logprob, chunk.prompt_logprobs),
        finish_reason=_FINISH_REASONS[chunk.finish_reason]
        if chunk.finish_reason
        else inference_pb2.FINISH_REASON_UNSPECIFIED,
        usage=usage_message(chunk.usage) if chunk.usage else None,
        **_stop(chunk),
    )


def _stop(last: Chunk) -> dict[str, Any]:
    """The fields of both responses that say what ended the generation."""
    return {"stop_string": last.stop_string or "", "stop_token_id": last.stop_token_id}


def _logprob(found: TokenLogprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=found.token_id,
        token=found.token,
        logprob=found.logprob,
        rank=found.rank,
        top=map(_logprob, found.top),
    )


def usage_message(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        generated_tokens=usage.generated_tokens,
    )
