"""Puts the parts together and keeps them running until a signal comes."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from turret_adapters.host_memory import HostMemory
from turret_adapters.library import AdapterLibrary
from turret_adapters.names import Names
from turret_adapters.policy import Policy
from turret_adapters.registry import AdapterRegistry
from turret_adapters.slab import lora_rows, slab_layout
from turret_adapters.store import AdapterStore
from turret_server.api.adapter_messages import AdapterMessages
from turret_server.api.adapters import AdapterServicer
from turret_server.api.auth import AuthInterceptor
from turret_server.api.errors import ErrorInterceptor
from turret_server.api.inference import InferenceServicer
from turret_server.api.lazy import NAME_MARK, LazyAdapters
from turret_server.api.metrics import AdapterMetrics, EngineMetrics, RequestMetrics
from turret_server.api.prompts import PromptServicer
from turret_server.api.requests import ModelInfo, RequestFactory
from turret_server.api.rpc import RpcServer, is_loopback, split_address
from turret_server.api.tls import TlsFiles
from turret_server.api.usage import UsageMetrics
from turret_server.api.validation import check_name
from turret_server.api.watches import AdapterWatches
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.engine.scheduler import Limits
from turret_server.errors import ConfigError, GenerationFailedError
from turret_server.folder_watch import FolderWatch
from turret_server.lifecycle import AdapterLifecycle
from turret_server.memory import arena_bytes, host_bytes, parse_memory
from turret_server.model.arena import Arena
from turret_server.model.load import LoadedModel, load_model, select_device, select_dtype
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler
from turret_server.model.weights import ModelWeights
from turret_server.security import check_tenants, tls_files
from turret_server.tenants_file import TenantsFile

log = logging.getLogger(__name__)

_GRACE_SECONDS = 30.0


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
    _check(config)
    limits = TenantLimits(max_queued_requests=config.max_queue, max_queued_tokens=config.max_queue_tokens)
    tenants = TenantsFile(config.tenants, limits)
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
    metrics = CollectorRegistry()
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
        on_stats=EngineMetrics(metrics, arena.page_bytes).record,
    )
    _announce(config, loaded, arena)
    lifecycle = AdapterLifecycle(engine=engine, registry=registry, library=library)
    messages = AdapterMessages(engine, arena.page_bytes)
    watches = AdapterWatches(registry, messages)
    adapters = AdapterServicer(registry=registry, lifecycle=lifecycle, messages=messages, watches=watches)
    AdapterMetrics(adapters.states, memory, metrics)
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
    inference = InferenceServicer(
        engine=engine, requests=requests, codec=loaded.tokenizer, metrics=RequestMetrics(metrics)
    )
    prompts = PromptServicer(engine=engine, requests=requests, block_size=arena.block_size)
    watch = None
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
    """What answers calls. Errors are told last: also who is not known is told so in our words."""
    interceptors = [ErrorInterceptor(), AuthInterceptor(parts.tenants)]
    tls = parts.tls.credentials() if parts.tls else None
    return RpcServer(parts.inference, parts.adapters, parts.prompts, interceptors, tls)


async def _serve(config: ServerConfig, parts: Parts) -> None:
    stop = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    server = make_server(parts)
    port = await server.start(config.listen)
    log.info("serving on %s:%d", split_address(config.listen)[0], port)
    loop = asyncio.get_running_loop()

    def stop_now() -> None:
        loop.call_soon_threadsafe(stop.set)

    parts.engine.on_failure = stop_now
    await stop.wait()
    parts.watches.close()
    if parts.engine.failed:
        await server.stop(0)
        raise GenerationFailedError("the engine failed and its requests with it; the log says why")
    log.info("stopping: requests that run have %d s to finish", _GRACE_SECONDS)
    await server.stop(_GRACE_SECONDS)


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
    return Policy(roots=tuple(folders), urls=urls)


def _check(config: ServerConfig) -> None:
    split_address(config.listen)
    if config.metrics:
        split_address(config.metrics)
    if not 1 <= config.max_batch_requests <= config.max_batch_tokens:
        raise ConfigError(
            f"--max-batch-requests is from 1 to --max-batch-tokens ({config.max_batch_tokens}); "
            f"found {config.max_batch_requests}"
        )
    for option, size in (
        ("--memory", config.memory),
        ("--host-memory", config.host_memory),
        ("--store-size", config.store_size),
    ):
        if size:
            parse_memory(option, size)
    for option, value in (
        ("--max-queue", config.max_queue),
        ("--max-queue-tokens", config.max_queue_tokens),
        ("--max-step-seconds", config.max_step_seconds),
    ):
        if not value > 0:
            raise ConfigError(f"{option} is above 0; found {value}")
    lazy = config.lazy_source
    if lazy is not None and not (lazy.count(NAME_MARK) == 1 and (lazy.startswith("/") or "://" in lazy)):
        raise ConfigError(
            f"--lazy-source {lazy}: expected an absolute path or a URL with {NAME_MARK} in it once, such as "
            f"hf://owner/{NAME_MARK}"
        )
    if config.watch and not config.adapters:
        raise ConfigError("--watch: there is no folder to watch; name one with --adapters")
    if config.adapters and not config.adapters.is_dir():
        raise ConfigError(f"--adapters {config.adapters}: there is no such folder")


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
