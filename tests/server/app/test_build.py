"""Whom a server lets in where others than this machine reach it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.adapter_files import write_folder
from turret_adapters.library import AdapterLibrary
from turret_server.app.build import (
    _check_access,
    _load_adapters,
    _source_policy,
    assemble,
    load_access,
)
from turret_server.config import ServerConfig
from turret_server.engine.admission import TenantLimits
from turret_server.engine.loop import Engine
from turret_server.errors import ConfigError
from turret_server.lifecycle.cleanup import CleanupWorker
from turret_server.model.runner import ModelRunner
from turret_server.observability.usage_log import UsageLog
from turret_server.tenancy.tenants import Tenant, TenantTable

HANG_S = 60
"""Only so that a failing test ends."""
LIMITS = TenantLimits()
OPEN = TenantTable([], LIMITS)
KEYS = TenantTable([Tenant(name="acme", limits=LIMITS, keys=("sha256:" + "0" * 64,))], LIMITS)
PEM = Path(__file__)


def config(**settings: object) -> ServerConfig:
    return ServerConfig(**{"model": "m", "listen": "0.0.0.0:50051"} | settings)


def test_an_open_server_is_reached_from_elsewhere_only_if_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        _check_access(config(), OPEN)
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        _check_access(config(tls_cert=PEM, tls_key=PEM), OPEN)
    _check_access(config(allow_unauthenticated=True), OPEN)
    _check_access(config(listen="127.0.0.1:50051"), OPEN)


def test_certificates_of_an_authority_are_enough_and_it_is_told_what_that_means(
    caplog: pytest.LogCaptureFixture,
) -> None:
    certified = config(tls_cert=PEM, tls_key=PEM, tls_client_ca=PEM)
    with caplog.at_level(logging.WARNING, "turret_server.app.build"):
        _check_access(certified, OPEN)
    [warning] = caplog.messages
    assert f"every client with a certificate signed by {PEM} has every permission" in warning
    caplog.clear()
    _check_access(certified, KEYS)
    assert not caplog.messages


def test_a_server_on_loopback_loads_from_any_folder_unless_sources_are_named() -> None:
    local = {"listen": "127.0.0.1:1"}
    assert _source_policy(config(**local)).roots == (Path("/"),)
    policy = _source_policy(config(**local, allow_source=("/srv", "hf://owner")))
    assert (policy.roots, policy.urls) == ((Path("/srv"),), ("hf://owner",))


def test_other_servers_load_only_from_what_is_named(tmp_path: Path) -> None:
    assert _source_policy(config()).roots == ()
    named = config(adapters=tmp_path, lazy_source="s3://bucket/{name}/last", allow_source=("/srv",))
    policy = _source_policy(named)
    assert (policy.roots, policy.urls) == ((Path("/srv"), tmp_path), ("s3://bucket",))
    assert _source_policy(config(lazy_source="/lazy/{name}")).roots == (Path("/lazy"),)


def test_identities_need_client_certificates() -> None:
    tenant = Tenant(name="acme", limits=LIMITS, identities=("acme.example.com",))
    table = TenantTable([tenant], LIMITS)
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        _check_access(config(listen="127.0.0.1:1"), table)


def test_an_unencrypted_server_that_others_reach_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    _check_access(config(listen="127.0.0.1:1"), KEYS)
    assert not caplog.messages
    _check_access(config(), KEYS)
    assert "unencrypted" in caplog.messages[0]


def test_queue_limits_without_a_tenants_file_are_the_servers() -> None:
    access = load_access(config(max_queue=3, max_queue_tokens=5, allow_unauthenticated=True))
    limits = access.tenants.limits("anybody")
    assert (limits.max_queued_requests, limits.max_queued_tokens) == (3, 5)
    assert (access.auth_hook, access.tls) == (None, None)


def test_an_authentication_hook_closes_the_server() -> None:
    access = load_access(config(auth_hook="os.path:basename"))
    assert access.auth_hook is not None
    assert not access.tenants.table.is_open


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
    assert closed == ["Engine", "CleanupWorker", "ModelRunner", "AdapterLibrary", "UsageLog"]
