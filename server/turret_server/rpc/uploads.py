"""Adapters that clients send: first what is to come, then the tensors from where they go on."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from functools import partial

from turret.v1 import adapters_pb2
from turret_adapters.errors import UploadError
from turret_adapters.store.uploads import Upload
from turret_server.errors import DeadlineError, InvalidRequestError, QuotaExceededError, TooManyCallsError
from turret_server.lifecycle.loads import LoadQueue
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.threads import end_of, to_its_end
from turret_server.tenancy.access import check_change
from turret_server.tenancy.tenants import Tenant, check_name

IDLE_SECONDS = 60.0
# Who sends less than that is cut off after `IDLE_SECONDS`, and may go on where it stopped.
SLOWEST_BYTES_PER_SECOND = 16 << 10
MAX_UPLOADS_OF_TENANT = 16

Messages = AsyncIterator[adapters_pb2.UploadAdapterRequest]


class AdapterUploads:
    def __init__(self, lifecycle: AdapterLifecycle, loads: LoadQueue) -> None:
        self._lifecycle = lifecycle
        self._loads = loads
        self._num_open: Counter[str] = Counter()

    async def receive(self, messages: Messages, tenant: Tenant) -> AsyncGenerator[tuple[str, int]]:
        """Receives an adapter and serves it under its name, which is yielded twice: with the offset that the
        tensors are wanted from, and with their size when it is served.

        Raises:
            InvalidRequestError: a message is missing, or not the one that is due.
            PermissionDeniedError: the tenant may not load under that name.
            AdapterError: the bytes are not those that were announced, or no adapter that can be served.
            DeadlineError: too little came.
            QuotaExceededError: the tenant has as many loads at once, or adapters as large, as it may.
            TooManyCallsError: the tenant uploads as many as it may.
        """
        with self._one_more(tenant.name):
            start = await _start(messages)
            name = check_name(start.name)
            check_change(tenant, name)
            _check_size(start, tenant)
            with self._loads.place(tenant):
                async with aclosing(self._take(messages, start, name, tenant)) as offsets:
                    async for offset in offsets:
                        yield name, offset

    async def _take(
        self, messages: Messages, start: adapters_pb2.UploadStart, name: str, tenant: Tenant
    ) -> AsyncGenerator[int]:
        upload = await to_its_end(
            partial(self._lifecycle.receive, start.digest, start.config, start.size, tenant.name),
            undo=Upload.close,
        )
        with upload:
            yield upload.offset
            pace = _Pace(upload.offset)
            while upload.offset < upload.size:
                chunk = await _chunk(messages, upload, pace.left(upload.offset))
                await to_its_end(partial(upload.write, chunk.offset, chunk.data))
            load = partial(self._lifecycle.load_upload, name, upload, tenant.ownership)
            await end_of(self._loads.start(load))
            yield upload.size

    @contextmanager
    def _one_more(self, tenant: str) -> Iterator[None]:
        if self._num_open[tenant] >= MAX_UPLOADS_OF_TENANT:
            raise TooManyCallsError(
                f"at most {MAX_UPLOADS_OF_TENANT} uploads of one tenant at a time; wait until one has ended",
                limit=MAX_UPLOADS_OF_TENANT,
            )
        self._num_open[tenant] += 1
        try:
            yield
        finally:
            self._num_open[tenant] -= 1
            if not self._num_open[tenant]:
                del self._num_open[tenant]


class _Pace:
    """How long to wait for more: a byte now and then does not keep an upload open."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._began = time.monotonic()

    def left(self, offset: int) -> float:
        earned = (offset - self._offset) / SLOWEST_BYTES_PER_SECOND
        return min(IDLE_SECONDS, self._began + IDLE_SECONDS + earned - time.monotonic())


def _check_size(start: adapters_pb2.UploadStart, tenant: Tenant) -> None:
    """What could not be the tenant's even alone need not come."""
    size, most = len(start.config) + start.size, tenant.max_adapter_bytes
    if most is not None and size > most:
        raise QuotaExceededError(
            f"tenant {tenant.name!r} may have adapters of {most} bytes, and this one has {size}",
            tenant=tenant.name,
            quota="max_adapter_bytes",
        )


async def _start(messages: Messages) -> adapters_pb2.UploadStart:
    message = await _next(messages, IDLE_SECONDS)
    if message is None or message.WhichOneof("part") != "start":
        raise InvalidRequestError("the first message of an upload is its start", field="start")
    return message.start


async def _chunk(messages: Messages, upload: Upload, seconds: float) -> adapters_pb2.UploadChunk:
    message = await _next(messages, seconds)
    if message is None:
        raise UploadError(
            f"expected {upload.size} bytes, found {upload.offset} (upload again to go on there)"
        )
    if message.WhichOneof("part") != "chunk" or not message.chunk.data:
        raise InvalidRequestError("after the start of an upload come chunks with data", field="chunk")
    return message.chunk


async def _next(messages: Messages, seconds: float) -> adapters_pb2.UploadAdapterRequest | None:
    try:
        return await asyncio.wait_for(anext(messages, None), seconds)
    except TimeoutError as error:
        raise DeadlineError(
            f"nothing came for {IDLE_SECONDS:g} s, or less than {SLOWEST_BYTES_PER_SECOND} bytes a second; "
            "upload again to go on where it stopped"
        ) from error
