"""A server inside this process, and its client: for notebooks and batches without a server."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from turret_client import Client
from turret_client._channel import call_metadata
from turret_server.app.assembly import assemble
from turret_server.config import SETTINGS, ServerConfig


class LocalClient(Client):
    """Loads a model and answers in this process, without a socket. Its methods are those of `Client`.

        with LocalClient(model="HuggingFaceTB/SmolLM2-135M-Instruct") as client:
            print(client.chat([{"role": "user", "content": "What is the capital of France?"}]).text)

    Threads may share it, and their requests are computed in one batch. Without a setting `store`, adapters
    are forgotten when it is closed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tenant: str | None = None,
        api_key: str | None = None,
        **settings: Any,
    ) -> None:
        """Returns when the model is loaded.

        Args:
            model: Folder, or name on the Hugging Face hub.
            tenant: Tenant of every call; None is that of the key, or "default".
            api_key: API key of every call, if the setting `tenants` names a file with keys.
            **settings: Those of `turret serve`, with underscores: `memory="2GiB"`; see `ServerConfig`.
                A folder is a text or a path, and None is a setting that is off.

        Raises:
            ConfigError: A setting is invalid, or does not fit this machine.
            UnsupportedModelError: The model cannot be served.
        """
        stack = ExitStack()
        try:
            if "store" not in settings:
                settings["store"] = Path(stack.enter_context(TemporaryDirectory(prefix="turret-")))
            config = ServerConfig(model=str(model), **{"metrics": None, "http": None} | _converted(settings))
            parts = stack.enter_context(assemble(config))
            from turret_server.app.doors import make_channel  # noqa: PLC0415 -- torch and the model's libraries

            channel = make_channel(parts, stack.enter_context(_running_loop()))
        except BaseException:
            stack.close()
            raise
        self._use(channel, "this process", call_metadata(tenant, api_key))
        # Also for a program that ends without `close`: later, when its threads stand still, nothing ends.
        self._free = weakref.finalize(self, stack.close)

    def close(self) -> None:
        """Cancels running calls, and frees the model."""
        super().close()
        self._free()


def _converted(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the types of `ServerConfig`; unknown ones are its error."""
    found = dict(settings)
    for setting in SETTINGS:
        value = settings.get(setting.name)
        if value is not None and not isinstance(value, Path):
            found[setting.name] = setting.convert(value)  # as in a file of settings
    return found


@contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own; when the block ends, what still runs on it has been cancelled."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="turret-local", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
