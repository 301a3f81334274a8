"""How many adapters are loaded at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from turret_server.errors import TooManyCallsError

MAX_LOADS = 4
MAX_WAITING = 64

_Result = TypeVar("_Result")


class LoadQueue:
    """Runs loads in a few threads of their own: slow ones keep nothing but one another waiting."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_LOADS, "turret-load")
        self._num_calls = 0

    def start(self, load: Callable[[], _Result]) -> asyncio.Future[_Result]:
        """Runs a load when it is its turn. Cancelled before, it is not begun; once begun, it runs to its end.

        Raises:
            TooManyCallsError: as many wait as may.
        """
        if self._num_calls >= MAX_LOADS + MAX_WAITING:
            raise TooManyCallsError(
                f"{MAX_LOADS} adapters are being loaded and {MAX_WAITING} wait; try again later",
                limit=MAX_LOADS + MAX_WAITING,
            )
        self._num_calls += 1
        running = self._threads.submit(load)
        running.add_done_callback(partial(self._ended, asyncio.get_running_loop()))
        return asyncio.wrap_future(running)

    def _ended(self, loop: asyncio.AbstractEventLoop, _: object) -> None:
        # A loop that has closed starts no more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        self._num_calls -= 1
