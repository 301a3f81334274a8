"""PoolingService over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from turret.v1 import pooling_pb2, pooling_pb2_grpc
from turret_adapters.spec import Problem
from turret_server.doors.caller import caller
from turret_server.errors import InvalidRequestError
from turret_server.rpc.inference import adapters_of, deadline_of, scalars_of, usage_message
from turret_server.serving.pooling import PoolingService
from turret_server.serving.request import (
    Classes,
    Embeddings,
    EmbedRequest,
    Input,
    Pooling,
    TaggedText,
    Tags,
    TextBatch,
    TextPair,
)

_SCALARS = ["truncate", "priority", "cache_salt", "routing_key", "add_special_tokens"]
_POOLING: dict[int, Pooling | None] = {
    pooling_pb2.POOLING_UNSPECIFIED: None,
    pooling_pb2.POOLING_CLS: Pooling.CLS,
    pooling_pb2.POOLING_MEAN: Pooling.MEAN,
    pooling_pb2.POOLING_WEIGHTED_MEAN: Pooling.WEIGHTED_MEAN,
    pooling_pb2.POOLING_LAST: Pooling.LAST,
}
_PROBLEMS = {
    Problem.SINGLE_LABEL: pooling_pb2.PROBLEM_SINGLE_LABEL,
    Problem.MULTI_LABEL: pooling_pb2.PROBLEM_MULTI_LABEL,
    Problem.REGRESSION: pooling_pb2.PROBLEM_REGRESSION,
}


class PoolingServicer(pooling_pb2_grpc.PoolingServiceServicer):
    """Answers that grow with the inputs are built in a thread, so that streams go on meanwhile."""

    def __init__(self, service: PoolingService) -> None:
        self._service = service

    async def Embed(
        self, request: pooling_pb2.EmbedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pooling_pb2.EmbedResponse:
        wanted = EmbedRequest(
            batch=_batch_of(request.batch, context),
            pooling=_pooling_of(request.pooling),
            **scalars_of(request, ["normalize", "dimensions"]),
        )
        found = await self._service.embed(wanted, caller())
        return await asyncio.to_thread(_embeddings_message, found)

    async def Classify(
        self, request: pooling_pb2.ClassifyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pooling_pb2.ClassifyResponse:
        found = await self._service.classify(_batch_of(request.batch, context), caller())
        return await asyncio.to_thread(_classes_message, found)

    async def Tag(
        self, request: pooling_pb2.TagRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pooling_pb2.TagResponse:
        found = await self._service.tag(_batch_of(request.batch, context), caller())
        return await asyncio.to_thread(_tags_message, found)

    async def Score(
        self, request: pooling_pb2.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pooling_pb2.ScoreResponse:
        found = await self._service.score(_batch_of(request.batch, context), caller())
        return pooling_pb2.ScoreResponse(
            scores=found.scores.tolist(),
            logits=found.logits.tolist(),
            revision=found.revision,
            usage=usage_message(found.usage),
        )


def _embeddings_message(found: Embeddings) -> pooling_pb2.EmbedResponse:
    return pooling_pb2.EmbedResponse(
        embeddings=[pooling_pb2.Embedding(values=vector.tolist()) for vector in found.vectors],
        revision=found.revision,
        usage=usage_message(found.usage),
    )


def _classes_message(found: Classes) -> pooling_pb2.ClassifyResponse:
    return pooling_pb2.ClassifyResponse(
        classifications=[
            pooling_pb2.Classification(scores=scores.tolist(), logits=logits.tolist())
            for scores, logits in zip(found.scores, found.logits, strict=True)
        ],
        labels=found.labels,
        problem=_PROBLEMS[found.problem],
        revision=found.revision,
        usage=usage_message(found.usage),
    )


def _tags_message(found: Tags) -> pooling_pb2.TagResponse:
    return pooling_pb2.TagResponse(
        texts=map(_tagged, found.texts), revision=found.revision, usage=usage_message(found.usage)
    )


def _pooling_of(value: int) -> Pooling | None:
    try:
        return _POOLING[value]
    except KeyError as error:
        known = ", ".join(sorted(pooling_pb2.Pooling.keys()))
        raise InvalidRequestError(f"pooling is one of {known}; found {value}", field="pooling") from error


def _batch_of(message: pooling_pb2.TextBatch, context: grpc.aio.ServicerContext[Any, Any]) -> TextBatch:
    return TextBatch(
        inputs=[_input_of(each) for each in message.inputs],
        adapters=adapters_of(message.adapters),
        **scalars_of(message, _SCALARS),
        deadline=deadline_of(context),
    )


def _input_of(message: pooling_pb2.Input) -> Input | None:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return list(message.token_ids.ids)
        case "pair":
            return TextPair(first=message.pair.first, second=message.pair.second)
        case _:
            return None


def _tagged(text: TaggedText) -> pooling_pb2.TaggedText:
    return pooling_pb2.TaggedText(
        tokens=[
            pooling_pb2.TaggedToken(
                token_id=token.token_id,
                label=token.label,
                score=token.score,
                start=token.start,
                end=token.end,
                in_second=bool(token.source),
            )
            for token in text.tokens
        ],
        spans=[
            pooling_pb2.Span(
                label=span.label,
                score=span.score,
                start=span.start,
                end=span.end,
                in_second=bool(span.source),
                text=span.text,
            )
            for span in text.spans
        ],
    )
