"""Readiness: the base model and every pinned adapter are in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

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
