"""Builds a server around its store: constructs its parts in order, and closes them in reverse."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from turret_adapters.host_memory import HostMemory
from turret_adapters.library import AdapterLibrary
from turret_adapters.registry import AdapterRegistry
from turret_adapters.sources.policy import Policy
from turret_adapters.spec import lora_rows, slab_layout
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore
from turret_server.app.assembly import Access
from turret_server.app.budgets import arena_bytes, host_bytes, log_gpu_memory, max_adapter_bytes
from turret_server.config import NAME_MARK, ServerConfig
from turret_server.engine.loop import Engine, EngineStats
from turret_server.engine.scheduler import Limits
from turret_server.errors import ConfigError
from turret_server.kernels.cpu.cores import release_cores
from turret_server.lifecycle.adapter_info import AdapterDescriber
from turret_server.lifecycle.administration import AdapterAdministration
from turret_server.lifecycle.cleanup import CleanupWorker
from turret_server.lifecycle.folder_watch import FolderWatch
from turret_server.lifecycle.lazy import LazyAdapters
from turret_server.lifecycle.publishing import AdapterLifecycle
from turret_server.lifecycle.revisions import Revisions
from turret_server.lifecycle.watches import AdapterWatches
from turret_server.model.arena import Arena
from turret_server.model.load import (
    LoadedModel,
    ModelWeights,
    load_model,
    select_device,
    select_dtype,
)
from turret_server.model.runner import ModelRunner, graph_bytes
from turret_server.model.sampler import Sampler
from turret_server.observability.metrics import (
    AdapterMetrics,
    EngineMetrics,
    RequestMetrics,
    add_server_info,
)
from turret_server.observability.request_log import RequestLog
from turret_server.observability.usage_log import UsageLog
from turret_server.observability.usage_metrics import UsageMetrics
from turret_server.observability.vllm_metrics import VllmMetrics
from turret_server.serving.chat_templates import ChatTemplates
from turret_server.serving.codec import TextCodec
from turret_server.serving.generation import GenerationService
from turret_server.serving.jobs import Jobs
from turret_server.serving.model import Model, ModelService
from turret_server.serving.model_info import ModelInfo
from turret_server.serving.pooling import PoolingModel, PoolingService
from turret_server.serving.prompts import PromptService
from turret_server.serving.structured import Grammars
from turret_server.serving.tokens import TokenService
from turret_server.serving.vocabulary import Vocabularies, Vocabulary
from turret_server.tenancy.tenants_file import TenantsFile

log = logging.getLogger(__name__)

_COMMON_RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A server that runs, but has no open port yet."""

    engine: Engine
    registry: AdapterRegistry
    lifecycle: AdapterLifecycle
    generation: GenerationService
    prompts: PromptService
    tokens: TokenService
    pooling: PoolingService
    model: ModelService
    administration: AdapterAdministration
    watches: AdapterWatches
    access: Access
    metrics: CollectorRegistry
    loaded: LoadedModel
    arena: Arena


def build(
    config: ServerConfig, access: Access, store: AdapterStore, sampler: Sampler | None, stack: ExitStack
) -> Parts:
    """Load the model and start the engine. Everything that must be closed goes on `stack`, in the order in
    which it is constructed.
    """
    metrics = CollectorRegistry()
    request_log = stack.enter_context(open_request_log(config, metrics))
    loaded, arena = _load_model(config)
    add_server_info(
        metrics,
        model=config.model,
        device=loaded.device.type,
        dtype=_dtype_name(loaded),
        context=loaded.context.tokens,
    )
    library = _make_library(config, store, loaded)
    stack.callback(library.close)
    page_locked = loaded.device.type == "cuda"
    memory = HostMemory(host_bytes(config.host_memory), library.read, page_locked=page_locked)
    registry = AdapterRegistry(memory)
    runner = stack.enter_context(closing(ModelRunner(loaded, arena, registry, sampler or Sampler())))
    runner.check()
    runner.warm_up(config.max_batch_requests)
    routing = _vllm_metrics(config, loaded, arena) if config.vllm_metrics else None
    on_stats = _on_stats(arena, metrics, routing)
    engine = _make_engine(config, runner, loaded, arena, access.tenants, on_stats)
    cleanup = stack.enter_context(closing(CleanupWorker()))
    revisions = Revisions(engine=engine, registry=registry, library=library, cleanup=cleanup)
    lifecycle = AdapterLifecycle(
        engine=engine,
        registry=registry,
        library=library,
        revisions=revisions,
        cleanup=cleanup,
        pinned=config.pin,
    )
    describer = AdapterDescriber(engine, arena.page_bytes)
    watches = AdapterWatches(registry, describer)
    administration = AdapterAdministration(
        registry=registry, library=library, lifecycle=lifecycle, describer=describer, watches=watches
    )
    AdapterMetrics(administration.count_states, memory, library.downloads, metrics)
    if routing:
        routing.register(metrics, administration.routed)
    lazy = LazyAdapters(lifecycle, registry, config.lazy_source) if config.lazy_source else None
    chats = stack.enter_context(closing(_chat_templates(config, loaded, library)))
    generation, prompts, tokens, pooling = _make_services(
        engine,
        registry,
        library,
        revisions,
        loaded,
        arena,
        lazy,
        UsageMetrics(metrics),
        request_log,
        chats,
    )
    _log_capacity(config, loaded, arena)
    release_cores()
    stack.callback(engine.stop)
    engine.start()
    _load_adapters(config, lifecycle, stack)
    stack.enter_context(access.tenants)
    return Parts(
        engine=engine,
        registry=registry,
        lifecycle=lifecycle,
        generation=generation,
        prompts=prompts,
        tokens=tokens,
        pooling=pooling,
        model=ModelService(_about_model(config, loaded, chats)),
        administration=administration,
        watches=watches,
        access=access,
        metrics=metrics,
        loaded=loaded,
        arena=arena,
    )


def _make_services(
    engine: Engine,
    registry: AdapterRegistry,
    library: AdapterLibrary,
    revisions: Revisions,
    loaded: LoadedModel,
    arena: Arena,
    lazy: LazyAdapters | None,
    usage: UsageMetrics,
    request_log: RequestLog,
    chats: ChatTemplates,
) -> tuple[GenerationService, PromptService, TokenService, PoolingService]:
    """The services that prepare prompts."""
    model = ModelInfo(
        max_context=loaded.context.tokens,
        context_note=loaded.context.note,
        block_size=arena.block_size,
    )
    vocabulary = Vocabulary(
        codec=TextCodec(loaded.tokenizer.live),
        size=loaded.vocab_size,
        stop_token_ids=loaded.stop_token_ids,
        special_tokens=loaded.tokenizer.live.special_tokens_map,
    )
    jobs = Jobs(
        engine=engine,
        registry=registry,
        revisions=revisions,
        vocabularies=Vocabularies(vocabulary, library.tokenizer),
        chats=chats,
        model=model,
        usage=usage,
        lazy=lazy,
    )
    return (
        GenerationService(
            engine=engine,
            jobs=jobs,
            model=model,
            grammars=Grammars(vocabulary),
            request_log=request_log,
        ),
        PromptService(engine=engine, registry=registry, jobs=jobs, model=model, request_log=request_log),
        TokenService(jobs),
        PoolingService(
            engine=engine, jobs=jobs, model=model, pooling=_pooling_model(loaded), request_log=request_log
        ),
    )


def _pooling_model(loaded: LoadedModel) -> PoolingModel:
    return PoolingModel(
        base=loaded.base,
        takes_pairs=loaded.encoder is not None and loaded.encoder.num_token_types > 1,
        pad_token_id=getattr(loaded.model.config.get_text_config(), "pad_token_id", None),
        pooling=loaded.vectors.pooling,
        normalize=loaded.vectors.normalize,
        max_tokens=loaded.vectors.max_tokens,
        refusal=loaded.vectors.refusal,
    )


def _chat_templates(config: ServerConfig, loaded: LoadedModel, library: AdapterLibrary) -> ChatTemplates:
    """With the template of --chat-template instead of the model's.

    Raises:
        ConfigError: the file is not text.
    """
    live = loaded.tokenizer.live
    if config.chat_template is None:
        return ChatTemplates(live.chat_template, library.chat_template, live.response_template)
    try:
        template = config.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {config.chat_template}: expected a Jinja template; {error}"
        ) from error
    return ChatTemplates(template, library.chat_template)


def _model_name(config: ServerConfig) -> str:
    """Its id on the Hub, or the name of its folder: callers need not know this machine's folders."""
    return Path(config.model).resolve().name if Path(config.model).is_dir() else config.model


def _about_model(config: ServerConfig, loaded: LoadedModel, chats: ChatTemplates) -> Model:
    return Model(
        name=_model_name(config),
        max_context=loaded.context.tokens,
        vocab_size=loaded.vocab_size,
        has_chat_template=bool(chats.base),
        calls_tools=chats.calls_tools,
    )


@contextmanager
def open_request_log(config: ServerConfig, registry: CollectorRegistry) -> Iterator[RequestLog]:
    """Log of requests; when the block ends, the usage log is closed and pending traces are sent.

    Raises:
        ConfigError: the usage log cannot be written, or OpenTelemetry is not installed.
    """
    with ExitStack() as stack:
        usage_log = stack.enter_context(closing(UsageLog(config.usage_log))) if config.usage_log else None
        on_end = None
        if config.otel:
            try:
                from turret_server.observability.tracing import tracing  # noqa: PLC0415 -- an optional extra
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("opentelemetry"):
                    raise
                raise ConfigError(
                    "--otel: OpenTelemetry is not installed; in Turret's source folder, install it with: "
                    'pip install ".[otel]"'
                ) from error
            on_end = stack.enter_context(tracing(config.model))
        yield RequestLog(RequestMetrics(registry), usage_log, on_end)


def _load_model(config: ServerConfig) -> tuple[LoadedModel, Arena]:
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, device)
    loaded = load_model(
        config.model, device=device, dtype=dtype, cache=config.cache, max_context=config.max_context
    )
    if loaded.encoder and config.max_batch_tokens < loaded.context.tokens:
        raise ConfigError(
            f"--max-batch-tokens {config.max_batch_tokens}: expected at least the model's context of "
            f"{loaded.context.tokens} tokens, as an encoder computes a text in one step; give more, or a "
            "lower --max-context"
        )
    graphs = graph_bytes(loaded, config.max_batch_requests)
    num_bytes = arena_bytes(config.memory, device, graphs=graphs)
    arena = Arena(loaded.base, num_bytes, dtype=dtype, device=device)
    if not arena.num_pages:
        raise ConfigError(
            f"--memory {config.memory or 'auto'}: {num_bytes} bytes are less than one page of "
            f"{arena.page_bytes}; expected a size such as 2GiB, or a fraction of the free memory such as 0.5"
        )
    log_gpu_memory(device, arena=arena.num_pages * arena.page_bytes, graphs=graphs)
    return loaded, arena


def _make_library(config: ServerConfig, store: AdapterStore, loaded: LoadedModel) -> AdapterLibrary:
    """Names belong to the base model; the store's files are shared by all base models."""
    identity = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    names = Names(config.store / "names.sqlite", identity)
    weights = ModelWeights(loaded.model, loaded.ops)
    return AdapterLibrary(
        store=store,
        names=names,
        policy=_source_policy(config),
        base=loaded.base,
        weights=weights,
        tokenizer=loaded.tokenizer,
    )


def _source_policy(config: ServerConfig) -> Policy:
    """Where adapters may be loaded from. Callers on loopback have access to this machine's files anyway."""
    allowed = [*config.allow_source]
    if config.lazy_source:
        allowed.append(config.lazy_source.partition(NAME_MARK)[0].rpartition("/")[0])
    urls = tuple(source for source in allowed if "://" in source)
    folders = [Path(source) for source in allowed if "://" not in source]
    if config.adapters:
        folders.append(config.adapters)
    if not config.allow_source and config.is_local:
        folders = [Path("/")]
    return Policy(roots=tuple(folders), urls=urls, max_bytes=max_adapter_bytes())


def _make_engine(
    config: ServerConfig,
    runner: ModelRunner,
    loaded: LoadedModel,
    arena: Arena,
    tenants: TenantsFile,
    on_stats: Callable[[EngineStats], None],
) -> Engine:
    return Engine(
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
        on_stats=on_stats,
        bidirectional=loaded.base.is_encoder,
    )


def _on_stats(
    arena: Arena, metrics: CollectorRegistry, routing: VllmMetrics | None
) -> Callable[[EngineStats], None]:
    record = EngineMetrics(metrics, arena.page_bytes).record
    if routing is None:
        return record

    def record_both(stats: EngineStats) -> None:
        record(stats)
        routing.record(stats)

    return record_both


def _vllm_metrics(config: ServerConfig, loaded: LoadedModel, arena: Arena) -> VllmMetrics:
    return VllmMetrics(
        model=_model_name(config),
        block_size=arena.block_size,
        num_blocks=arena.num_pages,
        max_adapters=_max_loras(loaded, arena),
    )


def _max_loras(loaded: LoadedModel, arena: Arena) -> int:
    """How many LoRA adapters of a common rank on every linear fit into the arena."""
    return arena.num_pages // slab_layout(lora_rows(loaded.base, _COMMON_RANK), arena.page_elements).num_pages


def _max_adapter_pages(tenants: TenantsFile, page_bytes: int, tenant: str) -> int | None:
    most = tenants.max_device_bytes(tenant)
    return None if most is None else most // page_bytes


def _load_adapters(config: ServerConfig, lifecycle: AdapterLifecycle, stack: ExitStack) -> None:
    """The watch is made before the folders are loaded, so that it sees what changes meanwhile."""
    watch = None
    if config.watch and config.adapters:
        watch = FolderWatch(config.adapters, lifecycle)
        stack.callback(watch.stop)
    lifecycle.start(config.adapters)
    if watch:
        watch.start()


def _dtype_name(loaded: LoadedModel) -> str:
    return str(loaded.dtype).removeprefix("torch.")


def _log_capacity(config: ServerConfig, loaded: LoadedModel, arena: Arena) -> None:
    log.info(
        "%s on %s in %s; context of %d tokens%s; arena of %.0f MiB: %d pages of %d tokens; room for %d "
        "tokens, or %d LoRA adapters of rank %d on every linear, or a mixture",
        config.model,
        loaded.device,
        _dtype_name(loaded),
        loaded.context.tokens,
        loaded.context.note,
        arena.num_pages * arena.page_bytes / 2**20,
        arena.num_pages,
        arena.block_size,
        arena.num_pages * arena.block_size,
        _max_loras(loaded, arena),
        _COMMON_RANK,
    )
