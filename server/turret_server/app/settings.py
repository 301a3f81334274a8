"""What of a server's settings cannot be, told before anything is loaded."""

from __future__ import annotations

from turret_server.app.memory import parse_memory
from turret_server.config import ServerConfig
from turret_server.errors import ConfigError, InvalidRequestError
from turret_server.lifecycle.lazy import NAME_MARK
from turret_server.rpc.server import split_address
from turret_server.tenancy.tenants import check_name


def check_config(config: ServerConfig) -> None:
    """Look at every setting by itself.

    Raises:
        ConfigError: one cannot be.
    """
    _check_numbers(config)
    _check_adapters(config)
    split_address(config.listen)
    if config.metrics:
        split_address(config.metrics)


def _check_numbers(config: ServerConfig) -> None:
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


def _check_adapters(config: ServerConfig) -> None:
    lazy = config.lazy_source
    if lazy is not None and not (lazy.count(NAME_MARK) == 1 and (lazy.startswith("/") or "://" in lazy)):
        raise ConfigError(
            f"--lazy-source {lazy}: expected an absolute path or a URL with {NAME_MARK} in it once, such as "
            f"hf://owner/{NAME_MARK}"
        )
    for name in config.pin:
        try:
            check_name(name)
        except InvalidRequestError as error:
            raise ConfigError(f"--pin {name}: {error}") from error
    if config.watch and not config.adapters:
        raise ConfigError("--watch: there is no folder to watch; name one with --adapters")
    if config.adapters and not config.adapters.is_dir():
        raise ConfigError(f"--adapters {config.adapters}: there is no such folder")
