"""Whether the server can take requests, as every door reports it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Health:
    """`is_ready`: the model and pinned adapters are in memory, and the server does not drain. A step that is
    late makes the engine unresponsive; one that hangs means that the process should be restarted.
    """

    is_ready: bool = False
    is_responsive: bool = True
    is_alive: bool = True

    @property
    def is_serving(self) -> bool:
        return self.is_ready and self.is_responsive
