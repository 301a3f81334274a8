"""Adapters that clients send: first what is to come, then the tensors from where they go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

from turret.v1 import adapters_pb2
from turret_adapters.store_errors import UploadError
from turret_adapters.uploads import Upload
from turret_server.api.access import check_change
from turret_server.api.loads import LoadQueue
from turret_server.api.threads import end_of, to_its_end
from turret_server.api.validation import check_name
from turret_server.errors import DeadlineError, InvalidRequestError
from turret_server.lifecycle import AdapterLifecycle
from turret_server.tenants import Tenant

IDLE_SECONDS = 60.0

Messages = AsyncIterator[adapters_pb2.UploadAdapterRequest]


class AdapterUploads:
    def __init__(self, lifecycle: AdapterLifecycle, loads: LoadQueue) -> None:
        self._lifecycle = lifecycle
        self._loads = loads

    async def receive(self, messages: Messages, tenant: Tenant) -> AsyncGenerator[tuple[str, int]]:
        """Receives an adapter and serves it under its name, which is yielded twice: with the offset that the
        tensors are wanted from, and with their size when it is served.

        Raises:
            InvalidRequestError: a message is missing, or not the one that is due.
            PermissionDeniedError: the tenant may not load under that name.
            AdapterError: the bytes are not those that were announced, or no adapter that can be served.
            DeadlineError: nothing came for `IDLE_SECONDS`.
        """
        start = await _start(messages)
        name = check_name(start.name)
        check_change(tenant, name)
        upload = await to_its_end(
            partial(self._lifecycle.receive, start.digest, start.config, start.size, tenant.name),
            undo=Upload.close,
        )
        with upload:
            yield name, upload.offset
            while upload.offset < upload.size:
                chunk = await _chunk(messages, upload)
                await to_its_end(partial(upload.write, chunk.offset, chunk.data))
            await end_of(self._loads.start(partial(self._lifecycle.load_upload, name, upload)))
            yield name, upload.size


async def _start(messages: Messages) -> adapters_pb2.UploadStart:
    message = await _next(messages)
    if message is None or message.WhichOneof("part") != "start":
        raise InvalidRequestError("the first message of an upload is its start", field="start")
    return message.start


async def _chunk(messages: Messages, upload: Upload) -> adapters_pb2.UploadChunk:
    message = await _next(messages)
    if message is None:
        raise UploadError(
            f"expected {upload.size} bytes, found {upload.offset} (upload again to go on there)"
        )
    if message.WhichOneof("part") != "chunk" or not message.chunk.data:
        raise InvalidRequestError("after the start of an upload come chunks with data", field="chunk")
    return message.chunk


async def _next(messages: Messages) -> adapters_pb2.UploadAdapterRequest | None:
    try:
        return await asyncio.wait_for(anext(messages, None), IDLE_SECONDS)
    except TimeoutError as error:
        raise DeadlineError(
            f"nothing came for {IDLE_SECONDS:g} s; upload again to go on where it stopped"
        ) from error
