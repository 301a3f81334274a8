"""ModelService over gRPC."""

from __future__ import annotations

from typing import Any

import grpc

from turret.v1 import model_pb2, model_pb2_grpc
from turret_server.doors.caller import caller
from turret_server.rpc.adapters import METHODS
from turret_server.rpc.inference import adapters_of, prompt_of, scalars_of
from turret_server.serving.model import ModelService
from turret_server.serving.request import GenerationRequest
from turret_server.serving.tokens import TokenService


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, service: ModelService, tokens: TokenService) -> None:
        self._service = service
        self._tokens = tokens

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.GetModelResponse:
        model, limits = self._service.model, self._service.limits(caller())
        return model_pb2.GetModelResponse(
            model=model_pb2.Model(
                name=model.name,
                max_context=model.max_context,
                vocab_size=model.vocab_size,
                has_chat_template=model.has_chat_template,
                calls_tools=model.calls_tools,
                adapter_methods=[METHODS[method] for method in model.adapter_methods],
                limits=model_pb2.Limits(
                    max_adapters=limits.max_adapters,
                    max_messages=limits.max_messages,
                    max_tools=limits.max_tools,
                    max_queued_requests=limits.max_queued_requests,
                    max_queued_tokens=limits.max_queued_tokens,
                    max_pinned_tokens=limits.max_pinned_tokens,
                ),
            )
        )

    async def Tokenize(
        self, request: model_pb2.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.TokenizeResponse:
        generation = GenerationRequest(
            prompt=prompt_of(request),
            adapters=adapters_of(request.adapters),
            **scalars_of(request, ["add_special_tokens"]),
        )
        tokens = await self._tokens.tokens(generation, caller())
        return model_pb2.TokenizeResponse(token_ids=tokens.token_ids, text=tokens.text)

    async def Detokenize(
        self, request: model_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> model_pb2.DetokenizeResponse:
        generation = GenerationRequest(prompt=list(request.token_ids), adapters=adapters_of(request.adapters))
        tokens = await self._tokens.tokens(generation, caller())
        return model_pb2.DetokenizeResponse(text=tokens.text)
