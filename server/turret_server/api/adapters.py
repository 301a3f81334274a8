"""AdapterService: load, swap and unload while requests run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from turret.v1 import adapters_pb2, adapters_pb2_grpc
from turret_adapters.host import HostAdapter
from turret_adapters.registry import AdapterRegistry, AdapterStatus
from turret_adapters.spec import Method
from turret_server.api.validation import check_name
from turret_server.engine.loop import Engine
from turret_server.errors import InvalidRequestError

log = logging.getLogger(__name__)

_DEFAULT_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000

_METHODS = {
    Method.LORA: adapters_pb2.ADAPTER_METHOD_LORA,
    Method.PREFIX_TUNING: adapters_pb2.ADAPTER_METHOD_PREFIX_TUNING,
    Method.PROMPT_TUNING: adapters_pb2.ADAPTER_METHOD_PROMPT_TUNING,
    Method.P_TUNING: adapters_pb2.ADAPTER_METHOD_P_TUNING,
    Method.MULTITASK_PROMPT_TUNING: adapters_pb2.ADAPTER_METHOD_MULTITASK_PROMPT_TUNING,
    Method.ADALORA: adapters_pb2.ADAPTER_METHOD_ADALORA,
    Method.VERA: adapters_pb2.ADAPTER_METHOD_VERA,
    Method.IA3: adapters_pb2.ADAPTER_METHOD_IA3,
    Method.LN_TUNING: adapters_pb2.ADAPTER_METHOD_LN_TUNING,
}


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """`read` turns a path into host tensors, or raises an AdapterError; it runs on another thread."""

    def __init__(
        self,
        *,
        engine: Engine,
        registry: AdapterRegistry,
        read: Callable[[str], HostAdapter],
        page_bytes: int,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._read = read
        self._page_bytes = page_bytes

    def load(self, name: str, path: str) -> None:
        """Read an adapter and serve it under `name` from now on.

        Raises:
            AdapterError: there is none, or it cannot be served on this base.
            AdapterTooLargeError: the arena could never hold it.
        """
        adapter = self._read(path)
        self._engine.check_adapter(adapter.spec)
        self._registry.publish(name, adapter)
        if not adapter.tasks:
            self._engine.prefetch(adapter.spec)
        log.info("loaded adapter %s, revision %s, from %s", name, adapter.spec.revision, path)

    def states(self) -> list[str]:
        """The state of every adapter, in the short lower-case names of the metrics."""
        names = adapters_pb2.AdapterState.Name
        prefix = "ADAPTER_STATE_"
        return [names(self._state(s)).removeprefix(prefix).lower() for s in self._registry.statuses()]

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.LoadAdapterResponse:
        name = check_name(request.name)
        if not request.path:
            raise InvalidRequestError("path is empty; give the adapter's folder", field="path")
        await asyncio.to_thread(self.load, name, request.path)
        return adapters_pb2.LoadAdapterResponse(adapter=self._message(self._registry.status(name)))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.UnloadAdapterResponse:
        status = self._registry.remove(check_name(request.name))
        log.info("unloaded adapter %s", request.name)
        return adapters_pb2.UnloadAdapterResponse(adapter=self._message(status))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.GetAdapterResponse:
        return adapters_pb2.GetAdapterResponse(
            adapter=self._message(self._registry.status(check_name(request.name)))
        )

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapters_pb2.ListAdaptersResponse:
        if not 0 <= request.page_size <= _MAX_PAGE_SIZE:
            raise InvalidRequestError(
                f"page_size is 0 to {_MAX_PAGE_SIZE}; found {request.page_size}", field="page_size"
            )
        size = request.page_size or _DEFAULT_PAGE_SIZE
        # The token is the last name of the page before: adapters that come and go do not shift the pages.
        rest = [status for status in self._registry.statuses() if status.name > request.page_token]
        page = rest[:size]
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self._message(status) for status in page],
            next_page_token=page[-1].name if len(rest) > size else "",
        )

    def _message(self, status: AdapterStatus) -> adapters_pb2.Adapter:
        message = adapters_pb2.Adapter(
            name=status.name,
            state=self._state(status),
            active_requests=status.active_requests,
            draining_revisions=status.draining_revisions,
            error=status.error,
        )
        if spec := status.spec:
            message.revision = spec.revision
            message.method = _METHODS[spec.method]
            message.num_parameters = spec.num_parameters
            message.max_rank = spec.max_rank
            message.num_virtual_tokens = spec.num_virtual_tokens
            message.file_bytes = spec.file_bytes
            message.num_tasks = spec.num_tasks
            message.arena_bytes = self._engine.num_pages(spec) * max(spec.num_tasks, 1) * self._page_bytes
        return message

    def _state(self, status: AdapterStatus) -> adapters_pb2.AdapterState.ValueType:
        if status.unloaded and not status.active_requests:
            return adapters_pb2.ADAPTER_STATE_UNLOADED
        if status.unloaded:
            return adapters_pb2.ADAPTER_STATE_DRAINING
        if status.spec is None:
            return adapters_pb2.ADAPTER_STATE_FAILED
        if any(self._engine.is_resident(revision) for revision in status.spec.resident_revisions):
            return adapters_pb2.ADAPTER_STATE_RESIDENT
        return adapters_pb2.ADAPTER_STATE_STAGED
