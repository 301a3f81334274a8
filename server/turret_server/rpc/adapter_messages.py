"""What the server says of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from turret.v1 import adapters_pb2
from turret_adapters.registry import AdapterStatus
from turret_adapters.spec import Method
from turret_adapters.store.names import Published
from turret_server.engine.loop import Engine

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


class AdapterMessages:
    """`page_bytes` is the size of the arena's pages."""

    def __init__(self, engine: Engine, page_bytes: int) -> None:
        self._engine = engine
        self._page_bytes = page_bytes

    def of(self, status: AdapterStatus, history: Sequence[Published] = ()) -> adapters_pb2.Adapter:
        message = adapters_pb2.Adapter(
            name=status.name,
            state=self.state(status),
            active_requests=status.active_requests,
            draining_revisions=status.draining_revisions,
            error=status.error,
            history=map(_revision, history),
        )
        if split := status.split:
            message.traffic_split.revision = split.revision
            message.traffic_split.percent = split.percent
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

    def state(self, status: AdapterStatus) -> adapters_pb2.AdapterState.ValueType:
        if status.unloaded and not status.active_requests:
            return adapters_pb2.ADAPTER_STATE_UNLOADED
        if status.unloaded:
            return adapters_pb2.ADAPTER_STATE_DRAINING
        if status.spec is None:
            return adapters_pb2.ADAPTER_STATE_FAILED
        if any(self._engine.is_resident(revision) for revision in status.spec.resident_revisions):
            return adapters_pb2.ADAPTER_STATE_RESIDENT
        return adapters_pb2.ADAPTER_STATE_STAGED


def _revision(published: Published) -> adapters_pb2.AdapterRevision:
    message = adapters_pb2.AdapterRevision(revision=published.revision, source=published.source)
    message.published_at.FromMilliseconds(round(published.published_at * 1000))
    return message
