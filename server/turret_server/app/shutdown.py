"""The end of a server: what runs may finish, what does not is told, and nothing is left half done."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from turret_server.engine.loop import Engine
from turret_server.lifecycle.watches import AdapterWatches
from turret_server.rpc.server import RpcServer

log = logging.getLogger(__name__)

# How long calls that are ended have to say so, whose clients may take their time to listen.
_LAST_WORDS_SECONDS = 2.0


class Shutdown:
    """Waits for a signal or the engine's failure, and ends the server. A second signal ends the grace."""

    def __init__(self, server: RpcServer, engine: Engine, watches: AdapterWatches) -> None:
        self._server = server
        self._engine = engine
        self._watches = watches
        self._wanted = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signal_number, self._signalled)

        def failed() -> None:
            loop.call_soon_threadsafe(self._wanted.set)

        engine.on_failure = failed
        if engine.failed:  # before anybody listened
            self._wanted.set()

    async def wait(self) -> None:
        """Until the server is to end."""
        await self._wanted.wait()

    def _signalled(self) -> None:
        if self._wanted.is_set():
            self._server.calls.hurry()
        self._wanted.set()

    async def drain(self, grace: float, interrupt_loads: Callable[[], None]) -> None:
        """Refuse what is new, let what runs finish for `grace` seconds, and end the rest."""
        calls = self._server.calls
        await self._server.drain()
        self._watches.close()
        if not self._engine.failed:
            log.info("stopping: %d calls that run have %g s to finish", calls.num_running, grace)
            await calls.wait(grace)
        if calls.num_running:
            log.warning("%d calls are not done, and end now", calls.num_running)
        # It tells its requests, which takes no longer than a step.
        await asyncio.to_thread(self._engine.stop)
        await calls.wait(_LAST_WORDS_SECONDS)
        calls.end()
        interrupt_loads()
        await calls.wait(_LAST_WORDS_SECONDS)
        await self._server.stop(_LAST_WORDS_SECONDS)
