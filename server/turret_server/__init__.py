"""An inference server: one frozen NF4 base model, and adapters for it mixed in one batch."""

import logging
from typing import Any

# Its warning that an optional kernel was not found concerns nobody here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """`LocalClient`, imported with torch only where it is used."""
    if name == "LocalClient":
        from turret_server.app.local import LocalClient  # noqa: PLC0415

        return LocalClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
