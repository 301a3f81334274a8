"""What a client may give as `model`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from turret_adapters.errors import AdapterNotFoundError
from turret_server.config import NAME
from turret_server.serving.request import AdapterRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """The base's name, and how the names of adapters are told from it. `max_context` is in tokens."""

    base: str
    max_context: int
    created: int = field(default_factory=lambda: int(time.time()))

    def adapters_of(self, model: str | None) -> tuple[AdapterRef, ...]:
        """The adapter that NAME, NAME@REVISION or BASE:NAME names; none for the base.

        Raises:
            AdapterNotFoundError: no adapter can have such a name.
        """
        if model is None or model == self.base:
            return ()
        name = model.removeprefix(f"{self.base}:")
        if not NAME.fullmatch(name.partition("@")[0]):
            raise AdapterNotFoundError(
                f"no model or adapter has the name {model[:200]!r}; the base is {self.base!r}, and "
                "/v1/models lists all"
            )
        return (AdapterRef(name=name),)
