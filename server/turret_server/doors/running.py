"""The calls that run, and how they end when the server shuts down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from turret_server.errors import ShuttingDownError


class RunningCalls:
    """Counts the calls of this project's services. While the server drains, new calls are refused and the
    remaining ones are ended. Used on one event loop.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._refusing = False
        self._ending = False
        self._skip_grace = False
        self._settled = asyncio.Event()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def refuse(self) -> None:
        """Refuse new calls from now on: clients go to another server at once."""
        self._refusing = True

    async def wait(self, seconds: float) -> None:
        """Wait until no call runs, at most `seconds`."""
        self._settled.clear()
        if self._running:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), seconds)

    async def wait_grace(self, seconds: float) -> None:
        """Wait like `wait`, but only until `skip_grace` is called, also if that was before."""
        if not self._skip_grace:
            await self.wait(seconds)

    def skip_grace(self) -> None:
        """End the grace period now, or before it begins."""
        self._skip_grace = True
        self._settled.set()

    def end(self) -> None:
        """End every remaining call with ShuttingDownError."""
        self._ending = True
        for task in self._running:
            task.cancel()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the call of the current task while the block runs.

        Raises:
            ShuttingDownError: the server drains, or ended the call.
        """
        if self._refusing:
            raise ShuttingDownError(
                "the server is shutting down; send the call to another server, or again later"
            )
        task = asyncio.current_task()
        assert task, "every call is a task of its own"
        self._running.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._ending:
                raise
            raise ShuttingDownError("the server stopped before the call was done; make it again") from None
        finally:
            self._running.discard(task)
            if not self._running:
                self._settled.set()
