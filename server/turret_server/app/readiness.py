"""Readiness and liveness: the base model and every pinned adapter are in memory, and steps end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from turret_server.engine.watchdog import Pace, Watchdog

if TYPE_CHECKING:
    from turret_server.observability.metrics import WatchdogMetrics
    from turret_server.rpc.server import RpcServer

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


async def report_ready(ready: Callable[[], Awaitable[None]], missing_pins: Callable[[], list[str]]) -> None:
    """Call `ready` once no pinned adapter is missing. From then on the server stays ready: a replaced
    adapter is copied to the arena beside running requests, as every other.
    """
    logged: list[str] = []
    while True:
        try:
            names = await asyncio.to_thread(missing_pins)
        except Exception:
            log.exception("the check for pinned adapters failed and is repeated")
        else:
            if not names:
                break
            if names != logged:
                log.info("not ready: pinned adapters that are not in the arena: %s", ", ".join(names))
                logged = names
        await asyncio.sleep(POLL_SECONDS)
    await ready()
    log.info("ready")


async def watch_steps(watchdog: Watchdog, server: RpcServer, metrics: WatchdogMetrics) -> None:
    """Report the server as not ready while a step is late, and as not alive while it hangs."""
    pace = Pace.NORMAL
    while True:
        before, pace = pace, watchdog.look()
        metrics.age.set(watchdog.age)
        if pace is not before:
            _log_pace(pace, watchdog.age)
            metrics.late.inc(before is Pace.NORMAL)
            await server.judge_engine(responsive=pace is Pace.NORMAL, alive=pace is not Pace.HUNG)
        await asyncio.sleep(POLL_SECONDS)


def _log_pace(pace: Pace, age: float) -> None:
    match pace:
        case Pace.NORMAL:
            log.warning("the step that was late has ended; the server can be ready again")
        case Pace.LATE:
            log.error("a step has not ended for %.0f s; the server is not ready until it does", age)
        case Pace.HUNG:
            log.critical(
                "a step has not ended for %.0f s: the engine hangs, and liveness is NOT_SERVING; restart the "
                "server",
                age,
            )
