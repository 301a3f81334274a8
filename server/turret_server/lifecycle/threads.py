"""Work in threads that a call which ends early does not leave behind half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from functools import partial
from typing import TypeVar

_Result = TypeVar("_Result")


def _keep(_: object) -> None:
    """For what needs no undoing."""


async def to_its_end(
    call: Callable[[], _Result],
    *,
    undo: Callable[[_Result], None] = _keep,
    executor: Executor | None = None,
) -> _Result:
    """Runs a call in a thread and waits until it ends, even if the wait is cancelled.

    What it works on may be closed afterwards, and what it made for a call that is over is handed to `undo`.
    """
    # With the context, so that its log lines say whose call it is.
    inside = partial(copy_context().run, call)
    return await end_of(asyncio.get_running_loop().run_in_executor(executor, inside), undo)


async def end_of(future: asyncio.Future[_Result], undo: Callable[[_Result], None] = _keep) -> _Result:
    """As `to_its_end`, for what runs already."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    if not cancelled:
        return future.result()
    if not future.exception():
        undo(future.result())
    raise asyncio.CancelledError
