"""Settings of a server, checked once here."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


def default_cache() -> Path:
    """Where quantised weights are kept: `$XDG_CACHE_HOME/turret`, or `~/.cache/turret`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turret"


def default_store() -> Path:
    """Where adapters are kept: `$XDG_DATA_HOME/turret`, or `~/.local/share/turret`."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "turret"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What `turret serve` is started with.

    `memory` is the arena's size in bytes ("2GiB"), a fraction of the device's free memory ("0.5"),
    or None for a default that suits the device; `host_memory` is what adapters may take of the host's,
    likewise; `store_size` is what they may take of the disk, None for as much as there is.
    `allow_sources` are folders, and beginnings of URLs, that adapters may be loaded from besides `adapters`;
    from `lazy_source`, with a name in the place of `{name}`, comes what a request names and nobody loaded.
    Where no tenant has a key or a certificate, anybody may use the server, and it listens to this machine
    alone unless `allow_unauthenticated`. `auth_hook`, MODULE:FUNCTION, is asked whose a call is.
    `tls_cert` and `tls_key` are PEM files; with `tls_client_ca`, clients must have certificates that it
    signed.
    What the names in `pin` serve stays in the arena, and the server is ready once it is there.
    Once the server is to stop, what runs has `grace` seconds to finish.
    Requests that have ended are written to `usage_log`, and traced over OTLP where `otel` says so.
    `max_queue` and `max_queue_tokens` hold for every tenant that the file `tenants` says nothing else of.
    """

    model: str
    adapters: Path | None = None
    watch: bool = False
    store: Path = field(default_factory=default_store)
    store_size: str | None = None
    allow_sources: tuple[str, ...] = ()
    lazy_source: str | None = None
    listen: str = "127.0.0.1:50051"
    metrics: str | None = "127.0.0.1:9090"
    device: str = "auto"
    dtype: str = "auto"
    memory: str | None = None
    host_memory: str | None = None
    max_batch_tokens: int = 512
    max_batch_requests: int = 64
    max_step_seconds: float = 0.5
    max_queue: int = 1024
    max_queue_tokens: int = 2**20
    tenants: Path | None = None
    auth_hook: str | None = None
    allow_unauthenticated: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    pin: tuple[str, ...] = ()
    grace: float = 30.0
    cache: Path = field(default_factory=default_cache)
    log_level: str = "info"
    log_format: Literal["human", "json"] = "human"
    usage_log: Path | None = None
    otel: bool = False
