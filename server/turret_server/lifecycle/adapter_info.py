"""What the server says of an adapter, whatever door it is asked through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from turret_adapters.registry import AdapterStatus
from turret_adapters.spec import Method, Split
from turret_adapters.store.names import Published
from turret_server.engine.loop import Engine
from turret_server.tenancy.tenants import Tenant


class AdapterState(Enum):
    """`UNLOADED` is only the last state of an adapter that is gone."""

    STAGED = "staged"  # in host memory or on disk
    RESIDENT = "resident"  # in the arena
    DRAINING = "draining"  # unloaded, with requests still running
    FAILED = "failed"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRevision:
    """A revision in the history of a name. `published_at` is in seconds since 1970."""

    revision: str
    source: str
    published_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One name and what it serves. Without a `method`, nothing could be loaded and `error` says why.

    `active_requests` run on `revision`; requests on other revisions are listed in `draining_revisions`.
    `history` is newest first.
    """

    name: str
    state: AdapterState
    revision: str = ""
    method: Method | None = None
    num_parameters: int = 0
    max_rank: int = 0
    num_virtual_tokens: int = 0
    num_tasks: int = 0
    vocab_size: int = 0
    own_tokenizer: bool = False
    file_bytes: int = 0
    arena_bytes: int = 0
    active_requests: int = 0
    draining_revisions: tuple[str, ...] = ()
    error: str = ""
    split: Split | None = None
    history: tuple[AdapterRevision, ...] = ()

    def visible_to(self, tenant: Tenant) -> AdapterInfo:
        """The same without paths and URLs of the operator, unless the tenant may load the adapter."""
        if tenant.may_load(self.name):
            return self
        return replace(
            self,
            error=self.error and "it could not be loaded; ask the server's operator why",
            history=tuple(replace(each, source="") for each in self.history),
        )


class AdapterDescriber:
    """Describes adapters from the registry and the engine. Reads memory only."""

    def __init__(self, engine: Engine, page_bytes: int) -> None:
        """`page_bytes` is the size of a page of the arena."""
        self._engine = engine
        self._page_bytes = page_bytes

    def describe(self, status: AdapterStatus, history: Sequence[Published] = ()) -> AdapterInfo:
        info = AdapterInfo(
            name=status.name,
            state=self.state(status),
            active_requests=status.active_requests,
            draining_revisions=status.draining_revisions,
            error=status.error,
            split=status.split,
            history=tuple(
                AdapterRevision(revision=each.revision, source=each.source, published_at=each.published_at)
                for each in history
            ),
        )
        spec = status.spec
        if spec is None:
            return info
        return replace(
            info,
            revision=spec.revision,
            method=spec.method,
            num_parameters=spec.num_parameters,
            max_rank=spec.max_rank,
            num_virtual_tokens=spec.num_virtual_tokens,
            num_tasks=spec.num_tasks,
            vocab_size=spec.vocab_size or 0,
            own_tokenizer=bool(spec.tokenizer),
            file_bytes=spec.file_bytes,
            arena_bytes=self._engine.num_pages(spec) * max(spec.num_tasks, 1) * self._page_bytes,
        )

    def state(self, status: AdapterStatus) -> AdapterState:
        if status.unloaded:
            return AdapterState.DRAINING if status.active_requests else AdapterState.UNLOADED
        if status.spec is None:
            return AdapterState.FAILED
        if any(self._engine.is_resident(revision) for revision in status.spec.resident_revisions):
            return AdapterState.RESIDENT
        return AdapterState.STAGED
