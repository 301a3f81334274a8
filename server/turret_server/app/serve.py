"""Puts the parts together and keeps them running until a signal comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from turret_adapters.host_memory import HostMemory
from turret_adapters.library import AdapterLibrary
from turret_adapters.registry import AdapterRegistry
from turret_adapters.slab import lora_rows, slab_layout
from turret_adapters.sources.policy import Policy
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore
from turret_server.app.memory import arena_bytes, host_bytes, max_adapter_bytes, parse_memory
from turret_server.app.readiness import report_ready
from turret_server.app.recording import request_records
from turret_server.app.security import check_tenants, tls_files
from turret_server.app.settings import check_config
from turret_server.app.shutdown import Shutdown
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.engine.scheduler import Limits
from turret_server.errors import ConfigError, GenerationFailedError
from turret_server.kernels.cpu.cores import give_back_cores
from turret_server.lifecycle.folder_watch import FolderWatch
from turret_server.lifecycle.lazy import NAME_MARK, LazyAdapters
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.watches import AdapterWatches
from turret_server.model.arena import Arena
from turret_server.model.load import LoadedModel, load_model, select_device, select_dtype
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler
from turret_server.model.weights import ModelWeights
from turret_server.observability.metrics import AdapterMetrics, AuthMetrics, EngineMetrics
from turret_server.observability.request_log import RequestRecords
from turret_server.observability.usage_metrics import UsageMetrics
from turret_server.rpc.adapter_messages import AdapterMessages
from turret_server.rpc.adapters import AdapterServicer
from turret_server.rpc.auth import AuthInterceptor
from turret_server.rpc.drain import RunningCalls
from turret_server.rpc.errors import ErrorInterceptor
from turret_server.rpc.inference import InferenceServicer
from turret_server.rpc.prompts import PromptServicer
from turret_server.rpc.reading import ReadingInterceptor
from turret_server.rpc.server import RpcServer, is_loopback, split_address
from turret_server.rpc.tls import TlsFiles
from turret_server.serving.requests import ModelInfo, RequestFactory
from turret_server.serving.validation import check_name
from turret_server.tenancy.auth_hook import AuthHook, load_hook
from turret_server.tenancy.tenants_file import TenantsFile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A running engine with what stands around it, before a port is opened."""

    engine: Engine
    registry: AdapterRegistry
    lifecycle: AdapterLifecycle
    inference: InferenceServicer
    adapters: AdapterServicer
    prompts: PromptServicer
    watches: AdapterWatches
    tenants: TenantsFile
    auth_hook: AuthHook | None
    tls: TlsFiles | None
    metrics: CollectorRegistry
    loaded: LoadedModel
    arena: Arena


@contextmanager
def assemble(config: ServerConfig, sampler: Sampler | None = None) -> Iterator[Parts]:
    """Load the model and start the engine; stop it at the end.

    Raises:
        ConfigError: a setting cannot be.
        UnsupportedModelError: the model cannot be served.
    """
    check_config(config)
    metrics = CollectorRegistry()
    with request_records(config, metrics) as records, _assembled(config, metrics, records, sampler) as parts:
        yield parts


@contextmanager
def _assembled(
    config: ServerConfig, metrics: CollectorRegistry, records: RequestRecords, sampler: Sampler | None
) -> Iterator[Parts]:
    limits = TenantLimits(max_queued_requests=config.max_queue, max_queued_tokens=config.max_queue_tokens)
    auth_hook = load_hook(config.auth_hook) if config.auth_hook else None
    tenants = TenantsFile(config.tenants, limits, hooked=auth_hook is not None)
    check_tenants(config, tenants.table)
    tls = tls_files(config)
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, device)
    loaded = load_model(config.model, device=device, dtype=dtype, cache=config.cache)
    arena = Arena(loaded.base, arena_bytes(config.memory, device), dtype=dtype, device=device)
    if not arena.num_pages:
        raise ConfigError(f"--memory {config.memory}: less than one page of {arena.page_bytes} bytes")
    library = _library(config, loaded)
    on_gpu = device.type == "cuda"
    memory = HostMemory(host_bytes(config.host_memory), library.read, page_locked=on_gpu)
    registry = AdapterRegistry(memory)
    runner = ModelRunner(loaded, arena, registry, sampler or Sampler())
    runner.check()
    runner.warm_up(config.max_batch_requests)
    engine = Engine(
        runner=runner,
        memory=runner,
        num_pages=arena.num_pages,
        page_elements=arena.page_elements,
        block_size=arena.block_size,
        limits=Limits(
            max_batch_tokens=config.max_batch_tokens,
            max_batch_requests=config.max_batch_requests,
            max_step_seconds=config.max_step_seconds,
        ),
        tenants=tenants.limits,
        max_adapter_pages=partial(_max_adapter_pages, tenants, arena.page_bytes),
        on_stats=EngineMetrics(metrics, arena.page_bytes).record,
    )
    _announce(config, loaded, arena)
    lifecycle = AdapterLifecycle(engine=engine, registry=registry, library=library, pinned=config.pin)
    messages = AdapterMessages(engine, arena.page_bytes)
    watches = AdapterWatches(registry, messages)
    adapters = AdapterServicer(registry=registry, lifecycle=lifecycle, messages=messages, watches=watches)
    AdapterMetrics(adapters.states, memory, library.downloads, metrics)
    requests = RequestFactory(
        registry=registry,
        lifecycle=lifecycle,
        codec=loaded.tokenizer,
        model=ModelInfo(
            vocab_size=loaded.vocab_size,
            max_context=loaded.max_context,
            stop_token_ids=loaded.stop_token_ids,
        ),
        usage=UsageMetrics(metrics),
        lazy=LazyAdapters(lifecycle, config.lazy_source) if config.lazy_source else None,
    )
    inference = InferenceServicer(engine=engine, requests=requests, codec=loaded.tokenizer, records=records)
    prompts = PromptServicer(engine=engine, requests=requests, records=records, block_size=arena.block_size)
    watch = None
    give_back_cores()
    engine.start()
    try:
        watch = _folder_watch(config, lifecycle)
        lifecycle.start(config.adapters, check_name)
        if watch:
            watch.start()
        with tenants:
            yield Parts(
                engine=engine,
                registry=registry,
                lifecycle=lifecycle,
                inference=inference,
                adapters=adapters,
                prompts=prompts,
                watches=watches,
                tenants=tenants,
                auth_hook=auth_hook,
                tls=tls,
                metrics=metrics,
                loaded=loaded,
                arena=arena,
            )
    finally:
        if watch:
            watch.stop()
        engine.stop()
        runner.close()
        library.close()


def serve(config: ServerConfig) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: a setting cannot be.
        UnsupportedModelError: the model cannot be served.
        GenerationFailedError: the engine failed; a new process may do better.
    """
    with assemble(config) as parts:
        if config.metrics:
            _serve_metrics(config.metrics, parts.metrics)
        asyncio.run(_serve(config, parts))


def _serve_metrics(address: str, registry: CollectorRegistry) -> None:
    host, port = split_address(address)
    try:
        server, _ = start_http_server(port, host, registry=registry)
    except OSError as error:
        raise ConfigError(f"--metrics {address}: {error.strerror}; name another port, or none") from error
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)


def make_server(parts: Parts) -> RpcServer:
    """What answers calls. Errors are told last: also who is not known is told so in our words, and before
    the request is read.
    """
    calls = RunningCalls()
    auth = AuthInterceptor(parts.tenants, parts.auth_hook, AuthMetrics(parts.metrics).failed)
    interceptors = [ErrorInterceptor(), calls, auth, ReadingInterceptor()]
    tls = parts.tls.credentials() if parts.tls else None
    return RpcServer(parts.inference, parts.adapters, parts.prompts, interceptors, calls, tls)


async def _serve(config: ServerConfig, parts: Parts) -> None:
    server = make_server(parts)
    shutdown = Shutdown(server, parts.engine, parts.watches)
    port = await server.start(config.listen)
    log.info("serving on %s:%d", split_address(config.listen)[0], port)
    readiness = asyncio.create_task(report_ready(server, parts.lifecycle.pin_missing))
    await shutdown.wait()
    readiness.cancel()
    await shutdown.drain(config.grace, parts.lifecycle.interrupt)
    if parts.engine.failed:
        raise GenerationFailedError("the engine failed and its requests with it; the log says why")


def _max_adapter_pages(tenants: TenantsFile, page_bytes: int, tenant: str) -> int | None:
    most = tenants.max_device_bytes(tenant)
    return None if most is None else most // page_bytes


def _library(config: ServerConfig, loaded: LoadedModel) -> AdapterLibrary:
    """Adapters on the disk. Names belong to the model; what is in the store, to whoever needs it."""
    size = int(parse_memory("--store-size", config.store_size)[0]) if config.store_size else None
    store = AdapterStore(config.store, size)
    names = Names(config.store / "names.sqlite", _identity(config.model))
    weights = ModelWeights(loaded.model, loaded.ops)
    return AdapterLibrary(store=store, names=names, policy=_policy(config), base=loaded.base, weights=weights)


def _folder_watch(config: ServerConfig, lifecycle: AdapterLifecycle) -> FolderWatch | None:
    """Made before the folders are loaded: what changes meanwhile is seen."""
    if not (config.watch and config.adapters):
        return None
    return FolderWatch(config.adapters, lifecycle, check_name)


def _identity(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _policy(config: ServerConfig) -> Policy:
    """Who reaches a server on the loopback has the machine anyway; others only what they are given."""
    allowed = [*config.allow_sources]
    if config.lazy_source:
        allowed.append(config.lazy_source.partition(NAME_MARK)[0].rpartition("/")[0])
    urls = tuple(source for source in allowed if "://" in source)
    folders = [Path(source) for source in allowed if "://" not in source]
    if config.adapters:
        folders.append(config.adapters)
    if not config.allow_sources and is_loopback(config.listen):
        folders = [Path("/")]
    return Policy(roots=tuple(folders), urls=urls, max_bytes=max_adapter_bytes())


def _announce(config: ServerConfig, loaded: LoadedModel, arena: Arena) -> None:
    rank = 16
    per_adapter = slab_layout(lora_rows(loaded.base, rank), arena.page_elements).num_pages
    log.info(
        "%s on %s in %s; arena of %.0f MiB: %d pages of %d tokens; room for %d tokens, or %d LoRA adapters "
        "of rank %d on every linear, or a mixture",
        config.model,
        loaded.device.type,
        str(loaded.dtype).removeprefix("torch."),
        arena.num_pages * arena.page_bytes / 2**20,
        arena.num_pages,
        arena.block_size,
        arena.num_pages * arena.block_size,
        arena.num_pages // per_adapter,
        rank,
    )
