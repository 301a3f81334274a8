"""Authentication by a function of the operator: `--auth-hook MODULE:FUNCTION`.

The function gets the call's metadata, pairs of a lower-case name and a value, and the names in the verified
client certificate. It returns the name of a tenant, whose permissions and limits are those of the tenants
file (a tenant without a table there may use the base model only), or None to let keys and certificates
decide. To refuse a call it raises `turret_server.errors.UnauthenticatedError`, whose message goes to the
client. It may be `async`; a plain function runs in a thread of its own. `deploy/introspection_hook.py` is an
example.
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

# Plain functions that run at once. One that hangs keeps its slot; daemon threads do not block the shutdown.
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
        """The name of the tenant that makes the call; None if the hook does not decide.

        Raises:
            UnauthenticatedError: the hook refuses the call.
            AuthUnavailableError: the hook failed, took too long, or returned an invalid name.
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
            except BaseException as error:  # noqa: BLE001 (raised where the answer is awaited)
                answer.set_exception(error)
            finally:
                # The loop may be closed by now.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._places.release)

        threading.Thread(target=run, name="turret-auth-hook", daemon=True).start()
        return await asyncio.wrap_future(answer)


def load_hook(path: str) -> AuthHook:
    """Import the function that MODULE:FUNCTION names.

    Raises:
        ConfigError: it does not exist.
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
    return AuthUnavailableError("the authentication hook failed; try again later")
