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
from turret_server.api.errors import ErrorInterceptor
from turret_server.api.inference import InferenceServicer
from turret_server.api.metrics import AdapterMetrics, EngineMetrics, RequestMetrics
from turret_server.api.prompts import PromptServicer
from turret_server.api.requests import ModelInfo, RequestFactory
from turret_server.api.rpc import RpcServer, is_loopback, split_address
from turret_server.api.validation import check_name
from turret_server.api.watches import AdapterWatches
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.engine.scheduler import Limits
from turret_server.errors import ConfigError, GenerationFailedError
from turret_server.lifecycle import AdapterLifecycle
from turret_server.memory import arena_bytes, host_bytes, parse_memory
from turret_server.model.arena import Arena
from turret_server.model.load import LoadedModel, load_model, select_device, select_dtype
from turret_server.model.runner import ModelRunner
from turret_server.model.sampler import Sampler
from turret_server.model.weights import ModelWeights
from turret_server.tenants import read_tenants

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
    tenants = read_tenants(config.tenants, limits)
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, device)
    loaded = load_model(config.model, device=device, dtype=dtype, cache=config.cache)
    arena = Arena(loaded.base, arena_bytes(config.memory, device), dtype=dtype, device=device)
    if not arena.num_pages:
        raise ConfigError(f"--memory {config.memory}: less than one page of {arena.page_bytes} bytes")
    library = _library(config, loaded)
    memory = HostMemory(host_bytes(config.host_memory), library.read)
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
        tenants=tenants,
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
    )
    inference = InferenceServicer(
        engine=engine, requests=requests, codec=loaded.tokenizer, metrics=RequestMetrics(metrics)
    )
    prompts = PromptServicer(engine=engine, requests=requests, block_size=arena.block_size)
    engine.start()
    try:
        lifecycle.start(config.adapters, check_name)
        yield Parts(
            engine=engine,
            registry=registry,
            lifecycle=lifecycle,
            inference=inference,
            adapters=adapters,
            prompts=prompts,
            watches=watches,
            metrics=metrics,
            loaded=loaded,
            arena=arena,
        )
    finally:
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


async def _serve(config: ServerConfig, parts: Parts) -> None:
    stop = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    server = RpcServer(parts.inference, parts.adapters, parts.prompts, [ErrorInterceptor()])
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


def _identity(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _policy(config: ServerConfig) -> Policy:
    """Who reaches a server on the loopback has the machine anyway; others only what they are given."""
    urls = tuple(source for source in config.allow_sources if "://" in source)
    folders = [Path(source) for source in config.allow_sources if "://" not in source]
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
