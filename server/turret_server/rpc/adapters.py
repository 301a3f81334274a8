"""The gRPC door to the administration of adapters: messages become plain data, and plain data messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_adapters.spec import Method
from turret_server.doors.caller import caller
from turret_server.errors import InvalidRequestError
from turret_server.lifecycle.adapter_info import AdapterInfo, AdapterRevision, AdapterState
from turret_server.lifecycle.administration import AdapterAdministration
from turret_server.lifecycle.uploads import UploadChunk, UploadStart

METHODS = {
    Method.LORA: adapters_pb2.ADAPTER_METHOD_LORA,
    Method.PREFIX_TUNING: adapters_pb2.ADAPTER_METHOD_PREFIX_TUNING,
    Method.PROMPT_TUNING: adapters_pb2.ADAPTER_METHOD_PROMPT_TUNING,
    Method.P_TUNING: adapters_pb2.ADAPTER_METHOD_P_TUNING,
    Method.MULTITASK_PROMPT_TUNING: adapters_pb2.ADAPTER_METHOD_MULTITASK_PROMPT_TUNING,
    Method.ADALORA: adapters_pb2.ADAPTER_METHOD_ADALORA,
    Method.VERA: adapters_pb2.ADAPTER_METHOD_VERA,
    Method.IA3: adapters_pb2.ADAPTER_METHOD_IA3,
    Method.LN_TUNING: adapters_pb2.ADAPTER_METHOD_LN_TUNING,
    Method.TRAINABLE_TOKENS: adapters_pb2.ADAPTER_METHOD_TRAINABLE_TOKENS,
}
_STATES = {
    AdapterState.STAGED: adapters_pb2.ADAPTER_STATE_STAGED,
    AdapterState.RESIDENT: adapters_pb2.ADAPTER_STATE_RESIDENT,
    AdapterState.DRAINING: adapters_pb2.ADAPTER_STATE_DRAINING,
    AdapterState.FAILED: adapters_pb2.ADAPTER_STATE_FAILED,
    AdapterState.UNLOADED: adapters_pb2.ADAPTER_STATE_UNLOADED,
}


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, administration: AdapterAdministration) -> None:
        self._administration = administration

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.LoadAdapterResponse:
        info = await self._administration.load(request.name, request.path, caller())
        return adapters_pb2.LoadAdapterResponse(adapter=adapter_message(info))

    async def UploadAdapter(
        self,
        request_iterator: AsyncIterator[adapters_pb2.UploadAdapterRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[adapters_pb2.UploadAdapterResponse]:
        async with aclosing(self._administration.upload(_parts(request_iterator), caller())) as events:
            async for event in events:
                if isinstance(event, int):
                    yield adapters_pb2.UploadAdapterResponse(offset=event)
                else:
                    yield adapters_pb2.UploadAdapterResponse(adapter=adapter_message(event))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.UnloadAdapterResponse:
        info = await self._administration.unload(request.name, caller())
        return adapters_pb2.UnloadAdapterResponse(adapter=adapter_message(info))

    async def RollbackAdapter(
        self, request: adapters_pb2.RollbackAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.RollbackAdapterResponse:
        info = await self._administration.rollback(request.name, request.revision or None, caller())
        return adapters_pb2.RollbackAdapterResponse(adapter=adapter_message(info))

    async def SetTrafficSplit(
        self, request: adapters_pb2.SetTrafficSplitRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.SetTrafficSplitResponse:
        info = await self._administration.split(request.name, request.revision, request.percent, caller())
        return adapters_pb2.SetTrafficSplitResponse(adapter=adapter_message(info))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.GetAdapterResponse:
        info = await self._administration.get(request.name, caller())
        return adapters_pb2.GetAdapterResponse(adapter=adapter_message(info))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.ListAdaptersResponse:
        page = await self._administration.list(request.page_size, request.page_token, caller())
        return adapters_pb2.ListAdaptersResponse(
            adapters=map(adapter_message, page.adapters), next_page_token=page.next_page_token
        )

    async def WatchAdapters(
        self, request: adapters_pb2.WatchAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[adapters_pb2.WatchAdaptersResponse]:
        async with aclosing(self._administration.watch(caller)) as changes:
            async for info in changes:
                yield adapters_pb2.WatchAdaptersResponse(adapter=adapter_message(info))

    async def ListDownloads(
        self, request: adapters_pb2.ListDownloadsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.ListDownloadsResponse:
        return adapters_pb2.ListDownloadsResponse(
            downloads=[
                adapters_pb2.Download(name=each.name, done_bytes=each.num_done, total_bytes=each.num_total)
                for each in self._administration.downloads(caller())
            ]
        )


async def _parts(
    messages: AsyncIterator[adapters_pb2.UploadAdapterRequest],
) -> AsyncGenerator[UploadStart | UploadChunk]:
    async for message in messages:
        if message.WhichOneof("part") == "start":
            start = message.start
            names = [file.name for file in start.tokenizer]
            if len(set(names)) < len(names):
                raise InvalidRequestError("a file of the tokenizer is named twice", field="tokenizer")
            yield UploadStart(
                name=start.name,
                digest=start.digest,
                config=start.config,
                size=start.size,
                tokenizer={file.name: file.size for file in start.tokenizer},
            )
        else:
            yield UploadChunk(offset=message.chunk.offset, data=message.chunk.data)


def adapter_message(info: AdapterInfo) -> adapters_pb2.Adapter:
    message = adapters_pb2.Adapter(
        name=info.name,
        revision=info.revision,
        state=_STATES[info.state],
        num_parameters=info.num_parameters,
        max_rank=info.max_rank,
        num_virtual_tokens=info.num_virtual_tokens,
        file_bytes=info.file_bytes,
        arena_bytes=info.arena_bytes,
        active_requests=info.active_requests,
        draining_revisions=info.draining_revisions,
        error=info.error,
        num_tasks=info.num_tasks,
        vocab_size=info.vocab_size,
        own_tokenizer=info.own_tokenizer,
        history=map(_revision_message, info.history),
    )
    if info.method:
        message.method = METHODS[info.method]
    if info.split:
        message.traffic_split.revision = info.split.revision
        message.traffic_split.percent = info.split.percent
    return message


def _revision_message(revision: AdapterRevision) -> adapters_pb2.AdapterRevision:
    message = adapters_pb2.AdapterRevision(revision=revision.revision, source=revision.source)
    message.published_at.FromMilliseconds(round(revision.published_at * 1000))
    return message
