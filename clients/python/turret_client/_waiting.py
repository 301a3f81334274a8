"""Waits for responses, which Ctrl-C may interrupt at any moment.

While gRPC waits for a response, it takes and releases locks of the call. A KeyboardInterrupt in between would
leave them locked, and the channel's own thread, which needs them, would never answer a call again. So another
thread waits for gRPC, and the caller waits for that thread.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import grpc

_Result = TypeVar("_Result")
_SIGNAL_CHECK_SECONDS = 0.2
"""A wait does not notice a signal that arrives just before it; gRPC's own waits are as long as this."""


def responses_of(call: grpc.CallIterator[_Result]) -> Generator[_Result]:
    """The responses of a call, each of which is read when it is asked for.

    Raises:
        grpc.RpcError: The call failed.
    """
    return _results(partial(next, call))


def result_of(call: grpc.CallFuture[_Result]) -> _Result:
    """The response of a call that has one.

    Raises:
        grpc.RpcError: The call failed.
    """
    return next(_results(call.result))


def _results(wait: Callable[[], _Result]) -> Generator[_Result]:
    """What `wait` returns in another thread, where it is called for each result, until it ends by an
    exception, which is raised here.
    """
    # Those of `queue.SimpleQueue` are the waits that an exception leaves as they were.
    wanted: queue.SimpleQueue[Callable[[], _Result] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while function := wanted.get():
            try:
                results.put((function(), None))
            except BaseException as error:  # noqa: BLE001 -- raised where the result is waited for
                results.put((None, error))
                return

    try:
        threading.Thread(target=work, name="turret-call", daemon=True).start()
        while True:
            wanted.put(wait)
            result, error = _next_of(results)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield cast("_Result", result)
    finally:
        error = None  # it refers to this frame, which would keep it and the call
        wanted.put(None)


def _next_of(results: queue.SimpleQueue[_Result]) -> _Result:
    while True:
        with suppress(queue.Empty):
            return results.get(timeout=_SIGNAL_CHECK_SECONDS)
