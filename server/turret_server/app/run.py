"""Runs a server: opens its ports, reports readiness, and shuts it down in order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from turret_server.app.assembly import assemble
from turret_server.app.readiness import report_ready, watch_steps
from turret_server.app.signals import StopSignals
from turret_server.config import ServerConfig, split_address
from turret_server.engine.watchdog import Pace, Watchdog
from turret_server.errors import ConfigError, GenerationFailedError
from turret_server.model.checkpoint import check_path
from turret_server.observability.metrics_server import PATH, MetricsServer

if TYPE_CHECKING:
    from turret_server.app.build import Parts
    from turret_server.rpc.server import RpcServer
    from turret_server.web.server import WebServer

log = logging.getLogger(__name__)

# How long a call that is ended has to send its status; its client may be slow to read it.
_STATUS_SECONDS = 2.0
# Between two looks at an engine that stops, which takes no longer than a step.
_STEP_SECONDS = 1.0


def serve(config: ServerConfig, signals: StopSignals) -> None:
    """Serve until SIGINT or SIGTERM. `signals` are handled already.

    Raises:
        ConfigError: a setting is invalid, or does not fit this machine.
        UnsupportedModelError: the model cannot be served.
        GenerationFailedError: the engine failed; a new process may do better.
    """
    # Before the model, which takes minutes to load.
    check_path(config.model)
    _check_port("--listen", config.listen)
    for flag, address in (("--http", config.http), ("--metrics", config.metrics)):
        if address:
            _check_port(flag, address)
    with assemble(config) as parts, ExitStack() as stack:
        if config.metrics:
            stack.callback(_serve_metrics(config.metrics, parts.metrics).close)
        asyncio.run(_serve(config, parts, signals))
    log.info("stopped")


def _check_port(flag: str, address: str) -> None:
    """Check that the port can be opened.

    Raises:
        ConfigError: another program uses it, or this machine does not have the address.
    """
    host, port = split_address(address)
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise ConfigError(
            f"{flag} {address}: the port cannot be opened ({error.strerror}); stop the program that uses it, "
            "or choose another"
        ) from error


def _serve_metrics(address: str, registry: CollectorRegistry) -> MetricsServer:
    host, port = split_address(address)
    try:
        server = MetricsServer(host, port, registry)
    except OSError as error:
        raise ConfigError(
            f"--metrics {address}: {error.strerror}; choose another port, or none to switch metrics off"
        ) from error
    log.info("metrics on http://%s:%d%s", host, server.server_port, PATH)
    return server


async def _serve(config: ServerConfig, parts: Parts, signals: StopSignals) -> None:
    # torch and the model's libraries
    from turret_server.app.doors import make_doors  # noqa: PLC0415
    from turret_server.observability.metrics import WatchdogMetrics  # noqa: PLC0415

    server, web = make_doors(parts, config)
    watchdog = Watchdog(parts.engine.progress, config.max_step_seconds)
    shutdown = Shutdown(server, web, parts, watchdog)
    with signals.on_event_loop(shutdown.request):
        if web and config.http:
            port = await web.start(config.http)
            log.info("HTTP on %s://%s:%d", web.scheme, split_address(config.http)[0], port)
        port = await server.start(config.listen)
        log.info("serving on %s:%d", split_address(config.listen)[0], port)
        readiness = asyncio.create_task(report_ready(server.ready, parts.lifecycle.missing_pins))
        steps = asyncio.create_task(watch_steps(watchdog, server, WatchdogMetrics(parts.metrics)))
        await shutdown.requested.wait()
        readiness.cancel()
        has_ended = await shutdown.drain(config.grace)
        steps.cancel()
    if not has_ended:
        _abandon_engine()
    if parts.engine.failed:
        raise GenerationFailedError("the engine failed and its requests with it; the log says why")


def _abandon_engine() -> None:
    """End the process with the engine's thread in it: the memory in which it may still compute is not freed.
    What is on disk is complete.
    """
    log.critical("the engine hangs in a step and does not stop; the process ends without it")
    logging.shutdown()
    os._exit(1)


class Shutdown:
    """Ends the server on request, or when the engine fails. A second request ends the grace period."""

    def __init__(self, server: RpcServer, web: WebServer | None, parts: Parts, watchdog: Watchdog) -> None:
        self._server = server
        self._web = web
        self._parts = parts
        self._watchdog = watchdog
        self.requested = asyncio.Event()
        loop = asyncio.get_running_loop()

        def failed() -> None:
            loop.call_soon_threadsafe(self.requested.set)

        parts.engine.on_failure = failed
        if parts.engine.failed:  # before on_failure was set
            self.requested.set()

    def request(self) -> None:
        if self.requested.is_set():
            self._server.calls.skip_grace()
        self.requested.set()

    async def drain(self, grace: float) -> bool:
        """Refuse new calls, let running ones finish for `grace` seconds, and end the rest.

        Returns whether the engine has ended; it has not if it hangs.
        """
        engine, calls = self._parts.engine, self._server.calls
        await self._server.drain()
        self._parts.watches.close()
        if not engine.failed:
            log.info("stopping: %d running calls have %g s to finish", calls.num_running, grace)
            await calls.wait_grace(grace)
        if calls.num_running:
            log.warning("%d calls have not finished and are ended now", calls.num_running)
        # It sends every request its end.
        while not (has_ended := await asyncio.to_thread(engine.stop, _STEP_SECONDS)):
            if self._watchdog.pace is not Pace.NORMAL:
                engine.abandon()
                break
        await calls.wait(_STATUS_SECONDS)
        calls.end()
        self._parts.lifecycle.interrupt()
        await calls.wait(_STATUS_SECONDS)
        if self._web:
            await self._web.stop(_STATUS_SECONDS)
        await self._server.stop(_STATUS_SECONDS)
        return has_ended
