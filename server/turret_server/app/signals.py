"""SIGINT and SIGTERM, from before the server's libraries are imported until its parts are closed."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

log = logging.getLogger(__name__)


class StopSignals:
    """Handles SIGINT and SIGTERM in the main thread, alike. The effect depends on the phase.

    1. While the server is built, SystemExit(0) is raised where the main thread stands, so that what has been
       constructed is closed.
    2. Within `on_event_loop`, the callback is called on the loop: also for a signal of the first phase, whose
       SystemExit a library may have caught.
    3. After that, while the parts are closed, nothing: closing goes on to its end.

    The handler is the process's own for the whole time: an event loop's would give way to the default, which
    kills the process, as soon as the loop is closed; and in a container, where the server is process 1, the
    kernel discards a signal that has no handler.
    """

    def __init__(self) -> None:
        self._deliver: Callable[[], object] = self._abort_start
        self._aborted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals until the block ends. Call it from the main thread."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def on_event_loop(self, callback: Callable[[], None]) -> Iterator[None]:
        """Call `callback` on the running loop for every signal; ignore signals once the block has ended."""
        loop = asyncio.get_running_loop()
        self._deliver = partial(loop.call_soon_threadsafe, callback)
        if self._aborted:
            self._deliver()
        try:
            yield
        finally:
            self._deliver = _ignore

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._deliver()

    def _abort_start(self) -> None:
        self._aborted = True
        log.info("stopping before the server is ready")
        raise SystemExit(0)


def _ignore() -> None:
    """The server is closing already."""
