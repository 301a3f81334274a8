"""PromptService over gRPC."""

from __future__ import annotations

from typing import Any

import grpc

from turret.v1 import prompts_pb2, prompts_pb2_grpc
from turret_server.doors.caller import caller
from turret_server.rpc.inference import adapters_of, deadline_of, prompt_of, scalars_of
from turret_server.serving.prompts import PromptService
from turret_server.serving.request import PinnedPrompt, PinRequest


class PromptServicer(prompts_pb2_grpc.PromptServiceServicer):
    def __init__(self, service: PromptService) -> None:
        self._service = service

    async def PinPrompt(
        self, request: prompts_pb2.PinPromptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prompts_pb2.PinPromptResponse:
        pinned = await self._service.pin(
            PinRequest(
                name=request.name,
                prompt=prompt_of(request),
                adapters=adapters_of(request.adapters),
                **scalars_of(request, ["cache_salt", "add_special_tokens"]),
                deadline=deadline_of(context),
            ),
            caller(),
        )
        return prompts_pb2.PinPromptResponse(prompt=_message_of(pinned))

    async def UnpinPrompt(
        self, request: prompts_pb2.UnpinPromptRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prompts_pb2.UnpinPromptResponse:
        self._service.unpin(request.name, caller())
        return prompts_pb2.UnpinPromptResponse()

    async def ListPinnedPrompts(
        self, request: prompts_pb2.ListPinnedPromptsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> prompts_pb2.ListPinnedPromptsResponse:
        return prompts_pb2.ListPinnedPromptsResponse(prompts=map(_message_of, self._service.list(caller())))


def _message_of(pinned: PinnedPrompt) -> prompts_pb2.PinnedPrompt:
    return prompts_pb2.PinnedPrompt(
        name=pinned.name, revision=pinned.revision, prompt_tokens=pinned.prompt_tokens
    )
