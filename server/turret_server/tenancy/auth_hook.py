"""Whose a call is, asked of the operator's own function: `--auth-hook MODULE:FUNCTION`.

The function takes the call's metadata, pairs of a lower-case name and a value, and the names in the client's
certificate, which is verified. It returns the name of a tenant, whose rights and limits are those of the
tenants file (without a table there it may use the base model alone), or None where keys and certificates are
to decide. To refuse a call it raises `turret_server.errors.UnauthenticatedError`, whose message the client is
told. It may be `async`; a plain function runs in a thread of its own. `deploy/introspection_hook.py` is one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from inspect import iscoroutinefunction
from typing import TypeAlias

from turret_server.config import NAME
from turret_server.errors import AuthUnavailableError, ConfigError, UnauthenticatedError

log = logging.getLogger(__name__)

HOOK_SECONDS = 5.0

# How many plain functions run at once. One that hangs holds its place; no thread holds up the server's end.
MAX_THREADS = 32

Metadata: TypeAlias = Sequence[tuple[str, str | bytes]]
Answer: TypeAlias = str | None
Hook: TypeAlias = Callable[[Metadata, Sequence[str]], Answer | Awaitable[Answer]]


class AuthHook:
    """`path` names the function in the log. All methods are called from one event loop."""

    def __init__(self, path: str, function: Hook) -> None:
        self._path = path
        self._function = function
        self._places = asyncio.Semaphore(MAX_THREADS)

    async def ask(self, metadata: Metadata, identities: Sequence[str]) -> Answer:
        """The name of the tenant whose call it is; None if the hook does not know.

        Raises:
            UnauthenticatedError: nobody's, as the hook says.
            AuthUnavailableError: the hook failed, took too long, or answered what cannot be a tenant's name.
        """
        try:
            async with asyncio.timeout(HOOK_SECONDS):
                found = await self._call(metadata, identities)
        except UnauthenticatedError:
            raise
        except TimeoutError:
            log.error("--auth-hook %s: no answer in %g s", self._path, HOOK_SECONDS)  # noqa: TRY400
            raise _unavailable() from None
        except (Exception, SystemExit):
            log.exception("--auth-hook %s failed", self._path)
            raise _unavailable() from None
        if found is not None and not (isinstance(found, str) and NAME.fullmatch(found)):
            log.error("--auth-hook %s: expected a tenant's name or None, found %.100r", self._path, found)
            raise _unavailable()
        return found

    async def _call(self, metadata: Metadata, identities: Sequence[str]) -> object:
        if iscoroutinefunction(self._function):
            return await self._function(metadata, identities)
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        answer: Future[object] = Future()
        answer.set_running_or_notify_cancel()

        def run() -> None:
            try:
                answer.set_result(self._function(metadata, identities))
            except BaseException as error:  # noqa: BLE001 (told to whoever waits)
                answer.set_exception(error)
            finally:
                # A loop that has closed asks no more.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._places.release)

        threading.Thread(target=run, name="turret-auth-hook", daemon=True).start()
        return await asyncio.wrap_future(answer)


def load_hook(path: str) -> AuthHook:
    """The function that MODULE:FUNCTION names; the module is installed, or on PYTHONPATH.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"--auth-hook {path}: expected MODULE:FUNCTION, such as my_auth:tenant_of")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f"--auth-hook {path}: {type(error).__name__}: {error}; the module must be installed, or on "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"--auth-hook {path}: expected a function, found {function!r}")
    return AuthHook(path, function)


def _unavailable() -> AuthUnavailableError:
    return AuthUnavailableError("whose call this is could not be found out; try again later")
