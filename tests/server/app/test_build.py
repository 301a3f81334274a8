"""That the parts of a server are built with the settings, and with each other."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import trustme
from prometheus_client import CollectorRegistry

from support.adapter_files import write_folder
from support.encoders import FAMILIES as ENCODERS
from support.encoders import save_base
from support.models import FAMILIES
from support.prompts import until
from support.running import RecordingSampler
from turret.v1 import prompts_pb2, prompts_pb2_grpc
from turret_adapters.errors import AdapterNotFoundError
from turret_adapters.library import AdapterLibrary
from turret_adapters.store.names import Names
from turret_adapters.store.store import AdapterStore
from turret_server.app.assembly import Access, assemble, load_access, open_store
from turret_server.app.budgets import max_adapter_bytes
from turret_server.app.build import (
    Parts,
    _load_adapters,
    _log_capacity,
    _make_library,
    _max_adapter_pages,
    _pooling_model,
    _source_policy,
    open_request_log,
)
from turret_server.app.doors import make_doors
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.errors import ConfigError, InvalidRequestError, PromptTooLongError, QuotaExceededError
from turret_server.lifecycle.cleanup import CleanupWorker
from turret_server.model.runner import ModelRunner
from turret_server.observability.usage_log import UsageLog
from turret_server.serving.request import AdapterRef, Chunk, GenerationRequest, PinRequest
from turret_server.tenancy.auth import Caller
from turret_server.tenancy.keys import digest_of
from turret_server.tenancy.tenants import Tenant, TenantTable
from turret_server.tenancy.tenants_file import TenantsFile

HANG_S = 60
"""Only so that a failing test ends."""
LIMITS = TenantLimits()
KEYS = TenantTable([Tenant(name="acme", limits=LIMITS, keys=("sha256:" + "0" * 64,))], LIMITS)
PEM = Path(__file__)


def config(**settings: object) -> ServerConfig:
    return ServerConfig(**{"model": "m", "listen": "0.0.0.0:50051"} | settings)


def test_a_server_on_loopback_loads_from_any_folder_unless_sources_are_named() -> None:
    local = {"listen": "127.0.0.1:1"}
    assert _source_policy(config(**local)).roots == (Path("/"),)
    policy = _source_policy(config(**local, allow_source=("/srv", "hf://owner")))
    assert (policy.roots, policy.urls) == ((Path("/srv"),), ("hf://owner",))


def test_an_adapter_may_be_as_large_as_the_memory_allows() -> None:
    assert _source_policy(config()).max_bytes == max_adapter_bytes()


def test_other_servers_load_only_from_what_is_named(tmp_path: Path) -> None:
    assert _source_policy(config()).roots == ()
    named = config(adapters=tmp_path, lazy_source="s3://bucket/{name}/last", allow_source=("/srv",))
    policy = _source_policy(named)
    assert (policy.roots, policy.urls) == ((Path("/srv"), tmp_path), ("s3://bucket",))
    assert _source_policy(config(lazy_source="/lazy/{name}")).roots == (Path("/lazy"),)


class ChangedAtTheStart:
    """A lifecycle; a folder appears while it loads those that are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded = threading.Event()

    def start(self, folder: Path) -> None:
        write_folder(folder / "late", b"tensors")

    def load_folder(self, folder: Path) -> None:
        if folder.name == "late":
            self.loaded.set()


def test_a_folder_that_appears_while_the_others_are_loaded_is_seen(tmp_path: Path) -> None:
    lifecycle = ChangedAtTheStart(tmp_path)
    with ExitStack() as stack:
        _load_adapters(config(adapters=tmp_path, watch=True), lifecycle, stack)
        assert lifecycle.loaded.wait(HANG_S)
    assert not any(thread.name == "turret-watch" for thread in threading.enumerate())


def test_folders_are_watched_only_on_demand(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _load_adapters(config(adapters=tmp_path), ChangedAtTheStart(tmp_path), stack)
        assert (tmp_path / "late").exists()
        assert not any(thread.name == "turret-watch" for thread in threading.enumerate())


def test_settings_reach_the_parts_which_are_closed_in_reverse(
    base_of: Callable[[str], Path], quantised_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    for part, method in (
        (Engine, "stop"), (CleanupWorker, "close"), (ModelRunner, "close"), (AdapterLibrary, "close"),
        (UsageLog, "close"),
    ):  # fmt: skip
        close = getattr(part, method)

        def recorded(self: object, close: Callable[[object], None] = close) -> None:
            closed.append(type(self).__name__)
            close(self)

        monkeypatch.setattr(part, method, recorded)
    prepared: list[object] = []
    monkeypatch.setattr(ModelRunner, "check", lambda _: prepared.append("check"))
    monkeypatch.setattr(ModelRunner, "warm_up", lambda _, max_sequences: prepared.append(max_sequences))
    settings = ServerConfig(
        model=str(base_of("llama")),
        device="cpu",
        dtype="float32",
        memory="1MiB",
        host_memory="3MiB",
        store=tmp_path / "store",
        store_size="5MiB",
        cache=quantised_cache,
        max_batch_tokens=33,
        max_batch_requests=3,
        max_step_seconds=0.125,
        usage_log=tmp_path / "usage.jsonl",
    )
    with assemble(settings) as parts:
        limits = parts.engine._scheduler.limits
        assert (limits.max_batch_tokens, limits.max_batch_requests) == (33, 3)
        assert limits.max_step_seconds == 0.125
        assert parts.arena.num_pages == 2**20 // parts.arena.page_bytes
        assert parts.registry._memory.max_bytes == 3 * 2**20
        assert parts.lifecycle._library.store.max_bytes == 5 * 2**20
        assert not closed
        assert prepared == ["check", 3]
    assert closed == ["Engine", "CleanupWorker", "ModelRunner", "AdapterLibrary", "UsageLog"]


ACME = Caller(tenant=Tenant(name="acme", limits=LIMITS, admin=True), request_id="request-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def sampler() -> RecordingSampler:
    return RecordingSampler()


@pytest.fixture(scope="module")
def parts(
    base_of: Callable[[str], Path],
    adapter_of: Callable[..., Path],
    quantised_cache: Path,
    folder: Path,
    sampler: RecordingSampler,
) -> Iterator[Parts]:
    """A server with every setting that connects its parts."""
    base = base_of("llama")
    shutil.copytree(adapter_of("llama", "lora"), folder / "adapters" / "pinned")
    shutil.copytree(adapter_of("llama", "prompt"), folder / "lazy" / "later")
    (folder / "tenants.toml").write_text(
        f"""
        [tenants.acme]
        keys = ["{digest_of("key")}"]
        [tenants.tiny]
        max_device_bytes = 1
        """
    )
    settings = ServerConfig(
        model=f"{base}/../{base.name}",
        device="cpu",
        dtype="float32",
        memory="8MiB",
        cache=quantised_cache,
        store=folder / "store",
        adapters=folder / "adapters",
        pin=("pinned",),
        lazy_source=f"{folder}/lazy/{{name}}",
        usage_log=folder / "usage.jsonl",
        tenants=folder / "tenants.toml",
    )
    with assemble(settings, sampler) as parts:
        yield parts


async def generate(parts: Parts, prompt: list[int], *adapters: str) -> list[Chunk]:
    request = GenerationRequest(
        prompt=prompt, adapters=[AdapterRef(name=name) for name in adapters], max_tokens=2
    )
    async with aclosing(parts.generation.generate(request, ACME)) as chunks:
        return [chunk async for chunk in chunks]


async def test_a_request_reaches_the_sampler_the_metrics_and_the_usage_log(
    parts: Parts, folder: Path, sampler: RecordingSampler
) -> None:
    sampler.logits.clear()
    await generate(parts, [5, 6, 7], "pinned")
    assert len(sampler.logits) == 1
    [entry] = [json.loads(line) for line in (folder / "usage.jsonl").read_text().splitlines()]
    assert (entry["tenant"], entry["adapters"], entry["prompt_tokens"]) == ("acme", ["pinned"], 3)

    def sample(name: str, **labels: str) -> float | None:
        return parts.metrics.get_sample_value(name, labels)

    assert sample("turret_requests_total", outcome="ok") == 1
    assert sample("turret_usage_tokens_total", tenant="acme", adapter="pinned", kind="generated") == 2
    assert sample("turret_adapters", state="resident") == 1
    assert sample("turret_arena_page_bytes") == parts.arena.page_bytes
    assert sample("turret_batch_requests_count")
    assert sample("turret_host_adapter_bytes")
    assert sample("turret_adapter_downloaded_bytes_total")


async def test_a_request_may_name_an_adapter_that_is_loaded_on_demand(parts: Parts) -> None:
    [*_, last] = await generate(parts, [5], "later")
    assert last.revision == parts.registry.status("later").spec.revision
    with pytest.raises(AdapterNotFoundError):
        await generate(parts, [5], "never")


def test_adapters_to_pin_are_pinned_and_all_are_written_down_for_the_base_model(
    parts: Parts, base_of: Callable[[str], Path], folder: Path
) -> None:
    until(lambda: not parts.lifecycle.missing_pins())
    assert parts.engine.is_resident(parts.registry.status("pinned").spec.revision)
    with closing(Names(folder / "store" / "names.sqlite", str(base_of("llama").resolve()))) as names:
        assert "pinned" in names.current()


async def test_requests_are_checked_against_the_model(parts: Parts) -> None:
    with pytest.raises(PromptTooLongError) as long:
        await generate(parts, [5] * parts.loaded.context.tokens)
    assert long.value.metadata["max_context"] == str(parts.loaded.context.tokens)
    with pytest.raises(InvalidRequestError, match=f"below {parts.loaded.vocab_size}, the size"):
        await generate(parts, [parts.loaded.vocab_size])
    with pytest.raises(InvalidRequestError, match=f"whole blocks of {parts.arena.block_size} tokens"):
        await parts.prompts.pin(PinRequest(name="short", prompt=[5]), ACME)


async def test_an_adapter_that_is_described_has_the_bytes_of_its_pages(parts: Parts) -> None:
    info = await parts.administration.get("pinned", ACME)
    num_pages = parts.engine.num_pages(parts.registry.status("pinned").spec)
    assert info.arena_bytes == num_pages * parts.arena.page_bytes > 0


def test_a_tenants_limit_of_device_memory_holds_for_its_adapters(parts: Parts) -> None:
    spec = parts.registry.status("pinned").spec
    parts.engine.check_adapter(spec, "acme")
    with pytest.raises(QuotaExceededError):
        parts.engine.check_adapter(spec, "tiny")


def test_the_tenants_file_is_watched_while_the_server_runs(parts: Parts, folder: Path) -> None:
    path = folder / "tenants.toml"
    path.write_text(path.read_text().replace("= 1\n", "= 1000000000\n"))
    until(lambda: parts.access.tenants.max_device_bytes("tiny") == 1000000000)
    parts.engine.check_adapter(parts.registry.status("pinned").spec, "tiny")


def test_the_log_says_how_much_fits(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        _log_capacity(config(), parts.loaded, parts.arena)
    pages, block = parts.arena.num_pages, parts.arena.block_size
    found = (
        f"m on cpu in float32; context of {parts.loaded.context.tokens} tokens; arena of 8 MiB: {pages} "
        f"pages of {block} tokens; room for {pages * block} tokens"
    )
    assert found in caplog.text


def test_bytes_of_device_memory_are_whole_pages() -> None:
    tenants = SimpleNamespace(max_device_bytes={"acme": 299, "page": 100}.get)
    limits = [_max_adapter_pages(tenants, 100, tenant) for tenant in ("acme", "page", "anybody")]
    assert limits == [2, 1, None]


def test_an_arena_without_a_page_is_refused_and_the_store_is_free(
    base_of: Callable[[str], Path], quantised_cache: Path, tmp_path: Path
) -> None:
    settings = ServerConfig(
        model=str(base_of("llama")),
        device="cpu",
        dtype="float32",
        memory="1k",
        cache=quantised_cache,
        store=tmp_path,
    )
    with (
        pytest.raises(ConfigError, match="1k: 1024 bytes are less than one page"),
        assemble(settings),
    ):
        pass
    AdapterStore(tmp_path).close()


def test_a_store_without_a_size_has_no_limit_and_belongs_to_the_model_that_is_named(tmp_path: Path) -> None:
    settings = config(model="owner/model", store=tmp_path)
    loaded = SimpleNamespace(model=None, ops=None, base=None, tokenizer=None)
    with closing(open_store(settings)) as store:
        assert store.max_bytes is None
        library = _make_library(settings, store, loaded)
        assert library.names._base == "owner/model"
        library.names.close()


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_every_configuration_says_which_token_is_padding_or_that_none_is(family: str) -> None:
    config = (FAMILIES | ENCODERS)[family]
    vectors = SimpleNamespace(pooling=None, normalize=True, max_tokens=None, refusal="")
    loaded = SimpleNamespace(base=None, encoder=None, model=SimpleNamespace(config=config), vectors=vectors)
    expected = getattr(getattr(config, "text_config", config), "pad_token_id", None)
    assert _pooling_model(loaded).pad_token_id == expected


def access(tmp_path: Path, **parts: object) -> Access:
    path = tmp_path / "tenants.toml"
    path.write_text(f'[tenants.acme]\nkeys = ["{digest_of("key")}"]')
    return Access(**{"tenants": TenantsFile(path, LIMITS), "auth_hook": None, "tls": None} | parts)


@asynccontextmanager
async def opened(access: Access, client: grpc.ChannelCredentials | None = None) -> AsyncIterator[Any]:
    """A server without a model: its metrics, and a call to it."""
    prompts = SimpleNamespace(list=lambda _: [])
    parts = SimpleNamespace(
        access=access,
        metrics=CollectorRegistry(),
        generation=None,
        model=None,
        tokens=None,
        prompts=prompts,
        pooling=None,
        administration=None,
    )
    server, _ = make_doors(parts, config(http=None))
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    channel = grpc.aio.secure_channel(address, client) if client else grpc.aio.insecure_channel(address)
    async with channel:
        method = prompts_pb2_grpc.PromptServiceStub(channel).ListPinnedPrompts
        yield parts.metrics, lambda **options: method(prompts_pb2.ListPinnedPromptsRequest(), **options)
    await server.stop(0)


async def test_calls_are_authenticated_and_refusals_counted(tmp_path: Path) -> None:
    async with opened(access(tmp_path)) as (metrics, call):
        await call(metadata=(("authorization", "Bearer key"),))
        with pytest.raises(grpc.aio.AioRpcError):
            await call()
        assert metrics.get_sample_value("turret_failed_authentications_total", {"reason": "no_key"}) == 1


async def test_the_hook_is_asked_first(tmp_path: Path) -> None:
    asked = []

    async def ask(metadata: object, identities: object) -> str:
        asked.append((metadata, identities))
        return "acme"

    async with opened(access(tmp_path, auth_hook=SimpleNamespace(ask=ask))) as (_, call):
        await call()
    assert len(asked) == 1


async def test_with_certificates_connections_are_encrypted(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pem = tmp_path / "server.pem"
    tls = load_access(config(listen="127.0.0.1:1", tls_cert=pem, tls_key=pem)).tls
    trusting = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
    key = (("authorization", "Bearer key"),)
    async with opened(access(tmp_path, tls=tls), trusting) as (_, call):
        await call(metadata=key)
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        load_access(config(tls_cert=pem, tls_key=pem, tls_client_ca=tmp_path / "missing.pem"))


def test_a_trace_needs_opentelemetry_and_other_missing_modules_are_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, tracing = config(otel=True), "turret_server.observability.tracing"
    monkeypatch.delitem(sys.modules, tracing, raising=False)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "opentelemetry", None)
        missing = pytest.raises(ConfigError, match="--otel: OpenTelemetry is not installed")
        with missing, open_request_log(settings, CollectorRegistry()):
            pass
    monkeypatch.setitem(sys.modules, tracing, None)
    with pytest.raises(ModuleNotFoundError), open_request_log(settings, CollectorRegistry()):
        pass


async def test_requests_are_traced_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []

    @contextmanager
    def tracing(model: str) -> Iterator[Callable[[object], None]]:
        yield traced.append
        traced.append(f"{model} ends")

    module = SimpleNamespace(tracing=tracing)
    monkeypatch.setitem(sys.modules, "turret_server.observability.tracing", module)
    for otel, expected in ((False, 0), (True, 1)):
        with open_request_log(config(otel=otel), CollectorRegistry()) as log:
            async with log.follow(ACME) as record:
                await log.finish(record, "stop")
            assert len(traced) == expected
    assert traced[1:] == ["m ends"]


def test_a_step_must_hold_the_context_of_an_encoder(tmp_path, quantised_cache):
    base = save_base("bert", tmp_path / "bert")
    config = ServerConfig(
        model=str(base),
        max_batch_tokens=100,
        memory="8MiB",
        cache=quantised_cache,
        store=tmp_path / "store",
        device="cpu",
    )
    with (
        pytest.raises(ConfigError, match=r"--max-batch-tokens 100: expected at least .* 128 tokens"),
        assemble(config),
    ):
        pass
    with assemble(replace(config, max_context=100)):
        pass
