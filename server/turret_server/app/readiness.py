"""When a server is ready: its base model is, and so is every adapter that is to stay in the arena."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from turret_server.rpc.server import RpcServer

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


async def report_ready(server: RpcServer, missing: Callable[[], list[str]]) -> None:
    """Report that the server serves once nothing is missing. From then on that stays so: an adapter that is
    replaced is brought beside the requests that run, as every other.
    """
    told: list[str] = []
    while names := await asyncio.to_thread(missing):
        if names != told:
            log.info("not ready: pinned adapters that are not in the arena: %s", ", ".join(names))
            told = names
        await asyncio.sleep(_LOOK_SECONDS)
    await server.ready()
    log.info("ready")
