"""Where the records of requests go: what a server's settings say of usage log and traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

from prometheus_client import CollectorRegistry

from turret_server.config import ServerConfig
from turret_server.errors import ConfigError
from turret_server.observability.metrics import RequestMetrics
from turret_server.observability.request_log import RequestRecord, RequestRecords
from turret_server.observability.usage_log import UsageLog


@contextmanager
def request_records(config: ServerConfig, registry: CollectorRegistry) -> Iterator[RequestRecords]:
    """Keep records until the block ends, and then write and send what is left.

    Raises:
        ConfigError: the usage log cannot be written, or traces are wanted of a server that cannot make any.
    """
    with ExitStack() as stack:
        usage_log = stack.enter_context(closing(UsageLog(config.usage_log))) if config.usage_log else None
        on_end = _tracer(config, stack) if config.otel else None
        yield RequestRecords(RequestMetrics(registry), usage_log, on_end)


def _tracer(config: ServerConfig, stack: ExitStack) -> Callable[[RequestRecord], None]:
    try:
        from turret_server.observability.tracing import tracing  # noqa: PLC0415 -- only where it is wanted
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            '--otel: OpenTelemetry is not installed; install it with: pip install "turret[otel]"'
        ) from error
    return stack.enter_context(tracing(config.model))
